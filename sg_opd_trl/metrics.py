"""Metrics of one logging window: reduced over ranks as sums and counts, divided once when logged."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .core.diagnostics import TokenStatistics, combine, finalize


class TrainingMetrics:
    """Totals since the last log, for training and evaluation apart; all values are already reduced over ranks."""

    def __init__(self) -> None:
        self._tokens: dict[str, list[TokenStatistics]] = defaultdict(list)
        self._totals: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))

    def add_tokens(self, mode: str, statistics: TokenStatistics) -> None:
        """Add the statistics of a micro-batch; they are merged at once, so that the window does not grow."""
        self._tokens[mode] = [combine([*self._tokens[mode], statistics])]

    def add(self, mode: str, name: str, total: float, count: float = 1.0) -> None:
        """Add to one metric; its logged value is the sum of totals over the sum of counts."""
        entry = self._totals[mode][name]
        entry[0] += total
        entry[1] += count

    def set(self, mode: str, name: str, value: float) -> None:
        """Replace the value of one metric; its logged value is the last one."""
        self._totals[mode][name] = [value, 1.0]

    def drain(self, mode: str) -> dict[str, float]:
        """Values of the window by name; the totals start anew."""
        values = {name: total / count for name, (total, count) in self._totals.pop(mode, {}).items() if count}
        for statistics in self._tokens.pop(mode, []):
            values |= {name: float(value) for name, value in finalize(*statistics).items()}
        return values


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the wall time of the block to `seconds[part]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[part] += time.perf_counter() - start


def reduce_over_ranks(
    accelerator: Any, statistics: TokenStatistics, sums: Tensor
) -> tuple[TokenStatistics, list[float]]:
    """Reduce everything a micro-batch reports in one exchange and one wait for the device.

    Args:
        accelerator: of the trainer.
        statistics: of this rank.
        sums: `(n,)` further values that add up over ranks.

    Returns:
        The statistics of all ranks on the CPU, and the `n` sums.
    """
    totals, maxima = statistics
    packed = torch.cat([totals, maxima, sums.to(totals.dtype)]).unsqueeze(0)
    ranks = accelerator.gather(packed).cpu()
    end_of_totals, end_of_maxima = totals.numel(), totals.numel() + maxima.numel()
    reduced = TokenStatistics(ranks[:, :end_of_totals].sum(dim=0), ranks[:, end_of_totals:end_of_maxima].amax(dim=0))
    return reduced, ranks[:, end_of_maxima:].sum(dim=0).tolist()
