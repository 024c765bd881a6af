"""Every decision of the trainer can be replaced in a subclass, and the replacement is what trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ANCHOR, GradientRecorder, inject_rollouts, logged, tiny_trainer
from torch import Tensor

from sg_opd_trl import SGOPDTrainer

OFF = {"teacher_sampling_enable": False, "max_steps": 1}


def write(prompt: list[int], row: int) -> list[int]:
    return [5 + row % 4, 7, 9, 11][: 2 + row % 3]


def run(folder: Path, trainer_class: Any = SGOPDTrainer, **settings: Any) -> tuple[Any, float]:
    """Trainer and gradient norm of one step on the same rollouts."""
    recorder = GradientRecorder()
    trainer = tiny_trainer(folder, settings=OFF | settings, trainer_class=trainer_class, callbacks=[recorder])
    inject_rollouts(trainer, write)
    trainer.train()
    return trainer, float(torch.stack([value.norm() for value in recorder.steps[0].values()]).norm())


def test_compute_gate(tmp_path: Path) -> None:
    class Trusting(SGOPDTrainer):
        def compute_gate(self, verifier_advantages: Tensor, teacher_advantages: Tensor) -> Tensor:
            assert verifier_advantages.shape == teacher_advantages.shape[:1]
            return torch.ones_like(teacher_advantages)

    trainer, _ = run(tmp_path, Trusting)
    assert logged(trainer, "gate/consensus") == [1.0]
    assert logged(run(tmp_path)[0], "gate/consensus")[0] < 1.0


def test_a_gate_of_ones_and_twos_own_reference_is_exopd(tmp_path: Path) -> None:
    """All tokens consensus at lambda 1.8 is the ungated run at lambda_base 1.8: all rows need the reference then."""

    class Trusting(SGOPDTrainer):
        def compute_gate(self, verifier_advantages: Tensor, teacher_advantages: Tensor) -> Tensor:
            return torch.ones_like(teacher_advantages)

    def constant(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1.0] * len(completion_ids)

    def advantage(trainer_class: Any, **settings: Any) -> dict[str, Tensor]:
        recorder = GradientRecorder()
        trainer = tiny_trainer(
            tmp_path, settings=OFF | settings, trainer_class=trainer_class, callbacks=[recorder], reward_funcs=constant
        )
        inject_rollouts(trainer, write)
        with torch.no_grad():
            trainer.model.lm_head.weight[8] += 0.3  # the student has left the reference
        trainer.train()
        return recorder.steps[0]

    gated = advantage(Trusting)
    plain = advantage(SGOPDTrainer, sign_gated_extrapolation=False, lambda_base=1.8)
    for name, value in plain.items():
        torch.testing.assert_close(gated[name], value, rtol=1e-5, atol=1e-7)


def test_route_advantages(tmp_path: Path) -> None:
    class Silent(SGOPDTrainer):
        def route_advantages(self, gate: Any, student_logps: Tensor, *args: Any) -> Tensor:
            return torch.zeros_like(student_logps)

    assert run(tmp_path, Silent)[1] == 0.0
    assert run(tmp_path)[1] > 0.1


def test_settings_without_effect_are_warned_about(tmp_path: Path, caplog: Any) -> None:
    run(tmp_path, sign_gated_extrapolation=False, lambda_high=2.5)
    assert (
        "no effect, each because of the one behind it: lambda_high=2.5 (sign_gated_extrapolation=False)."
        in caplog.text
    )


@pytest.mark.parametrize("mode", ["topk_logits", "full_logits"])
def test_a_lambda_without_a_reference_is_refused(tmp_path: Path, mode: str) -> None:
    class Extrapolating(SGOPDTrainer):
        def route_lambdas(self, *arguments: Any) -> Any:
            routed = super().route_lambdas(*arguments)
            return routed._replace(lambdas=torch.full_like(routed.lambdas, 1.5))

    plain = {"sign_gated_extrapolation": False, "distillation_mode": mode, "distillation_topk": 4}
    with pytest.raises(ValueError, match=r"lambda other than 1, but no setting asked for a reference.*`lambda_base`"):
        run(tmp_path, Extrapolating, **plain)
    run(tmp_path, Extrapolating, **plain, lambda_base=1.25)


def test_compute_token_weights(tmp_path: Path) -> None:
    class Halved(SGOPDTrainer):
        def compute_token_weights(self, teacher_advantages: Tensor, mask: Tensor, inputs: dict) -> Tensor:
            assert {"completion_ids", "verdicts"} <= inputs.keys()
            return super().compute_token_weights(teacher_advantages, mask, inputs) / 2

    settings = {"max_grad_norm": 1e9}
    halved, half_norm = run(tmp_path, Halved, **settings)
    assert half_norm == pytest.approx(run(tmp_path, **settings)[1] / 2, rel=1e-5)
    assert logged(halved, "teacher/phi_mean") == [pytest.approx(0.5)]


def test_compute_verifier_signal(tmp_path: Path) -> None:
    class Blind(SGOPDTrainer):
        def compute_verifier_signal(self, verdicts: Tensor, num_generations: int) -> Tensor:
            assert (verdicts.shape, num_generations) == ((8,), 4)
            return torch.zeros_like(verdicts)

    assert logged(run(tmp_path, Blind)[0], "gate/neutral") == [1.0]
    assert logged(run(tmp_path)[0], "gate/neutral")[0] < 1.0


def test_score_with_teacher(tmp_path: Path) -> None:
    class Shifted(SGOPDTrainer):
        def score_with_teacher(self, batch: Any, rows: Tensor, inputs: dict) -> Tensor:
            assert rows.dtype == torch.bool
            return super().score_with_teacher(batch, rows, inputs) - 0.25

    # k1 is the mean of lS - lT
    expected = logged(run(tmp_path)[0], "teacher/kl_k1")[0] + 0.25
    assert logged(run(tmp_path, Shifted)[0], "teacher/kl_k1") == [pytest.approx(expected, abs=1e-5)]


def test_score_with_reference(tmp_path: Path) -> None:
    class Replaced(SGOPDTrainer):
        def score_with_reference(self, batch: Any, rows: Tensor, inputs: dict) -> Tensor:
            return self.score_with_teacher(batch, rows, inputs)

    # lR = lT takes the extrapolation away: the advantage is that of lambda 1
    settings = {"max_grad_norm": 1e9}
    assert run(tmp_path, Replaced, **settings)[1] == pytest.approx(run(tmp_path, lambda_high=1.0, **settings)[1], 1e-5)
    assert run(tmp_path, **settings)[1] != pytest.approx(run(tmp_path, Replaced, **settings)[1], 1e-3)


def test_anchor_loss(tmp_path: Path) -> None:
    class Doubled(SGOPDTrainer):
        def anchor_loss(self, anchor_logps: Tensor, batch: Any, total: float) -> Tensor:
            assert anchor_logps.shape == batch.completion_ids.shape
            assert total == float(batch.completion_mask.sum())
            return 2 * super().anchor_loss(anchor_logps, batch, total)

    settings = ANCHOR | {"teacher_sampling_enable": True, "teacher_sampling_filter_correct": False}
    single, double = (logged(run(tmp_path, kind, **settings)[0], "anchor/loss")[0] for kind in (SGOPDTrainer, Doubled))
    assert single > 0
    assert double == pytest.approx(2 * single, rel=1e-6)
