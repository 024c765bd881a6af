"""The run's verifier: which function it is, what it may answer, and what it is asked."""

import asyncio
import math
import threading
from typing import Any

import pytest
import torch
from torch import nn

from sg_opd_trl import SGOPDConfigError, VerifierError
from sg_opd_trl.verifiers.verdicts import RunVerifier

NAN = math.nan


def style(**_: Any) -> list[float]:
    raise AssertionError("not the verifier")


def verifier(answers: list, wanted: str | None = "judge", binary: bool = True) -> RunVerifier:
    def judge(**asked: Any) -> list:
        seen.append(asked)
        return answers

    seen: list[dict] = []
    run_verifier = RunVerifier([style, judge], ["style", "judge"], wanted, binary=binary)
    run_verifier.seen = seen  # type: ignore[attr-defined]
    return run_verifier


def test_the_first_function_is_the_verifier_unless_named() -> None:
    assert (verifier([], None).index, verifier([], None).name) == (0, "style")
    assert (verifier([]).index, verifier([]).name) == (1, "judge")


def test_an_unknown_name() -> None:
    with pytest.raises(SGOPDConfigError, match=r"`verifier_reward_func`.*\['style', 'judge'\], got 'other'"):
        verifier([], "other")


@pytest.mark.parametrize("binary", [True, False])
def test_a_reward_model(binary: bool) -> None:
    if binary:
        with pytest.raises(SGOPDConfigError, match="got the reward model 'scores'"):
            RunVerifier([nn.Linear(1, 1)], ["scores"], None, binary=True)
    else:
        assert RunVerifier([nn.Linear(1, 1)], ["scores"], None, binary=False).name == "scores"


def test_verdicts_are_the_verifiers_column_alone() -> None:
    rewards = torch.tensor([[0.3, 1.0], [-7.0, 0.0], [2.5, NAN]])
    torch.testing.assert_close(verifier([]).verdicts(rewards), torch.tensor([1.0, 0.0, NAN]), equal_nan=True)


@pytest.mark.parametrize("bad", [0.5, -1.0, 2.0, math.inf, -math.inf, 1e-6])
def test_other_values_are_refused(bad: float) -> None:
    rewards = torch.tensor([[0.0, 1.0], [0.0, bad]])
    with pytest.raises(VerifierError, match=r"`judge` must answer 1 \(right\), 0 \(wrong\) or None") as caught:
        verifier([]).verdicts(rewards)
    assert f"got {bad:g}" in str(caught.value)
    assert verifier([], binary=False).verdicts(rewards)[1] == pytest.approx(bad)


EXAMPLES = [{"prompt": "1+1=", "solution": "2", "level": 3}, {"prompt": "2+2=", "solution": "4", "level": 5}]


def judged(answers: list, **settings: Any) -> tuple[list, dict]:
    chosen = verifier(answers, **settings)
    return chosen.judge(EXAMPLES, ["2", "5"], [[7], [10]], "state"), chosen.seen[0]  # type: ignore[attr-defined]


def test_judging_passes_what_trl_passes() -> None:
    verdicts, asked = judged([1.0, 0])
    assert verdicts == [1.0, 0.0]
    assert {name: asked[name] for name in ("prompts", "completions", "completion_ids", "solution", "level")} == {
        "prompts": ["1+1=", "2+2="],
        "completions": ["2", "5"],
        "completion_ids": [[7], [10]],
        "solution": ["2", "4"],
        "level": [3, 5],
    }
    assert asked["trainer_state"] == "state"
    assert "prompt" not in asked
    assert asked["log_extra"]("column", [1]) is None


def test_what_is_logged_while_judging_is_kept_until_it_is_taken() -> None:
    def judge(completion_ids: list, log_metric: Any, **_: Any) -> list[float]:
        log_metric("length", len(completion_ids[0]))
        log_metric("length", torch.tensor(5.0))
        log_metric("other", 0.5)
        return [1.0]

    chosen = RunVerifier([judge], ["judge"], None, binary=True)
    for ids in ([7], [7, 8]):
        chosen.judge([{"prompt": "1"}], ["x"], [ids], None)
    assert chosen.take_metrics() == {"length": (13.0, 4), "other": (1.0, 2)}
    assert chosen.take_metrics() == {}


@pytest.mark.parametrize("answer", [None, NAN])
def test_an_abstention(answer: float | None) -> None:
    assert judged([answer, True])[0] == [None, 1.0]


@pytest.mark.parametrize("answer", [0.5, 2, math.inf])
def test_another_value_on_a_teacher_rollout(answer: float) -> None:
    with pytest.raises(VerifierError, match=f"got {answer:g}"):
        judged([1.0, answer])


@pytest.mark.parametrize("answers", [[], [1.0], [1.0] * 3])
def test_the_wrong_number_of_verdicts(answers: list) -> None:
    with pytest.raises(VerifierError, match=f"one verdict per completion, got {len(answers)} for 2"):
        judged(answers)


def test_an_asynchronous_verifier() -> None:
    async def judge(completions: list, **_: Any) -> list[float]:
        return [float(text == "2") for text in completions]

    chosen = RunVerifier([judge], ["judge"], None, binary=True)
    assert chosen.judge(EXAMPLES, ["2", "5"], [[7], [10]], None) == [1.0, 0.0]


def test_an_asynchronous_verifier_inside_a_running_loop() -> None:
    """A notebook's thread runs a loop; the verifier is awaited on the trainer's own loop in another thread."""
    used: list[asyncio.AbstractEventLoop] = []

    async def judge(completions: list, **_: Any) -> list[float]:
        used.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    verifier = RunVerifier([judge], ["judge"], None, binary=True, event_loop=loop)

    async def notebook() -> list[float | None]:
        return verifier.judge([{"prompt": "1"}], ["x"], [[1]], None)

    assert asyncio.run(notebook()) == [1.0]
    assert used == [loop]
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


def test_columns_that_trl_passes_itself_are_left_out() -> None:
    def judge(completion_ids: list, completions: list, **columns: Any) -> list[float]:
        assert completion_ids == [[7]]
        assert sorted(columns) == ["log_extra", "log_metric", "prompts", "solution", "trainer_state"]
        return [1.0]

    verifier = RunVerifier([judge], ["judge"], None, binary=True)
    example = {"prompt": "1", "completion": "old", "completion_ids": [9], "solution": "1"}
    assert verifier.judge([example], ["x"], [[7]], None) == [1.0]
