"""Which rows of an evaluation set each rank takes, so that no prompt is counted twice."""

import logging
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch.utils.data import Sampler

logger = logging.getLogger(__name__)


class EvenShares:
    """The batches of one of several ranks, as many on each and of like size.

    accelerate deals out batches in turn, and fills the last ones up with the first rows again. Here the ranks share
    the rows of the last global batch, whose groups may lie on several of them, as in every other one.

    Args:
        rows: in order, those of a group in a row.
        batch_size: rows of a rank in a batch.
        group_size: rows of a prompt.
        rank: whose batches these are.
        ranks: number of all of them.
    """

    def __init__(self, rows: Sampler[int], *, batch_size: int, group_size: int, rank: int, ranks: int) -> None:
        self.rows, self.batch_size, self.group_size = rows, batch_size, group_size
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return math.ceil((self._size + self._missing) / (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        missing = self._missing
        if missing:
            _warn_of_filling_up(self._size // self.group_size, missing // self.group_size, self.ranks)
        rows = list(self.rows)
        rows += [rows[i % len(rows)] for i in range(missing)]
        for start in range(0, len(rows), self.batch_size * self.ranks):
            batch = rows[start : start + self.batch_size * self.ranks]
            size = len(batch) // self.ranks
            yield batch[self.rank * size : (self.rank + 1) * size]

    @property
    def _size(self) -> int:
        rows: Any = self.rows
        return len(rows)

    @property
    def _missing(self) -> int:
        """Rows up to whole groups, and as many on every rank."""
        return -self._size % math.lcm(self.group_size, self.ranks)


@cache  # once
def _warn_of_filling_up(prompts: int, twice: int, ranks: int) -> None:
    logger.warning(
        "The evaluation set has %d prompts, whose rows %d processes cannot share evenly: the first %d are counted "
        "twice. Use more or fewer prompts, or other `num_generations_eval`.",
        prompts,
        ranks,
        twice,
    )
