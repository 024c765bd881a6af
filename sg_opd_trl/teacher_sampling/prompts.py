"""Which prompts the teacher gets at which step, and which rank and micro-batch takes its rollouts.

Pure functions of seed, step and sizes: nothing has to be remembered to resume, and every rank finds the same answer.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence, Sized
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..random_state import mixed_seed

if TYPE_CHECKING:
    from ..run import SGOPDConfig

# The second part of every seed made from the run's: prompts and rollouts must not share random numbers. Changing one
# changes what a resumed run draws. 4 is the baselines'.
STREAM_SEED, STUDENT_PROMPTS_SEED, ROLLOUTS_SEED, PRECOMPUTE_SEED = 1, 2, 3, 5


class PromptSource(Protocol):
    """What decides which teacher prompts a step has; all of it is known before the run.

    Attributes:
        args: the configuration.
        state: `max_steps` are the steps of the run.
        train_dataset: rows with a `prompt`.
    """

    args: "SGOPDConfig"
    state: Any
    train_dataset: Any

    @property
    def processes(self) -> int:
        """That train, each on its own part of a step."""


class PromptStream:
    """Endless seeded permutations of the training set, one after the other.

    Args:
        num_rows: rows of the training set.
        seed: of the permutations.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed

    def rows(self, step: int, count: int) -> list[int]:
        """The rows of a 1-based step that draws `count` of them, the same on every rank."""
        return self.between((step - 1) * count, step * count)

    def between(self, first: int, last: int) -> list[int]:
        """The rows at positions `first` up to `last`, not included, of the endless stream."""
        permutations: dict[int, list[int]] = {}
        chosen = []
        for position in range(first, last):
            epoch, offset = divmod(position, self.num_rows)
            if epoch not in permutations:
                generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
                permutations[epoch] = torch.randperm(self.num_rows, generator=generator).tolist()
            chosen.append(permutations[epoch][offset])
        return chosen


def prompt_stream(source: PromptSource) -> PromptStream:
    """The run's permutations of its training set, from which reserved teacher prompts are drawn."""
    return PromptStream(len(source.train_dataset), mixed_seed(source.args.seed, STREAM_SEED))


def teacher_prompts_per_step(ratio: float, student_prompts: float) -> int:
    """Number of teacher prompts that makes them the fraction `ratio` of all prompts; at least 1."""
    return max(1, round(ratio / (1 - ratio) * student_prompts))


def micro_batches_of(source: PromptSource, step: int) -> int:
    """Micro-batches of a 1-based optimizer step on each rank; the last step of an epoch may have fewer than others."""
    args, steps = source.args, _steps_per_epoch(source)
    if steps is None or step % steps:
        return args.gradient_accumulation_steps
    return _micro_batches_per_epoch(source) - (steps - 1) * args.gradient_accumulation_steps


def teacher_prompts_of(source: PromptSource, step: int) -> int:
    """Teacher prompts of a 1-based step: fewer in one that is shorter."""
    return _teacher_prompts(source, micro_batches_of(source, step))


def teacher_prompts_before(source: PromptSource, step: int) -> int:
    """Teacher prompts of all steps before a 1-based one, where its own begin in the run's stream.

    Counted by epochs and not as `(step - 1)` times the step's own number: after a shorter step that would be a place
    that an earlier step has used.
    """
    whole = _teacher_prompts(source, source.args.gradient_accumulation_steps)
    steps = _steps_per_epoch(source)
    if steps is None:
        return whole * (step - 1)
    epochs, inside = divmod(step - 1, steps)
    return epochs * ((steps - 1) * whole + teacher_prompts_of(source, steps)) + inside * whole


def _teacher_prompts(source: PromptSource, micro_batches: int) -> int:
    args: Any = source.args  # TRL declares as optional what it always fills in
    rows = args.per_device_train_batch_size * micro_batches * source.processes
    return teacher_prompts_per_step(args.teacher_sampling_ratio, rows / args.num_generations)


def _steps_per_epoch(source: PromptSource) -> int | None:
    """Optimizer steps of an epoch; None for a stream, whose end is not known and whose prompts are not numbered."""
    if not isinstance(source.train_dataset, Sized):
        return None
    return max(1, math.ceil(_micro_batches_per_epoch(source) / source.args.gradient_accumulation_steps))


def _micro_batches_per_epoch(source: PromptSource) -> int:
    """Of each rank: whole generation batches alone, each used `num_iterations` times; TRL's sampler drops the rest."""
    args: Any = source.args
    rows = args.per_device_train_batch_size * args.steps_per_generation * source.processes
    generation_batches = len(source.train_dataset) // max(1, rows // args.num_generations)
    return generation_batches * args.steps_per_generation * args.num_iterations


def assign_slots(slots: int, world_size: int, micro_batches: int, rank: int, together: int = 1) -> list[list[int]]:
    """One rank's share of a step's rollouts, by micro-batch.

    Slots go round the ranks first and then round the micro-batches, so that neither is longer than another by more
    than one.

    Args:
        slots: rollouts of the step over all ranks; a slot is the number of one of them.
        world_size: number of ranks.
        micro_batches: of the step on each rank.
        rank: whose share.
        together: runs of so many slots stay on one rank and in one micro-batch.
    """
    assigned: list[list[int]] = [[] for _ in range(micro_batches)]
    for slot in range(slots):
        turn, owner = divmod(slot // together, world_size)
        if owner == rank:
            assigned[turn % micro_batches].append(slot)
    return assigned


# --- sample indices --------------------------------------------------------------------------------------------------
# A stored rollout is found by its prompt and a sample index: no two rollouts of one prompt in a run may have the same.
# The upper 32 bits tell equal prompts of one permutation or step apart, the lower ones their visits.


def stream_samples(
    stream: PromptStream, first: int, slots: Sequence[int], each: int, repeats: Sequence[int]
) -> list[int]:
    """Sample index of rollouts of a stream's prompts: a row has `each` of them in every permutation.

    It depends neither on the batch size nor on the number of processes, so that runs of a sweep share rollouts.

    Args:
        stream: of the run.
        first: position of the step's first prompt in it.
        slots: of the rollouts in the step, those of one prompt in a row.
        each: rollouts per prompt.
        repeats: `occurrences` of the training set's prompts.
    """
    rows = stream.between(first, first + max(slots, default=-1) // each + 1)
    return [
        (repeats[rows[slot // each]] << 32) + (first + slot // each) // stream.num_rows * each + slot % each
        for slot in slots
    ]


def step_samples(prompts: Sequence[Hashable], step: int) -> list[int]:
    """Sample index of rollouts whose prompts were chosen in any other way: those of another step are others.

    Args:
        prompts: of each rollout of this rank.
        step: 1-based optimizer step.
    """
    return [(repeat << 32) + step - 1 for repeat in occurrences(prompts)]


def occurrences(items: Iterable[Hashable]) -> list[int]:
    """Of each item, how often it came before."""
    seen: Counter = Counter()
    counts = []
    for item in items:
        counts.append(seen[item])
        seen[item] += 1
    return counts
