"""The reward functions: verdicts, logging, validation; `math_reward` first, then string comparison."""

import os
import subprocess
import sys
import threading
from typing import get_args

import pytest
from repository import PATIENCE

from sg_opd_trl.errors import VerifierError
from sg_opd_trl.verifiers import Judge, Judgement, exact_match_reward, math_reward, rewards
from sg_opd_trl.verifiers.judge import NoVerdictReason


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\dfrac{2}{4}}", r"\frac12", 1.0),
        (r"\boxed{0.6}", r"\frac{1}{2}", 0.0),
        (r"\boxed{5}. Wait, no: \boxed{2}", "2", 1.0),
        (r"\boxed{5}. Wait, no: \boxed{2}", "5", 0.0),
        (r"\boxed{10{,}000}", "10000", 1.0),
        (r"\boxed{073}", "73", 1.0),
        (r"\boxed{[1,2)}", "[1,2)", 1.0),
        (r"\boxed{(1,2]}", "[1,2)", 0.0),
        (r"\boxed{1+x}", "x+1", 1.0),
        (r"\boxed{b, a}", "a, b", 1.0),
        (r"\boxed{70^\circ}", "70", 1.0),
        (r"\boxed{5\text{ cm}}", "5", 1.0),
        ("the answer is $12$", "12", 1.0),
        ("the answer is $12$", "13", 0.0),
        (r"the answer is $12$ ... \boxed{1", "12", 0.0),
        (r"<think>\boxed{12}</think> hm", "12", 0.0),
        ("", "12", 0.0),
        (r"\boxed{12}", 12, 1.0),
        (r"\boxed{12}", "@@@", None),
        (r"\boxed{@@@}", "@@@", 1.0),  # Word for word: no mathematics is needed.
        ("", "@@@", None),
        (r"\boxed{12}", None, None),
        (r"\boxed{12}", "", None),
    ],
)
def test_verdict(completion: str, solution: object, reward: float | None) -> None:
    chat = [{"role": "assistant", "content": completion}]
    assert math_reward([completion, chat], [solution, solution], difficulty=[1, 1]) == [reward, reward]


def test_name_and_empty_batch() -> None:
    assert math_reward.__name__ == "math_reward"
    assert math_reward([], []) == []


@pytest.mark.parametrize("solution", [["1"], None, "12"])
def test_lengths_must_agree(solution: object) -> None:
    with pytest.raises(VerifierError, match="`solution` must be a list of 2 entries, one per completion, got"):
        math_reward(["a", "b"], solution)  # type: ignore[arg-type]


def test_logs_answers_and_shares(monkeypatch: pytest.MonkeyPatch, judge: Judge) -> None:
    monkeypatch.setattr(rewards, "_JUDGE", judge)
    columns: dict[str, list[object]] = {}
    metrics: dict[str, float] = {}
    completions = [r"\boxed{4}", "the answer is $12$", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{7}", r"\boxed{1"]
    verdicts = math_reward(
        completions, ["4", "12", "5", None, "1"], log_extra=columns.__setitem__, log_metric=metrics.__setitem__
    )
    assert verdicts == [1.0, 1.0, None, None, 0.0]
    assert columns == {"answer": ["4", "12", "9^{9^{9^{9}}}", "7", ""]}
    assert metrics == {
        "verifier/timeouts": 1 / 5,
        "verifier/abstained": 2 / 5,
        "verifier/no_verdict_gold": 1,
        "verifier/no_verdict_timeout": 1,
        "verifier/no_verdict_wall_timeout": 0,
        "verifier/no_verdict_memory": 0,
        "verifier/no_verdict_crash": 0,
        "verifier/no_verdict_unsure": 0,
    }


def test_every_reason_for_no_verdict_is_counted_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = get_args(NoVerdictReason)
    found = [Judgement(None, reason) for number, reason in enumerate(reasons, 1) for _ in range(number)]
    monkeypatch.setattr(rewards, "_judge", lambda answers, golds: [Judgement(True), *found])
    metrics: dict[str, float] = {}
    answers = [r"\boxed{1}"] * (1 + len(found))
    math_reward(answers, ["1"] * len(answers), log_metric=metrics.__setitem__)
    counted = {f"verifier/no_verdict_{reason}": number for number, reason in enumerate(reasons, 1)}
    assert {name: value for name, value in metrics.items() if "no_verdict" in name} == counted
    assert metrics["verifier/abstained"] == pytest.approx(len(found) / len(answers))


def test_string_comparison_logs_golds_that_are_missing() -> None:
    metrics: dict[str, float] = {}
    exact_match_reward([r"\boxed{1}", "1", "1", "1"], ["1", "2", None, ""], log_metric=metrics.__setitem__)
    assert metrics == {"verifier/abstained": 2 / 4, "verifier/no_verdict_gold": 2}
    assert exact_match_reward([], [], log_metric=metrics.__setitem__) == []


def test_same_verdicts_from_many_threads() -> None:
    completions = [rf"\boxed{{{number}/4}}" for number in range(40)]
    solutions = [str(number / 4 if number % 3 else "1/3") for number in range(40)]
    # Every third gold answer is 1/3, which no quarter equals.
    expected = [1.0 if number % 3 else 0.0 for number in range(40)]
    found: dict[int, list[float | None]] = {}
    threads = [
        threading.Thread(target=lambda slot=slot: found.update({slot: math_reward(completions, solutions)}))
        for slot in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), expected)
    assert math_reward(completions, solutions) == expected


def test_import_loads_no_heavy_package() -> None:
    code = (
        "import sys, sg_opd_trl.verifiers\n"
        "heavy = {'math_verify', 'latex2sympy2_extended', 'sympy', 'torch', 'trl', 'transformers'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_works_in_a_script_without_main_guard(tmp_path) -> None:  # type: ignore[no-untyped-def]
    script = tmp_path / "script.py"
    script.write_text(
        "from sg_opd_trl.verifiers import math_reward\n"
        "open('runs.txt', 'a').write('run;')\n"
        "open('verdicts.txt', 'w').write(str(math_reward([r'\\boxed{1/2}'], ['0.5'])))\n"
    )
    # The package need not be installed: the script gets the import path of this process.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, check=True, timeout=PATIENCE)
    assert (tmp_path / "runs.txt").read_text() == "run;"
    assert (tmp_path / "verdicts.txt").read_text() == "[1.0]"


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        (r"\boxed{42}", "42", 1.0),
        (r"\boxed{ 42. }", "$42$", 1.0),
        (r"\boxed{41} or \boxed{42}", 42, 1.0),
        (r"\boxed{1{,}000}", "1000", 0.0),
        (r"\boxed{1,000,000}", "1000000", 1.0),
        (r"\boxed{-1,234.5}", "-1234.5", 1.0),
        (r"\boxed{1,2}", "12", 0.0),  # A list, not thousands.
        (r"\boxed{\dfrac{1}{2}}", r"\boxed{\frac 12}", 0.0),
        (r"\boxed{\dfrac{1}{2}}", r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{\left( 1,\, 2 \right)}", "(1,2)", 1.0),
        (r"\boxed{\leftarrow}", "arrow", 0.0),
        (r"\boxed{\$5}", "5", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 0.0),
        ("42", "42", 0.0),
        (r"\boxed{42", "42", 0.0),
        (r"<think>\boxed{42}</think>", "42", 0.0),
        (r"\boxed{42}", None, None),
    ],
)
def test_exact_match(completion: str, solution: object, reward: float | None) -> None:
    assert exact_match_reward([completion], [solution], other_column=["x"]) == [reward]


def test_exact_match_needs_lengths_that_agree() -> None:
    with pytest.raises(VerifierError, match="`solution` must be a list of 2 entries"):
        exact_match_reward(["a", "b"], ["1"])
