"""Evaluation: TRL's metrics alone unless asked for more, no anchor, and the training run does not notice it."""

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tiny import ANCHOR, changed_weights, copied_weights, tiny_data, tiny_trainer

from sg_opd_trl.teacher_sampling.callback import AnchorStep, TeacherRollout

EVAL = {"per_device_eval_batch_size": 8, "max_steps": 3}


def evaluator(folder: Path, **settings: Any) -> Any:
    return tiny_trainer(folder, settings=ANCHOR | EVAL | settings, eval_dataset=tiny_data(4))


def trained(folder: Path, **settings: Any) -> Any:
    """A finished run; each starts from the seed that construction sets."""
    trainer = evaluator(folder, **settings)
    trainer.train()
    return trainer


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("must not be called while evaluating")


def test_the_teacher_is_not_asked(tmp_path: Path) -> None:
    trainer = evaluator(tmp_path)
    trainer.teacher.score = trainer.teacher.generate = trainer.reference.score = refuse
    values = trainer.evaluate()
    assert {"eval_loss", "eval_reward", "eval_completions/mean_length", "eval_entropy"} <= values.keys() | set(
        trainer.state.log_history[-1]
    )
    own = ("eval_gate/", "eval_teacher/", "eval_anchor/", "eval_time/")
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith(own)]


def test_the_teacher_is_asked_if_wanted(tmp_path: Path) -> None:
    trainer = evaluator(tmp_path, eval_with_teacher=True)
    trainer.teacher.generate = refuse
    trainer.evaluate()
    entry = trainer.state.log_history[-1]
    shares = [entry[f"eval_gate/{name}"] for name in ("consensus", "conflict", "neutral")]
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares[:2]) > 0
    assert entry["eval_teacher/kl_k1"] != 0
    assert not [name for name in entry if "anchor" in name]


def test_evaluation_metrics_do_not_mix_with_training_metrics(tmp_path: Path) -> None:
    """Evaluating after step 2 of a logging window of 3 leaves the window's training metrics as they are."""
    settings = {"logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "eval_with_teacher": True}
    with_evaluation, without = trained(tmp_path, **settings), trained(tmp_path, logging_steps=3)
    entry = next(e for e in with_evaluation.state.log_history if e["step"] == 3 and "gate/consensus" in e)
    plain = next(e for e in without.state.log_history if e["step"] == 3 and "gate/consensus" in e)
    assert any("eval_gate/consensus" in e and e["step"] == 2 for e in with_evaluation.state.log_history)
    names = [name for name in plain if name.startswith(("gate/", "teacher/", "anchor/", "reward", "completions/"))]
    names.remove("teacher/scored_tokens")  # what the run has cost, evaluations included
    assert len(names) > 40
    assert {name: entry[name] for name in names} == {name: plain[name] for name in names}
    assert entry["time/teacher"] > 0


@pytest.mark.parametrize("with_teacher", [False, True])
def test_evaluating_or_not_gives_the_same_run(tmp_path: Path, with_teacher: bool) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_with_teacher": with_teacher}
    evaluating, plain = trained(tmp_path, **settings), trained(tmp_path)
    assert sum("eval_reward" in entry for entry in evaluating.state.log_history) == 3
    assert changed_weights(evaluating.model, copied_weights(plain.model)) == []


def test_random_states_are_left_alone(tmp_path: Path) -> None:
    trainer = evaluator(tmp_path)

    def state() -> tuple[Any, ...]:
        return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    draws: list[float] = []

    def verifier(completions: list, **_: Any) -> list[float]:
        draws.extend([random.random(), float(numpy.random.rand()), float(torch.rand(()))])
        return [1.0] * len(completions)

    trainer.reward_funcs[0] = verifier
    before = state()
    trainer.evaluate()
    assert draws
    assert state() == before


def test_an_error_while_evaluating_leaves_random_states_alone(tmp_path: Path) -> None:
    trainer = evaluator(tmp_path)

    def verifier(**_: Any) -> list[float]:
        random.random()
        raise KeyError("verifier")

    trainer.reward_funcs[0] = verifier
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(KeyError):
        trainer.evaluate()
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_groups_of_another_size(tmp_path: Path) -> None:
    """`num_generations_eval` forms the groups while evaluating."""
    trainer = evaluator(tmp_path, num_generations_eval=2, eval_with_teacher=True)
    sizes: list[int] = []
    signal = trainer.compute_verifier_signal

    def recording(verdicts: torch.Tensor, num_generations: int) -> torch.Tensor:
        sizes.append(num_generations)
        return signal(verdicts, num_generations)

    trainer.compute_verifier_signal = recording
    trainer.evaluate()
    assert set(sizes) == {2}


def test_an_anchor_that_waits_is_left_for_training(tmp_path: Path) -> None:
    trainer = evaluator(tmp_path, eval_with_teacher=True)
    rows = [[TeacherRollout([3, 5], [3, 5], [6, 1], verdict=1.0)]]
    trainer.anchor = AnchorStep(alpha=0.2, kept=1, total=2.0, micro_batches=rows)
    trainer.evaluate()
    assert len(trainer.anchor.micro_batches) == 1


def test_the_seconds_of_an_evaluation_are_not_those_of_training(tmp_path: Path) -> None:
    trainer = evaluator(tmp_path, eval_with_teacher=True)
    trainer.seconds["verify"] = 1.5
    trainer.evaluate()
    assert dict(trainer.seconds) == {"verify": 1.5}


def test_evaluation_sets_have_metrics_of_their_own(tmp_path: Path) -> None:
    """The verifier calls every prompt of `easy` right and every prompt of `hard` wrong."""

    def verifier(prompts: list, completions: list, **_: Any) -> list[float]:
        return [float("1234" in prompt[0]["content"]) for prompt in prompts]

    data = tiny_data()
    easy, hard = (data.filter(lambda row, x=x: ("1234" in row["prompt"][0]["content"]) is x) for x in (True, False))
    settings = EVAL | {"per_device_eval_batch_size": 4, "eval_with_teacher": True, "teacher_sampling_enable": False}
    both = {"easy": easy, "hard": hard}
    trainer = tiny_trainer(tmp_path, settings=settings, reward_funcs=verifier, eval_dataset=both)
    values = trainer.evaluate()
    assert (values["eval_easy_reward"], values["eval_hard_reward"]) == (1.0, 0.0)
    names = ("reward", "completions/mean_length", "teacher/kl_k1", "gate/neutral", "loss")
    assert {f"eval_{kind}_{name}" for kind in both for name in names} <= values.keys()
    assert "eval_reward" not in values
    alone = trainer.evaluate(hard)
    assert alone["eval_reward"] == 0.0
    assert not [name for name in alone if "hard" in name]
