"""`full_logits` keeps the hidden states of teacher and reference for one micro-batch, and trains as if it kept all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import StepRecorder, inject_rollouts, logged, relative_difference, tiny_data, tiny_model, tiny_trainer

from sg_opd_trl.objectives import FullLogits
from sg_opd_trl.teachers.local import ModelScorer

#: Four micro-batches of two rows to a generation batch of two optimizer steps, each of them used twice.
SETTINGS: dict[str, Any] = {
    "distillation_mode": "full_logits", "per_device_train_batch_size": 2, "num_generations": 4,
    "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 4,
    "teacher_sampling_enable": False, "optim": "sgd", "learning_rate": 0.05, "stability_tau": 0.3,
}  # fmt: skip
CASES: dict[str, dict] = {
    "plain": {},
    "weights of the batch": {"stability_norm": "batch"},
    "verified rollouts": {
        "teacher_sampling_enable": True, "teacher_sampling_ratio": 0.5,
        "teacher_sampling_phase1_end_frac": 1.0, "teacher_sampling_phase2_end_frac": 1.0,
    },
}  # fmt: skip


def write(prompt: list[int], row: int) -> list[int]:
    """Rows of many lengths, so that a micro-batch is narrower than the generation batch."""
    return [6 + (sum(prompt) + row * k) % 19 for k in range(row % 4 + 1)] + [1]


def run(folder: Path, case: str) -> tuple[Any, StepRecorder]:
    recorder = StepRecorder()
    data = tiny_data().add_column("teacher_id", ["even", "odd"] * 8)
    rows = data.to_list()
    for place in (0, 3, 5):
        question = rows[place]["prompt"][0]["content"]
        rows[place]["teacher_prompt"] = [{"role": "user", "content": f"ba{question}"}]
    trainer = tiny_trainer(
        folder,
        settings=SETTINGS | CASES[case],
        train_dataset=type(data).from_list([{"teacher_prompt": None} | row for row in rows]),
        teacher_model={"even": tiny_model(1), "odd": tiny_model(3, hidden_size=64)},
        reference_model=tiny_model(2),
        callbacks=[recorder],
    )
    inject_rollouts(trainer, write)
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name != "plain")) for name in CASES])
def test_it_trains_as_if_all_were_kept(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, streamed = run(tmp_path / "streamed", case)
    monkeypatch.setattr(FullLogits, "momentary", ())
    kept, whole = run(tmp_path / "whole", case)
    assert len(streamed.steps) == SETTINGS["max_steps"]
    for left, right in zip(streamed.steps, whole.steps, strict=True):
        assert relative_difference(left, right) < 1e-5
    names = {name for entry in kept.state.log_history for name in entry}
    names = {name for name in names if name.startswith(("gate/", "teacher/kl", "teacher/matching", "anchor/"))}
    assert {"teacher/matching_loss", "gate/consensus"} <= names
    for name in names:
        assert logged(ours, name) == pytest.approx(logged(kept, name), rel=1e-4, abs=1e-6, nan_ok=True), name


def test_no_more_than_a_micro_batch_is_asked_about_and_nothing_large_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    score_hidden = ModelScorer.score_hidden

    def recorded(self: Any, batch: Any, *rest: Any) -> Any:
        asked.append(tuple(batch.completion_ids.shape))
        return score_hidden(self, batch, *rest)

    monkeypatch.setattr(ModelScorer, "score_hidden", recorded)
    trainer, _ = run(tmp_path, "weights of the batch")
    assert {rows for rows, _ in asked} == {2}
    assert len({width for _, width in asked}) > 1, "every micro-batch was padded to the longest row"
    for part in trainer._buffered_inputs:
        assert not [name for name, x in part.items() if isinstance(x, torch.Tensor) and x.dim() > 2]
    assert not [name for part in trainer.skipped._batches for name in part if "hidden" in name]


def test_a_look_before_the_first_step_has_scores_and_leaves_the_rows_of_the_run(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=SETTINGS, reference_model=tiny_model(2))
    trainer._examples = before = [{"prompt": "1+1="}]
    rollouts = trainer.rollouts_aside([trainer.train_dataset[0]] * 4)
    assert rollouts["teacher_logps"].shape == rollouts["completion_ids"].shape
    assert bool((rollouts["teacher_logps"] * rollouts["completion_mask"] <= 0).all())
    assert bool((rollouts["teacher_logps"][rollouts["completion_mask"] != 0] < 0).all())
    assert trainer._examples is before
