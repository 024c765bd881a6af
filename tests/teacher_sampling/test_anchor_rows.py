"""The teacher's rows in the student's forward: which of them count, and that they change nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ANCHOR, GradientRecorder, inject_rollouts, inject_teacher_rollouts, logged, tiny_trainer

from sg_opd_trl import SGOPDTrainer, TeacherAnchorCallback, core

SMALL = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 3, "lambda_high": 1.0}


def run_with_teacher_rollouts(folder: Path, settings: dict, verifier: Any) -> tuple[Any, dict]:
    recorder = GradientRecorder()
    settings = SMALL | ANCHOR | {"max_steps": 1, "max_grad_norm": 1e9, "teacher_sampling_ratio": 0.6} | settings
    trainer = tiny_trainer(folder, settings=settings, callbacks=[recorder], reward_funcs=verifier)
    inject_rollouts(trainer, lambda prompt, row: [5 + row, 7, 1])
    inject_teacher_rollouts(trainer, lambda prompt: [6 + len(prompt) % 2, 8, 9][: len(prompt)])
    trainer.train()
    return trainer, recorder.steps[0]


def test_only_verified_rollouts_are_kept_unless_the_filter_is_off(tmp_path: Path) -> None:
    def verifier(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if ids == [6, 8, 9] else float(ids[0] % 2) for ids in completion_ids]

    kept, _ = run_with_teacher_rollouts(tmp_path, {}, verifier)
    every, _ = run_with_teacher_rollouts(tmp_path, {"teacher_sampling_filter_correct": False}, verifier)
    none, gradient = run_with_teacher_rollouts(tmp_path, {}, lambda completion_ids, **_: [0.0] * len(completion_ids))
    # 2 student prompts at rho 0.6: round(1.5 * 2) = 3 teacher prompts
    assert logged(kept, "anchor/rollouts") == logged(every, "anchor/rollouts") == [3.0]
    assert 0 < logged(kept, "anchor/verified_share")[0] < 1
    assert logged(kept, "anchor/verified_share") == logged(every, "anchor/verified_share")
    assert logged(kept, "anchor/loss") != logged(every, "anchor/loss")
    assert logged(none, "anchor/kept") == [0.0]
    assert logged(none, "anchor/loss") == [], "0 would read as a perfect fit"
    assert logged(none, "anchor/verified_share") == [0.0]
    assert all(torch.isfinite(value).all() for value in gradient.values())


def test_filtered_and_zero_weighted_rows_are_the_same_update(tmp_path: Path) -> None:
    """Equal to a run whose `anchor_loss` gets all rows with the unverified ones weighted 0, up to the row layout."""

    class Everything(TeacherAnchorCallback):
        def keep(self, args: Any, verdict: float | None) -> bool:
            return True

    def verifier(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(ids[0] % 2) for ids in completion_ids]

    class ZeroWeighted(SGOPDTrainer):
        def anchor_loss(self, anchor_logps: Any, batch: Any, total: float) -> Any:
            mask, kept = batch.completion_mask, batch.completion_ids[:, 0] % 2 == 1
            weights = core.anchor_token_weights(anchor_logps, mask, "chord")
            return core.anchor_cross_entropy(
                anchor_logps, mask, kept, weights, reduction="token_mean", total=float(mask[kept].sum())
            )

    _, filtered = run_with_teacher_rollouts(tmp_path, {}, verifier)
    recorder = GradientRecorder()
    settings = SMALL | ANCHOR | {"max_steps": 1, "max_grad_norm": 1e9, "teacher_sampling_ratio": 0.6}
    trainer = tiny_trainer(
        tmp_path,
        settings=settings,
        callbacks=[recorder, Everything()],
        reward_funcs=verifier,
        trainer_class=ZeroWeighted,
    )
    inject_rollouts(trainer, lambda prompt, row: [5 + row, 7, 1])
    inject_teacher_rollouts(trainer, lambda prompt: [6 + len(prompt) % 2, 8, 9][: len(prompt)])
    trainer.train()
    for name, value in recorder.steps[0].items():
        torch.testing.assert_close(value, filtered[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [1, 9])
def test_anchor_rows_leave_the_students_rows_as_they_are(tmp_path: Path, length: int) -> None:
    """Shorter or longer than the student's, in one forward with them: without its loss nothing is left of it."""

    class Without(SGOPDTrainer):
        def anchor_loss(self, anchor_logps: Any, *arguments: Any) -> Any:
            assert anchor_logps.shape[1] == length
            return 0.0 * super().anchor_loss(anchor_logps, *arguments)

    def gradient(enabled: bool) -> dict:
        recorder = GradientRecorder()
        settings = ANCHOR | {"max_steps": 1, "teacher_sampling_enable": enabled, "teacher_sampling_ratio": 0.5}
        trainer = tiny_trainer(
            tmp_path, settings=settings, trainer_class=Without, callbacks=[recorder], reward_funcs=parity
        )
        inject_rollouts(trainer, lambda prompt, row: [5 + row, 7, 9][: 1 + row % 3])
        inject_teacher_rollouts(trainer, lambda prompt: [6] * length)
        trainer.train()
        return recorder.steps[0]

    def parity(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(ids[0] % 2 == 0) for ids in completion_ids]

    with_rows, without = gradient(True), gradient(False)
    for name, value in without.items():
        torch.testing.assert_close(with_rows[name], value, rtol=1e-4, atol=1e-6)
