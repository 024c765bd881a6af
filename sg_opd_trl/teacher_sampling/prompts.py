"""Which prompts the teacher gets at which step, and which rank and micro-batch takes its rollouts.

Pure functions of seed, step and sizes: nothing has to be remembered to resume.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import torch

from ..random_state import mixed_seed


class PromptStream:
    """Endless seeded permutations of the training set, one after the other.

    Args:
        num_rows: rows of the training set.
        seed: of the run.
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


def teacher_prompts_per_step(ratio: float, student_prompts: float) -> int:
    """Number of teacher prompts that makes them the fraction `ratio` of all prompts; at least 1."""
    return max(1, round(ratio / (1 - ratio) * student_prompts))


def deal(slots: int, world_size: int, micro_batches: int, rank: int, together: int = 1) -> list[list[int]]:
    """Slots of one rank by micro-batch: dealt round-robin over ranks first, then over micro-batches.

    Runs of `together` slots stay on one rank and in one micro-batch.
    """
    dealt: list[list[int]] = [[] for _ in range(micro_batches)]
    for slot in range(slots):
        turn, owner = divmod(slot // together, world_size)
        if owner == rank:
            dealt[turn % micro_batches].append(slot)
    return dealt


def stream_samples(
    stream: PromptStream, first: int, slots: Sequence[int], each: int, repeats: Sequence[int]
) -> list[int]:
    """Sample index of rollouts of a stream's prompts: a row has `each` of them in every permutation.

    It depends neither on the batch size nor on the number of processes, and no two rollouts of a run that have the
    same prompt have the same.

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
