"""Steps of a baseline have the prompts that SG-OPD's have."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tiny import inject_rollouts, tiny_data, tiny_trainer

from sg_opd_trl.baselines.order import fill_steps, plan_steps, prompt_batches
from sg_opd_trl.errors import DataError, SGOPDConfigError


def arguments(**changes: Any) -> SimpleNamespace:
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "world_size": 1,
        "max_steps": 3,
        "num_train_epochs": 1.0,
        "shuffle_dataset": True,
        "seed": 0,
    }
    return SimpleNamespace(**(settings | changes))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_prompts_are_those_of_a_run_of_sg_opd(tmp_path: Path, shuffle: bool, accumulation: int) -> None:
    """Over more than two epochs of 7 rows, the last rows of each dropped."""
    rows = tiny_data(7)
    settings = {
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "num_generations": 2,
        "max_steps": 8,
        "teacher_sampling_enable": False,
        "lambda_high": 1.0,
        "shuffle_dataset": shuffle,
        "seed": 5,
    }
    trainer = tiny_trainer(tmp_path, settings=settings, train_dataset=rows)
    visited: list[tuple[int, ...]] = []

    def write(prompt: list[int], row: int) -> list[int]:
        visited.append(tuple(prompt))
        return [7, 8, 1]

    inject_rollouts(trainer, write)
    trainer.train()
    ids = trainer.tokenize_prompts(list(rows["prompt"]))
    same = {name: settings[name] for name in ("gradient_accumulation_steps", "per_device_train_batch_size", "seed")}
    plan = plan_steps(arguments(max_steps=8, shuffle_dataset=shuffle, **same), rows, group=2)
    assert visited == [tuple(ids[row]) for step in plan.steps for row in step for _ in range(2)]
    assert plan.rows_per_step == 4


def test_epochs_become_steps() -> None:
    rows = Dataset.from_dict({"prompt": list("abcdefg")})
    # 2 prompts a step: 3 whole steps in an epoch of 7 rows, 7.5 in two and a half
    assert len(plan_steps(arguments(max_steps=-1, num_train_epochs=2.5), rows, group=2).steps) == 8


def test_one_group_more_prompts_in_the_same_order() -> None:
    pairs = [row for batch in islice(prompt_batches(8, 2, shuffle=True, seed=3), 4) for row in batch]
    fours = [row for batch in islice(prompt_batches(8, 4, shuffle=True, seed=3), 2) for row in batch]
    assert pairs == fours


def test_what_cannot_be_planned_is_refused() -> None:
    rows = Dataset.from_dict({"prompt": list("abc")})
    with pytest.raises(SGOPDConfigError, match=r"`num_generations` must divide.*3 and 4"):
        plan_steps(arguments(), rows, group=3)
    with pytest.raises(DataError, match="at least 4 rows, got 3"):
        plan_steps(arguments(), rows, group=1)
    with pytest.raises(DataError, match="`dataset_streaming`"):
        plan_steps(arguments(), rows.to_iterable_dataset(), group=1)


def test_rejected_rollouts_are_replaced_inside_their_step() -> None:
    steps = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert fill_steps(steps, [True] * 8) == steps
    assert fill_steps(steps, [False, True, False, True, *[True] * 4]) == [[1, 3, 1, 3], [4, 5, 6, 7]]


def test_a_step_without_any_repeats_a_neighbour() -> None:
    steps = [[0, 1], [2, 3], [4, 5]]
    assert fill_steps(steps, [False, False, True, True, False, False]) == [[2, 3], [2, 3], [2, 3]]
    with pytest.raises(DataError, match="got none of 6"):
        fill_steps(steps, [False] * 6)
