"""`verifier_timeout` in recipes and on command lines, of every method that asks a verifier."""

import json
import os
from pathlib import Path

import pytest

from sg_opd_trl.cli import main
from sg_opd_trl.cli.check import check

REWARD = """
import os
import pathlib

def reward(completions, **_):
    pathlib.Path("judged_by").write_text(str(os.getpid()))
    return [1.0] * len(completions)
"""
METHODS = {
    "sg_opd": ((), ()),
    "grpo": (("teacher_",), ("weight_decay: 0.1",)),  # no group of equal rewards has a gradient
    "sft": ((), ()),
    "seqkd": (("num_generations",), ()),
}


def of(method: str, recipe: Path, *more: str) -> list[str]:
    """The words of the tiny recipe with a method's keys, and some more lines."""
    dropped, own = METHODS[method]
    lines = recipe.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not dropped or not line.startswith(dropped)]
    recipe.write_text("\n".join([f"method: {method}", *kept, *own, *more]), encoding="utf-8")
    return ["--config", str(recipe)]


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_bounds_the_functions_of_every_method(
    method: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bounded_reward.py").write_text(REWARD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    more = ["reward_funcs: [bounded_reward.reward]", "verifier_timeout: 300"]
    assert main(["train", *of(method, tiny_recipe, *more)]) == 0
    judged_by = int((tmp_path / "judged_by").read_text(encoding="utf-8"))
    assert judged_by != os.getpid()
    if method != "grpo":  # whose trainer is TRL's own, and keeps it as long as itself
        assert not Path(f"/proc/{judged_by}").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_limit_of_nothing_is_refused_by_every_method(
    method: str, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *of(method, tiny_recipe, "verifier_timeout: 0")]) == 2
    assert "`verifier_timeout` must be a number in (0, inf), got 0" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("method", ["sg_opd", "grpo"])
def test_check_tells_of_a_verifier_that_never_answers(method: str, tiny_recipe: Path) -> None:
    words = ["--reward_funcs", "reward_functions.needs_a_gold", "--verifier_timeout", "0.5"]
    report = check([*of(method, tiny_recipe), *words], 0)
    row = report.of("verifier")
    assert row.state == "red"
    assert "ends in VerifierError: `needs_a_gold` took longer than `verifier_timeout`, 0.5 seconds" in row.found


def test_an_evaluation_leaves_what_is_not_answered_without_a_verdict(tiny, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    words = ["--model", tiny.student, "--dataset_name", tiny.data, "--output", str(output), "--limit", "2"]
    words += ["--num_samples", "1", "--max_new_tokens", "4", "--batch_size", "1"]
    assert main(["evaluate", *words, "--reward_func", "reward_functions.sleeps", "--verifier_timeout", "0.5"]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert (result["abstained"], result["avg_at_k"]) == (2, None)
