"""A step whose loss or gradient is not finite changes nothing, is kept to be looked at, and is one of few."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import ANCHOR, changed_weights, copied_weights, inject_rollouts, logged, tiny_trainer
from transformers.training_args import OptimizerNames
from two_ranks import launch

from sg_opd_trl import NonFiniteError, SGOPDTrainer
from sg_opd_trl.checkpoints import check_checkpoint
from sg_opd_trl.skipped_steps import weight_that_is_not_finite

SETTINGS = {"teacher_sampling_enable": False, "learning_rate": 1e-2}


def spoiled(trainer: Any, steps: tuple[int, ...], value: float = math.nan) -> list[dict]:
    """Have the gradient of these steps be `value` in one entry; the weights at each backward."""
    weights: list[dict] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        weights.append(copied_weights(trainer.model))
        if trainer.state.global_step + 1 in steps:
            gradient = gradient.clone()
            gradient[3, 0] = value
        return gradient

    trainer.model.lm_head.weight.register_hook(spoil)
    return weights


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_leaves_weights_and_moments_as_they_were(
    tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = tiny_trainer(tmp_path, settings=SETTINGS | {"max_steps": 3})
    weights = spoiled(trainer, (2,), value)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 3
    assert changed_weights(trainer.model, weights[1]) != []
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1])
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {2.0}
    assert all(torch.isfinite(weight).all() for weight in copied_weights(trainer.model).values())
    assert "Step 2 is skipped: weights and optimizer stay as they are. The gradient norm of step 2 is" in caplog.text
    assert logged(trainer, "skipped_steps") == [1.0]
    assert logged(trainer, "grad_norm")[1] == 0.0


def test_the_batch_is_written_aside(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=SETTINGS | ANCHOR | {"teacher_sampling_enable": True})
    spoiled(trainer, (1,))
    trainer.train()
    with safe_open(tmp_path / "skipped_steps" / "step-1-rank-0.safetensors", "pt") as file:
        assert file.metadata()["step"] == "1"
        assert "gradient norm" in file.metadata()["reason"]
        names = set(file.keys())
        assert {
            f"micro_batch_0.{name}" for name in ("completion_ids", "completion_mask", "verdicts", "teacher_logps")
        } <= names
        assert file.get_tensor("micro_batch_0.completion_ids").size(0) == 8


def test_a_loss_that_is_not_finite_is_skipped_too(tmp_path: Path) -> None:
    class Overflowing(SGOPDTrainer):
        def compute_token_weights(self, *args: Any) -> torch.Tensor:
            weights = super().compute_token_weights(*args)
            return weights * math.inf if self.state.global_step == 0 else weights

    trainer = tiny_trainer(tmp_path, settings=SETTINGS, trainer_class=Overflowing)
    before = copied_weights(trainer.model)
    trainer.train()
    assert logged(trainer, "skipped_steps") == [1.0]
    assert changed_weights(trainer.model, before) != []
    assert all(torch.isfinite(weight).all() for weight in copied_weights(trainer.model).values())
    # Nothing of it is in what is reported either: the file is JSON for everybody.
    (tmp_path / "log.json").write_text(json.dumps(trainer.state.log_history, allow_nan=False), encoding="utf-8")


def test_more_in_a_row_than_allowed_end_the_run_with_its_last_step(tmp_path: Path) -> None:
    settings = SETTINGS | {"max_steps": 9, "max_skipped_steps": 2, "save_strategy": "steps", "save_steps": 100}
    trainer = tiny_trainer(tmp_path, settings=settings)
    weights = spoiled(trainer, (2, 4, 5, 6))
    with pytest.raises(NonFiniteError, match=r"step 3 in a row.*`max_skipped_steps` allows 2\. Its batch is in"):
        trainer.train()
    assert trainer.state.global_step == 5
    assert changed_weights(trainer.model, weights[-1]) == []
    check_checkpoint(tmp_path / "checkpoint-5")
    assert len(list((tmp_path / "skipped_steps").iterdir())) == 4


def test_a_student_whose_weights_are_not_finite_ends_at_once(tmp_path: Path) -> None:
    """Its next step can only be skipped too."""
    trainer = tiny_trainer(tmp_path, settings=SETTINGS | {"lambda_high": 1.0})
    inject_rollouts(trainer, lambda prompt, row: [6 + row % 2, 8, 1])
    with torch.no_grad():
        trainer.model.lm_head.weight[7, 0] = math.nan
    with pytest.raises(NonFiniteError, match="of step 1 are not finite"):
        trainer.train()


def test_a_training_does_not_inherit_a_step_that_another_broke_off(tmp_path: Path) -> None:
    """Its first step is good."""

    class BrokenOff(SGOPDTrainer):
        first = True

        def compute_token_weights(self, *args: Any) -> torch.Tensor:
            weights = super().compute_token_weights(*args)
            return weights * math.inf if self.first else weights

        def on_grad_norm(self, grad_norm: Any) -> Any:
            if self.first:
                self.first = False
                raise KeyboardInterrupt
            return super().on_grad_norm(grad_norm)

    trainer = tiny_trainer(tmp_path, settings=SETTINGS | {"max_steps": 1}, trainer_class=BrokenOff)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    before = copied_weights(trainer.model)
    trainer.train()
    assert trainer.skipped.total == 0
    assert changed_weights(trainer.model, before) != []


def test_a_training_counts_skips_in_a_row_anew(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=SETTINGS | {"max_steps": 1, "max_skipped_steps": 1})
    spoiled(trainer, (1,))
    trainer.train()
    trainer.train()
    assert (trainer.skipped.in_a_row, trainer.skipped.total) == (1, 2)


@pytest.mark.parametrize(
    ("optim", "possible"), [("adamw_torch", True), ("lomo", False), ("galore_adamw_layerwise", False)]
)
def test_an_update_inside_the_backward_pass_cannot_be_skipped(tmp_path: Path, optim: str, possible: bool) -> None:
    trainer = tiny_trainer(tmp_path, settings=SETTINGS)
    trainer.args.optim = OptimizerNames(optim)
    assert trainer.skipped.possible is possible


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.bfloat16])
def test_a_weight_of_any_width_is_looked_at(dtype: torch.dtype) -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    model.weight = torch.nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
    assert weight_that_is_not_finite(model) is None
    model.weight.data[1, 1] = torch.tensor(math.nan).to(dtype)
    assert weight_that_is_not_finite(model) == "weight"


def test_packed_four_bit_weights_are_finite() -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    packed = torch.full((2, 2), 255, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    model.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert weight_that_is_not_finite(model) is None


@pytest.mark.parametrize("write", ["save_checkpoint", "save_model"])
def test_weights_that_are_not_finite_are_never_written(tmp_path: Path, write: str) -> None:
    trainer = tiny_trainer(tmp_path, settings=SETTINGS)
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.inf
    with pytest.raises(NonFiniteError, match=r"weights are not finite \(model\.norm\.weight\)"):
        getattr(trainer, write)()
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.slow
def test_two_ranks_skip_together(tmp_path: Path) -> None:
    """The gradient of one of them is not finite; both stay as they were, and go on alike."""
    done = launch(__file__, str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == 1
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert all(torch.isfinite(weight).all() for weight in first["weights"].values())
    assert first["changed by the skipped step"] == second["changed by the skipped step"] == []
    assert first["changed by the next step"] != []


def one_rank(folder: Path) -> None:
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    settings = SETTINGS | {"max_steps": 2, "per_device_train_batch_size": 4}
    trainer = tiny_trainer(folder / "run", settings=settings)
    start = copied_weights(trainer.model)
    weights = spoiled(trainer, (1,) if rank == 1 else ())
    trainer.train()
    facts = {
        "skipped": trainer.skipped.total,
        "weights": copied_weights(trainer.model),
        "changed by the skipped step": [name for name in start if not torch.equal(start[name], weights[1][name])],
        "changed by the next step": changed_weights(trainer.model, start),
    }
    torch.save(facts, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    import sys

    one_rank(Path(sys.argv[1]))
