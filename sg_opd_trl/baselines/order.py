"""Which prompts each optimizer step of a baseline has: those that `SGOPDTrainer` has in it at the same seed.

With a group of 1, as SeqKD has it, a step takes more of them, in the same order.
"""

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ..data import is_stream
from ..errors import DataError, SGOPDConfigError


@dataclass(frozen=True)
class StepPlan:
    """Rows of the training set by optimizer step.

    Attributes:
        steps: numbers of the training rows of each step, one per prompt.
        rows_per_step: sequences of one step over all processes.
    """

    steps: list[list[int]]
    rows_per_step: int


def plan_steps(args: Any, dataset: Any, group: int) -> StepPlan:
    """Plan a run.

    Args:
        args: training arguments with batch sizes, `max_steps` or `num_train_epochs`, `shuffle_dataset` and `seed`.
        dataset: training rows.
        group: sequences of one prompt in a step.

    Returns:
        One entry per optimizer step.

    Raises:
        DataError: a stream, or fewer rows than a step has prompts.
        SGOPDConfigError: a step that does not hold whole groups.
    """
    if is_stream(dataset):
        raise DataError(
            "`dataset_streaming` must be off for this method, got an iterable data set. Its prompts are drawn by "
            "number. Load the data set without streaming."
        )
    rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if rows_per_step % group:
        raise SGOPDConfigError(
            f"`num_generations` must divide the rows of a step, got {group} and {rows_per_step} "
            "(per_device_train_batch_size x gradient_accumulation_steps x processes). A prompt's rollouts belong to "
            "one step. Change one of them."
        )
    prompts = rows_per_step // group
    if len(dataset) < prompts:
        raise DataError(
            f"`train_dataset` must have at least {prompts} rows, got {len(dataset)}. A step takes that many prompts. "
            "Lower `per_device_train_batch_size` or add rows."
        )
    # transformers' rule, with steps that drop the rest of an epoch.
    epoch = len(dataset) // prompts
    count = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    order = prompt_batches(len(dataset), prompts, shuffle=args.shuffle_dataset, seed=args.seed)
    return StepPlan(list(islice(order, count)), rows_per_step)


def prompt_batches(num_rows: int, prompts: int, *, shuffle: bool, seed: int) -> Any:
    """Endless batches of row numbers in the order of `GRPOTrainer`: one permutation per epoch, its rest dropped."""
    # As TRL's `RepeatSampler` does it, from the same seed: one generator for all epochs, a rest of rows dropped.
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_rows, generator=generator).tolist() if shuffle else list(range(num_rows))
        for start in range(0, num_rows - prompts + 1, prompts):
            yield order[start : start + prompts]


def fill_steps(steps: list[list[int]], kept: list[bool]) -> list[list[int]]:
    """Replace what is not kept by repeats of what is, inside each step, so that steps keep their number of rows.

    A step without anything kept repeats the last step before it that has something, or else the first after it.

    Args:
        steps: numbers of the rollouts of each step.
        kept: by number of the rollout.

    Raises:
        DataError: nothing is kept at all.
    """
    if not any(kept[number] for step in steps for number in step):
        raise DataError(
            "At least one teacher rollout must be judged right, got none of "
            f"{sum(map(len, steps))}. There is nothing to train on. Check that the verifier reads the teacher's "
            "answers and `max_completion_length`, or set `teacher_sampling_filter_correct: false`."
        )
    chosen = [[number for number in step if kept[number]] for step in steps]
    last = next(step for step in chosen if step)
    filled = []
    for step, wanted in zip(chosen, steps, strict=True):
        last = step or last
        filled.append([last[i % len(last)] for i in range(len(wanted))])
    return filled
