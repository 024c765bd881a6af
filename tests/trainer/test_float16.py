"""Training in float16 beside a scaler. accelerate has neither on a CPU; here it gets the CPU's own, by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import copied_weights, same_saved_student, tiny_model, tiny_trainer

from sg_opd_trl import precision
from sg_opd_trl.errors import NonFiniteError

SETTINGS = {"fp16": True, "bf16": False, "logging_steps": 1, "teacher_sampling_enable": False, "save_strategy": "no"}


@pytest.fixture(autouse=True)
def float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_float16", lambda config: True)


def trainer_in_float16(folder: Path, scale: float = 2.0**10, settings: dict | None = None, **arguments: Any) -> Any:
    trainer = tiny_trainer(folder, settings=SETTINGS | (settings or {}), **arguments)
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_step_in_float16_is_that_of_float32(tmp_path: Path) -> None:
    """Its gradient too: what the scaler multiplied it by is taken out again."""
    half = trainer_in_float16(tmp_path / "half", settings={"max_steps": 1})
    assert half.accelerator.mixed_precision == "fp16"
    half.train()
    whole = tiny_trainer(tmp_path / "whole", settings=SETTINGS | {"fp16": False, "max_steps": 1})
    whole.train()
    for name in ("loss", "grad_norm", "teacher/abs_advantage_mean"):
        assert logged(half, name) == pytest.approx(logged(whole, name), rel=5e-3)
    assert logged(half, "loss") != logged(whole, "loss")  # it was in float16


def test_a_teacher_that_is_the_student_has_no_opinion(tmp_path: Path) -> None:
    trainer = trainer_in_float16(tmp_path, settings={"max_steps": 1}, teacher_model=tiny_model(0))
    trainer.train()
    assert logged(trainer, "gate/neutral") == [1.0]


def test_steps_that_overflow_because_of_their_scale_are_left_out(tmp_path: Path) -> None:
    trainer = trainer_in_float16(tmp_path, scale=2.0**17, settings={"max_steps": 6})
    trainer.train()
    finite = [norm == norm and norm != float("inf") for norm in logged(trainer, "grad_norm")]
    assert not finite[0] and finite[-1]
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())


def test_a_gradient_that_overflows_at_every_scale_ends_the_run(tmp_path: Path) -> None:
    model = tiny_model(0)
    next(model.parameters()).register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    before = copied_weights(model)
    trainer = trainer_in_float16(tmp_path, scale=4.0, settings={"max_steps": 9}, model=model)
    with pytest.raises(NonFiniteError, match=r"step 4 is (inf|nan), and so it was at every scale down to 0.5"):
        trainer.train()
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())


def test_a_resumed_run_has_the_scale_of_the_one_before(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}
    straight = trainer_in_float16(tmp_path / "straight", scale=2.0**17, settings=settings)
    straight.train()
    straight.save_model(str(tmp_path / "one"))
    resumed = trainer_in_float16(tmp_path / "resumed", scale=1.0, settings=settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    resumed.save_model(str(tmp_path / "two"))
    assert resumed.accelerator.scaler.get_scale() == straight.accelerator.scaler.get_scale() < 2.0**17
    assert same_saved_student(tmp_path / "one", tmp_path / "two")
