"""Means, paired differences and contrasts over seeds, with Student's t intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import fmean, stdev
from typing import Any

from ..errors import DataError

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds with its interval.

    `kind` says what the interval covers: "seeds" is a t interval over seeds, "problems" the evaluator's bootstrap
    interval over problems of a single model, "none" means that one seed gives no interval and both bounds are None.
    """

    mean: float
    low: float | None
    high: float | None
    count: int
    kind: str

    def to_dict(self) -> dict[str, Any]:
        """All fields, as values that JSON can hold."""
        return asdict(self)


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean over seeds with its 95% Student t interval, `mean +- t * s / sqrt(n)`.

    Args:
        values: one number per seed, shape (n,), n >= 1. One value has no interval.

    Returns:
        The estimate, of kind "seeds", or "none" for one value.

    Raises:
        DataError: no values.
    """
    if not values:
        raise DataError("`values` must hold a number per seed, got none. A mean needs one. Finish some runs first.")
    mean, count = fmean(values), len(values)
    if count == 1:
        return Estimate(mean, None, None, 1, "none")
    half = t_quantile(count - 1) * stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count, "seeds")


def contrast_by_seed(scores: Mapping[str, Mapping[int, float]], weights: Mapping[str, float]) -> dict[int, float]:
    """Weighted sum of runs' scores, seed by seed, over the seeds that every run with a weight has.

    A paired difference is the contrast `{run: 1, baseline: -1}`; whether two parts add up is
    `{both: 1, first: -1, second: -1, neither: 1}`.

    Args:
        scores: run -> seed -> score.
        weights: run -> weight; usually they sum to 0.

    Returns:
        Seed -> value, by seed; empty when a run is missing or no seed is shared.
    """
    if any(name not in scores for name in weights):
        return {}
    seeds = set.intersection(*(set(scores[name]) for name in weights))
    return {seed: sum(weight * scores[name][seed] for name, weight in weights.items()) for seed in sorted(seeds)}


@lru_cache
def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t with `P(|T| <= t) = level` for Student's distribution, found by bisection.

    Args:
        degrees: of freedom, a whole number >= 1.
        level: in (0, 1).

    Returns:
        The two-sided quantile, e.g. 12.706 for one degree at 95%.

    Raises:
        DataError: an argument out of range.
    """
    if degrees < 1 or not 0 < level < 1:
        raise DataError(
            f"`degrees` must be at least 1 and `level` between 0 and 1, got {degrees} and {level}. There is no such "
            "quantile. Use at least two seeds."
        )
    # Over the angle, whose range is finite, where t has none; 60 halvings reach the last bit, 100 are as cheap.
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if _central_probability(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(degrees)


def _central_probability(angle: float, degrees: int) -> float:
    """`P(|T| <= sqrt(degrees) * tan(angle))`: Abramowitz and Stegun 26.7.3 (odd degrees) and 26.7.4 (even)."""
    cosine, odd = math.cos(angle), degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for index in range(degrees // 2):
        total += term
        step = 2 * index + 1 + odd
        term *= cosine**2 * step / (step + 1)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
