"""`verifier_timeout` in a run: the same run with and without it, and runs that go on where nobody answers."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import reward_functions as functions
import torch
from tiny import ANCHOR, changed_weights, copied_weights, logged, tiny_data, tiny_trainer
from two_ranks import launch

from sg_opd_trl import VerifierError
from sg_opd_trl.checkpoints import check_checkpoint
from sg_opd_trl.verifiers.bounded import BoundedFunction

from . import ranks_script as script

AMPLE = {"verifier_timeout": 300.0}
# What a function that answers has, on a machine that is busy, and what is waited for one that does not.
SHORT = {"verifier_timeout": 5.0}
NO_ANCHOR = {"teacher_sampling_enable": False}
LOCAL = {"max_steps": 3, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 100}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "num_generations_eval": 4}


def run(folder: Path, function: Any, *, resume: Path | None = None, evaluated: bool = False, **settings: Any) -> Any:
    data = {"eval_dataset": tiny_data(4)} if evaluated else {}
    settings = LOCAL | (EVALUATED if evaluated else {}) | settings
    trainer = tiny_trainer(folder, settings=settings, reward_funcs=function, **data)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def of_no_clock(trainer: Any) -> list[dict]:
    """What is logged, without times and what only a bounded run has."""
    timed = ("time", "runtime", "per_second", "seconds", "unanswered", "memory", "cost")
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in timed)}
        for entry in trainer.state.log_history
    ]


def test_a_bounded_run_is_the_unbounded_run(tmp_path: Path) -> None:
    """In every bit and every logged number, with anchor and evaluation, also where it goes on from the other's."""
    settings = ANCHOR | {"save_steps": 2}
    plain = run(tmp_path / "plain", functions.parity, evaluated=True, **settings)
    bound = run(tmp_path / "bound", functions.parity, evaluated=True, **settings, **AMPLE)
    assert isinstance(bound.reward_funcs[0], BoundedFunction)
    assert bound.verifier.function is bound.reward_funcs[0]
    assert changed_weights(bound.model, copied_weights(plain.model)) == []
    assert of_no_clock(bound) == of_no_clock(plain)
    assert logged(bound, "rewards/parity/unanswered") == [0.0] * 3
    checkpoint = tmp_path / "plain" / "checkpoint-2"
    resumed = run(tmp_path / "again", functions.parity, evaluated=True, resume=checkpoint, **settings, **AMPLE)
    assert changed_weights(resumed.model, copied_weights(plain.model)) == []


def test_a_step_without_an_answer_has_no_verdict_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = run(tmp_path, functions.sleeps_in_the_second_step, **SHORT, **NO_ANCHOR)
    assert trainer.state.global_step == 3
    assert logged(trainer, "rewards/sleeps_in_the_second_step/unanswered") == [0.0, 8.0, 0.0]
    neutral = logged(trainer, "gate/neutral")
    assert neutral[1] == 1.0
    assert neutral[0] < 1.0
    told = [record.getMessage() for record in caplog.records if "took longer than" in record.getMessage()]
    assert len(told) == 1
    assert "and was killed, after 1 finished steps." in told[0]
    assert trainer.reward_funcs[0]._process is None, "nothing is left running"


def test_a_verifier_that_never_answers_ends_the_run_with_its_last_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(VerifierError, match="call 5 in a row without an answer"):
        run(
            *(tmp_path, functions.sleeps_from_the_second_step_on),
            **NO_ANCHOR,
            **{"verifier_timeout": 2.0, "max_steps": 9},
        )
    assert "Its 5 finished steps are in" in caplog.text
    check_checkpoint(tmp_path / "checkpoint-5")


def test_what_it_raises_ends_the_run_with_its_last_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ZeroDivisionError, match="in the verifier"), caplog.at_level(logging.WARNING):
        run(tmp_path, functions.raises_in_the_third_step, **AMPLE, **NO_ANCHOR)
    assert "The run was ended by ZeroDivisionError. Its 2 finished steps are in" in caplog.text
    check_checkpoint(tmp_path / "checkpoint-2")


def test_teacher_rollouts_without_an_answer_are_not_kept(tmp_path: Path) -> None:
    trainer = run(tmp_path, functions.sleeps_on_few, **ANCHOR, **SHORT)
    assert trainer.state.global_step == 3
    assert sum(logged(trainer, "anchor/dropped_no_verdict")) == sum(logged(trainer, "anchor/rollouts")) > 0
    name = "rewards/sleeps_on_few/unanswered"
    assert logged(trainer, name) == [0.0] * 3
    assert all(number > 0 for number in logged(trainer, f"anchor/{name}"))


def test_an_evaluation_without_an_answer_counts_it(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path,
        settings={"per_device_eval_batch_size": 4, "num_generations_eval": 4, "verifier_timeout": 2.0} | NO_ANCHOR,
        reward_funcs=functions.sleeps,
        eval_dataset=tiny_data(1),
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/sleeps/unanswered"] == 4.0


@pytest.mark.slow
def test_two_ranks_go_on_where_the_verifier_of_one_never_answers(tmp_path: Path) -> None:
    output = tmp_path / "ranks.json"
    done = launch(script.__file__, "unanswered", str(output))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("took longer than `verifier_timeout`") == 1
    first, second = json.loads(output.read_text(encoding="utf-8"))
    assert first["steps"] == second["steps"] == 4
    assert first["kind"] == second["kind"] == ""
    # Of eight rollouts, the four of one rank.
    assert first["unanswered"] == [0.0, 0.0, 2.0, 0.0]
    for name, weight in torch.load(first["weights"]).items():
        assert torch.equal(weight, torch.load(second["weights"])[name])
