"""The last optimizer step of an epoch may be shorter: teacher prompts go on from where the stream stands."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import ANCHOR, logged, save_pair, tiny_data, tiny_trainer

from sg_opd_trl import TeacherAnchorCallback
from sg_opd_trl.teacher_sampling.prompts import micro_batches_of, teacher_prompts_before, teacher_prompts_of
from sg_opd_trl.teacher_sampling.stored.precompute import planned_rollouts

# 10 prompts, 2 in a generation batch of 2 micro-batches: 10 micro-batches an epoch, steps of 4, 4 and 2. A whole step
# has 4 student and 4 teacher prompts, the last one 2 and 2.
SHORT: dict[str, Any] = ANCHOR | {
    "max_steps": -1,
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 4,
    "steps_per_generation": 2,
    "per_device_train_batch_size": 4,
    "teacher_sampling_ratio": 0.5,
    "max_completion_length": 3,
}
ROWS = 10
RANGES = {1: (0, 4), 2: (4, 8), 3: (8, 10), 4: (10, 14), 5: (14, 18), 6: (18, 20)}


class Recording(TeacherAnchorCallback):
    """Keeps the prompts that the teacher is given, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: dict[int, tuple[int, int]] = {}
        self.prompts: dict[int, list[str]] = {}

    def plan_step(self, run: Any, step: int) -> Any:
        plan = super().plan_step(run, step)
        self.ranges[step] = self.prompt_range(run, step)
        self.prompts[step] = sorted(repr(example["prompt"]) for example in plan.examples)
        assert len(plan.slots) == run.current_gradient_accumulation_steps
        return plan


def run(folder: Path, settings: dict, resume: str | None = None, **arguments: Any) -> tuple[Any, Recording]:
    callback = Recording()
    trainer = tiny_trainer(
        folder, settings=SHORT | settings, train_dataset=tiny_data(ROWS), callbacks=[callback], **arguments
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def test_every_position_is_used_once_and_so_is_every_stored_rollout(tmp_path: Path) -> None:
    teacher = save_pair(tmp_path / "teacher", 1)
    settings = {"teacher_rollouts_path": str(tmp_path / "cache")}
    trainer, callback = run(tmp_path / "run", settings, teacher_model=teacher, teacher_processing_class=None)
    assert callback.ranges == RANGES
    # An epoch of the student's is a permutation of the teacher's here: each prompt once in it.
    for epoch in ([1, 2, 3], [4, 5, 6]):
        drawn = sorted(prompt for step in epoch for prompt in callback.prompts[step])
        assert drawn == sorted(repr(prompt) for prompt in tiny_data(ROWS)["prompt"])
    assert logged(trainer, "anchor/cache_hits") == [0] * 6
    # What is written before the run is what it asks for.
    planned = planned_rollouts(trainer)
    assert len(planned) == len(set(planned)) == 20
    assert sorted(row for row, _ in planned) == sorted(2 * list(range(ROWS)))
    again, _ = run(tmp_path / "again", settings, teacher_model=teacher, teacher_processing_class=None)
    assert logged(again, "anchor/cache_hits") == logged(again, "anchor/rollouts")


@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_draws_what_an_undisturbed_one_draws(tmp_path: Path, stop: int) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole, expected = run(tmp_path, settings)
    checkpoint = str(tmp_path / f"checkpoint-{stop}")
    resumed, callback = run(tmp_path, settings, resume=checkpoint)
    assert callback.prompts == {step: expected.prompts[step] for step in range(stop + 1, 7)}
    for name in ("loss", "anchor/loss", "anchor/tokens", "grad_norm"):
        assert logged(resumed, name) == logged(whole, name)


def test_time_separated_positions_do_not_overlap_either(tmp_path: Path) -> None:
    settings = {
        "teacher_sampling_time_separated": True,
        "teacher_sampling_phase1_end_frac": 0.5,
        "teacher_sampling_phase2_end_frac": 1.0,
    }
    _, callback = run(tmp_path, settings)
    # 3 of 6 steps take what SG-OPD draws over 5 or 6 (alpha of the last one may be 0) steps of 4.
    ranges = [callback.ranges[step] for step in (1, 2, 3)]
    assert [first for first, _ in ranges] == [0, *(end for _, end in ranges[:-1])]


@pytest.mark.parametrize(
    ("accumulation", "generation", "iterations", "rows"),
    [(4, 2, 1, 10), (4, 2, 1, 8), (3, 2, 1, 7), (4, 4, 2, 9), (2, 4, 1, 5), (8, 2, 1, 5), (3, 4, 2, 13), (1, 1, 1, 3)],
)
def test_the_steps_of_an_epoch_are_those_of_the_data_loader(
    tmp_path: Path, accumulation: int, generation: int, iterations: int, rows: int
) -> None:
    settings = SHORT | {
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": generation,
        "num_iterations": iterations,
    }
    trainer = tiny_trainer(tmp_path, settings=settings, train_dataset=tiny_data(rows))
    micro_batches = len(trainer.get_train_dataloader())
    steps = [accumulation] * (micro_batches // accumulation)
    steps += [micro_batches % accumulation] * (micro_batches % accumulation > 0)
    sizes = [micro_batches_of(trainer, step) for step in range(1, 2 * len(steps) + 1)]
    assert sizes == 2 * steps
    # One student prompt in a micro-batch, and a ratio of a half.
    assert [teacher_prompts_of(trainer, step) for step in range(1, len(sizes) + 1)] == sizes
    assert [teacher_prompts_before(trainer, step) for step in range(1, len(sizes) + 2)] == [
        sum(sizes[:step]) for step in range(len(sizes) + 1)
    ]


def test_more_processes_make_shorter_epochs() -> None:
    args = SimpleNamespace(
        per_device_train_batch_size=4,
        num_generations=4,
        steps_per_generation=2,
        num_iterations=1,
        gradient_accumulation_steps=4,
        teacher_sampling_ratio=0.5,
    )
    for processes, expected in ((1, [4, 4, 2, 4]), (2, [4, 4, 4, 4]), (3, [2, 2, 2, 2])):
        source: Any = SimpleNamespace(args=args, train_dataset=range(10), processes=processes)
        assert [micro_batches_of(source, step) for step in (1, 2, 3, 4)] == expected
