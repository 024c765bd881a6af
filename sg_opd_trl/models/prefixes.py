"""Prompts that begin alike: what rows of a forward need compute only once, and an order that keeps such rows together.

What a causal model makes of a token depends on the tokens before it. The rollouts of a group have one prompt, and the
prompts of a task often one instruction, so that rows which are packed can share those tokens.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from typing import NamedTuple

#: Share of a batch's tokens that must be saved for rows to be packed or ordered otherwise.
WORTHWHILE = 0.05


class Prefixes(NamedTuple):
    """What each row of a forward has in common with another one.

    Attributes:
        order: the rows, each behind the one whose tokens it shares: its neighbour.
        lengths: of every row, by its number, the first tokens that it shares with its neighbour.
    """

    order: list[int]
    lengths: list[int]


def shared_prefixes(prompts: Sequence[list[int]]) -> Prefixes:
    """The longest beginnings that prompts have in common.

    A row keeps the last token of its prompt to itself: it predicts the first of the row's own completion.

    Args:
        prompts: token ids of each row's prompt.
    """
    # Sorted, a prompt has nothing in common with any earlier one that it has not with its neighbour.
    order = sorted(range(len(prompts)), key=lambda row: prompts[row])
    lengths = [0] * len(prompts)
    for before, row in pairwise(order):
        lengths[row] = max(0, min(_in_common(prompts[before], prompts[row]), len(prompts[row]) - 1))
    return Prefixes(order, lengths)


def _in_common(one: list[int], other: list[int]) -> int:
    if one == other:  # most are
        return len(one)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def rows_by_prompt(prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]] | None:
    """Rows in groups of one prompt, the longest first in and among them; None where that saves next to nothing.

    Args:
        prompts: token ids of each row's prompt.
        lengths: tokens of each row.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in sorted(range(len(prompts)), key=lambda row: -lengths[row]):
        groups.setdefault(tuple(prompts[row]), []).append(row)
    saved = sum((len(rows) - 1) * max(0, len(prompt) - 1) for prompt, rows in groups.items())
    return list(groups.values()) if saved >= WORTHWHILE * sum(lengths) and saved > 0 else None


def plan_by_prompt(
    prompts: Sequence[list[int]], lengths: Sequence[int], max_tokens: int
) -> Iterator[list[int]] | None:
    """Batches of rows within a budget, groups whole where they fit; None where that saves next to nothing.

    Shared tokens count in every row: attention sees them there. So no batch needs more memory than one of the same
    rows that share nothing.

    Args:
        prompts: token ids of each row's prompt.
        lengths: tokens of each row.
        max_tokens: of a batch; a longer row is a batch of its own.
    """
    groups = rows_by_prompt(prompts, lengths)
    return None if groups is None else _filled(groups, lengths, max_tokens)


def _filled(groups: list[list[int]], lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    room = max_tokens
    for group in groups:
        whole = sum(lengths[row] for row in group)
        if batch and whole > room:
            yield batch
            batch, room = [], max_tokens
        for row in group:
            if batch and lengths[row] > room:
                yield batch
                batch, room = [], max_tokens
            batch.append(row)
            room -= lengths[row]
    if batch:
        yield batch
