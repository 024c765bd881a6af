"""Phased teacher sampling in a run: the schedule, the prompts, the filter, and how to change or drop it."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny import (
    ANCHOR,
    inject_rollouts,
    inject_teacher_rollouts,
    logged,
    parity_verifier,
    tiny_data,
    tiny_trainer,
)

from sg_opd_trl import TeacherAnchorCallback
from sg_opd_trl.random_state import mixed_seed
from sg_opd_trl.teacher_sampling.prompts import PromptStream

SMALL = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 3, "lambda_high": 1.0}


def all_right(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [1.0] * len(completion_ids)


def teacher_prompts(trainer: Any) -> list[list[list[int]]]:
    """The teacher's prompts, one list per call, filled while the trainer runs."""
    seen: list[list[list[int]]] = []
    generate = trainer.teacher.generate

    def recording(prompts: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        seen.append(prompts)
        return generate(prompts, *args, **kwargs)

    trainer.teacher.generate = recording
    return seen


def student_prompts(trainer: Any) -> list[list[list[int]]]:
    """The student's prompts, one list per generation batch."""
    seen: list[list[list[int]]] = []
    generate = trainer._generate_single_turn

    def recording(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        seen.append(prompt_ids)
        return generate(prompt_ids, *args, **kwargs)

    trainer._generate_single_turn = recording
    return seen


@pytest.mark.parametrize(
    ("settings", "table"),
    [
        # The defaults over 20 steps: P1 = 6, P2 = 7, and the cosine ends at 0 in step 7.
        ({}, [0.2] * 6 + [0.0] * 14),
        # P1 = 4, P2 = 8: 0.02 + 0.09 (1 + cos(pi k / 4)) for k = 1..4, then off.
        (
            {
                "teacher_sampling_phase1_end_frac": 0.2,
                "teacher_sampling_phase2_end_frac": 0.4,
                "teacher_sft_alpha_end": 0.02,
            },
            [0.2] * 4 + [0.1736396, 0.11, 0.0463604, 0.02] + [0.0] * 12,
        ),
    ],
)
def test_alpha_follows_equation_3_and_the_teacher_stops_writing(
    tmp_path: Path, settings: dict, table: list[float]
) -> None:
    # What is right is kept: a step that keeps none has no `anchor/loss`.
    trainer = tiny_trainer(tmp_path, settings=SMALL | settings | {"max_steps": 20}, reward_funcs=all_right)
    inject_rollouts(trainer, lambda prompt, row: [5 + row])
    inject_teacher_rollouts(trainer, lambda prompt: [6])
    calls = teacher_prompts(trainer)
    trainer.train()
    assert logged(trainer, "anchor/alpha") == pytest.approx(table, abs=1e-6)
    active = sum(alpha > 0 for alpha in table)
    assert len(calls) == active
    assert len(logged(trainer, "anchor/rollouts")) == active
    assert len(logged(trainer, "anchor/loss")) == active


def test_reserved_prompts_are_a_permutation_of_their_own(tmp_path: Path) -> None:
    data = tiny_data(16)
    trainer = tiny_trainer(tmp_path, settings=SMALL | ANCHOR | {"max_steps": 4, "teacher_sampling_ratio": 0.5})
    calls = teacher_prompts(trainer)
    trainer.train()
    stream = PromptStream(16, mixed_seed(trainer.args.seed, 1))
    # Half of all prompts: as many as the student's 4 / 2.
    drawn = [row for step in range(1, 5) for row in stream.rows(step, 2)]
    assert len(set(drawn)) == 8
    assert [ids for call in calls for ids in call] == trainer.tokenize_prompts([data[row]["prompt"] for row in drawn])


@pytest.mark.parametrize("stream", [False, True])
def test_shared_prompts_are_the_students_of_the_same_step(tmp_path: Path, stream: bool) -> None:
    data = Dataset.from_list(tiny_data().to_list()) if stream else tiny_data()
    settings = SMALL | ANCHOR | {"teacher_sampling_prompts": "share", "teacher_sampling_ratio": 0.5, "max_steps": 3}
    trainer = tiny_trainer(tmp_path, settings=settings, train_dataset=data.to_iterable_dataset() if stream else data)
    teacher, student = teacher_prompts(trainer), student_prompts(trainer)
    trainer.train()
    assert len(teacher) == len(student) == 3
    for theirs, own in zip(teacher, student, strict=True):
        assert sorted(theirs) == sorted(map(list, {tuple(ids) for ids in own}))


@pytest.mark.parametrize("prompts", ["reserve", "share"])
def test_several_teacher_rollouts_are_of_one_prompt(tmp_path: Path, prompts: str) -> None:
    settings = SMALL | ANCHOR | {"teacher_num_generations": 2, "teacher_sampling_prompts": prompts, "max_steps": 2}
    trainer = tiny_trainer(tmp_path, settings=settings)
    calls = teacher_prompts(trainer)
    trainer.train()
    assert [len(call) for call in calls] == [2, 2]
    assert all(first == second for first, second in calls)
    assert logged(trainer, "anchor/rollouts") == [2.0, 2.0]


def test_shared_prompts_with_several_slices_per_generation(tmp_path: Path) -> None:
    """Four optimizer steps per generation batch: each step's teacher prompts are among its own slice's."""
    settings = ANCHOR | {"teacher_sampling_prompts": "share", "teacher_sampling_ratio": 0.5, "steps_per_generation": 4}
    trainer = tiny_trainer(tmp_path, settings=SMALL | settings | {"max_steps": 4})
    calls = teacher_prompts(trainer)
    slices: list[set[tuple[int, ...]]] = []
    on_micro_batch = trainer.on_micro_batch

    def recording(inputs: dict) -> dict:
        rows = zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
        slices.append({tuple(ids[mask == 1].tolist()) for ids, mask in rows})
        return on_micro_batch(inputs)

    trainer.on_micro_batch = recording
    trainer.train()
    assert len(calls) == len(slices) == 4
    assert all({tuple(ids) for ids in call} <= own for call, own in zip(calls, slices, strict=True))


def test_the_anchor_can_be_removed(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=SMALL | ANCHOR)
    calls = teacher_prompts(trainer)
    trainer.remove_callback(TeacherAnchorCallback)
    trainer.train()
    assert calls == []
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("anchor/")]
    assert len(logged(trainer, "gate/consensus")) == 2


@pytest.mark.parametrize("as_class", [True, False])
def test_a_subclass_takes_the_place_of_the_callback(tmp_path: Path, as_class: bool) -> None:
    class Steps(TeacherAnchorCallback):
        def alpha(self, args: Any, step: int, total_steps: int) -> float:
            return 0.5 if step == 2 else 0.0

    trainer = tiny_trainer(tmp_path, settings=SMALL | {"max_steps": 3}, callbacks=[Steps if as_class else Steps()])
    trainer.train()
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, TeacherAnchorCallback)]
    assert [type(callback) for callback in found] == [Steps]
    assert logged(trainer, "anchor/alpha") == [0.0, 0.5, 0.0]
    assert found[0].rollouts == 1


def test_teacher_rollouts_leave_the_students_random_state_alone(tmp_path: Path) -> None:
    """With a learning rate of 0 the student's rollouts are the same over the whole run, teacher sampling or not."""

    def rollouts(enabled: bool) -> list[list[list[int]]]:
        seen: list[list[list[int]]] = []

        def verifier(completion_ids: list[list[int]], **_: Any) -> list[float]:
            if len(completion_ids) == 8:
                seen.append(completion_ids)
            return parity_verifier([], completion_ids)

        settings = ANCHOR | {"teacher_sampling_enable": enabled, "learning_rate": 0.0}
        trainer = tiny_trainer(tmp_path, settings=settings, reward_funcs=verifier)
        calls = teacher_prompts(trainer)
        trainer.train()
        assert bool(calls) is enabled
        return seen

    with_teacher, without = rollouts(True), rollouts(False)
    assert len(without) == 2
    assert without[0] != without[1]
    assert with_teacher == without


def test_teacher_rollouts_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    class OnePrompt(TeacherAnchorCallback):
        def reserved_examples(self, trainer: Any, step: int, prompts: int) -> list[dict]:
            return [trainer.train_dataset[0]] * prompts

    def teacher_rollouts(seed: int) -> list[list[int]]:
        rollouts: list[list[int]] = []

        def verifier(completion_ids: list[list[int]], **_: Any) -> list[float]:
            if len(completion_ids) == 1:
                rollouts.extend(completion_ids)
            return parity_verifier([], completion_ids)

        settings = ANCHOR | {"seed": seed, "teacher_max_completion_length": 12}
        tiny_trainer(tmp_path, settings=settings, reward_funcs=verifier, callbacks=[OnePrompt()]).train()
        return rollouts

    first, second = teacher_rollouts(1)
    assert first != second
    assert teacher_rollouts(1) == [first, second]
    assert not {tuple(ids) for ids in teacher_rollouts(2)} & {tuple(first), tuple(second)}


def test_teacher_rollouts_stay_out_of_the_students_logs(tmp_path: Path) -> None:
    def verifier(completion_ids: list[list[int]], log_metric: Any, **_: Any) -> list[float]:
        log_metric("rows", float(len(completion_ids)))
        return all_right(completion_ids)

    trainer = tiny_trainer(tmp_path, settings=ANCHOR, reward_funcs=verifier)
    trainer.train()
    assert logged(trainer, "rows") == [8.0, 8.0]
    assert logged(trainer, "anchor/verified_share") == [1.0, 1.0]
