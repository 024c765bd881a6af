"""What the first seconds of a run look at: a run that goes on is the same in every bit."""

import logging
import random

import numpy
import pytest
import torch
from tiny import ANCHOR, StepRecorder, tiny_data, tiny_trainer

import sg_opd_trl.inspection.run as page
from sg_opd_trl import SGOPDConfigError, math_reward
from sg_opd_trl.inspection import first_seconds
from sg_opd_trl.inspection.report import Row


def trained(folder, **settings):
    """Weights, gradients and draws of two steps, with rollouts that are drawn at random."""
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    recorder = StepRecorder()
    trainer = tiny_trainer(folder, settings={**ANCHOR, **settings}, reward_funcs=math_reward, callbacks=[recorder])
    trainer.train()
    draws = [torch.rand(3).tolist(), random.random(), float(numpy.random.rand())]
    logs = [
        {k: v for k, v in entry.items() if not k.startswith(("time/", "train_", "step_time"))}
        for entry in trainer.state.log_history
    ]
    return recorder, trainer.model.state_dict(), draws, logs


def test_a_run_with_them_is_the_run_without_in_every_bit(tmp_path):
    (one, weights, draws, logs), (other, expected, others, expected_logs) = (
        trained(tmp_path, preflight=preflight) for preflight in (True, False)
    )
    assert draws == others
    assert logs == expected_logs
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for mine, theirs in zip(one.steps, other.steps, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_nothing_is_said_of_a_run_that_is_as_it_should_be(tmp_path, caplog):
    first_seconds(tiny_trainer(tmp_path))
    assert [record for record in caplog.records if record.name.startswith("sg_opd_trl.inspection")] == []


def test_what_is_doubtful_is_a_warning(tmp_path, caplog):
    rows = tiny_data().to_list()
    rows[3]["solution"] = "proof"
    from datasets import Dataset

    trainer = tiny_trainer(tmp_path, reward_funcs=math_reward, train_dataset=Dataset.from_list(rows))
    with caplog.at_level(logging.WARNING):
        first_seconds(trainer)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("sg_opd_trl.inspection")]
    assert len(said) == 1
    assert said[0].startswith("golds: 1 of 16 golds of `train_dataset` cannot be judged (row 3: 'proof').")


def unread(rows=16):
    return tiny_data(rows).map(lambda row: {"solution": "notfound"})


def test_what_cannot_go_well_ends_the_run_before_its_first_step(tmp_path):
    trainer = tiny_trainer(tmp_path, reward_funcs=math_reward, train_dataset=unread())
    with pytest.raises(SGOPDConfigError, match=r"golds: 16 of 16 golds .* cannot be judged"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_they_can_be_switched_off(tmp_path, monkeypatch):
    monkeypatch.setattr("sg_opd_trl.trainer.first_seconds", lambda run: pytest.fail("it was looked at"))
    tiny_trainer(tmp_path, settings={"preflight": False, "max_steps": 1}).train()


def test_an_estimate_does_not_stop_a_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(page, "memory_row", lambda *_: Row("memory", "red", "Too little.", "Take less."))
    with caplog.at_level(logging.WARNING):
        first_seconds(tiny_trainer(tmp_path))
    assert "memory: Too little. Take less." in caplog.text


def test_a_function_of_the_callers_is_not_called(tmp_path):
    def verifier(completions, **_):
        raise AssertionError("it was called")

    first_seconds(tiny_trainer(tmp_path, reward_funcs=verifier))
