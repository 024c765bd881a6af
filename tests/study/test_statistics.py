import math
import random
import statistics

import pytest

from sg_opd_trl.errors import DataError
from sg_opd_trl.study.statistics import Estimate, contrast_by_seed, t_interval, t_quantile

# Two-sided quantiles of a printed table, degrees of freedom -> (90%, 95%, 99%).
TABLE = {
    1: (6.314, 12.706, 63.657),
    2: (2.920, 4.303, 9.925),
    3: (2.353, 3.182, 5.841),
    4: (2.132, 2.776, 4.604),
    5: (2.015, 2.571, 4.032),
    9: (1.833, 2.262, 3.250),
    14: (1.761, 2.145, 2.977),
    30: (1.697, 2.042, 2.750),
    120: (1.658, 1.980, 2.617),
}


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_those_of_the_printed_table(degrees):
    found = [t_quantile(degrees, level) for level in (0.90, 0.95, 0.99)]
    assert found == pytest.approx(TABLE[degrees], abs=6e-4)


def density(t, degrees):
    log = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    return math.exp(log - (degrees + 1) / 2 * math.log1p(t * t / degrees))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 8])
def test_the_density_between_the_quantiles_is_the_level(degrees):
    bound, parts = t_quantile(degrees), 20_000
    middle = sum(density((index + 0.5) / parts * bound, degrees) for index in range(parts)) * bound / parts
    assert 2 * middle == pytest.approx(0.95, abs=1e-6)


def test_with_many_degrees_it_is_the_normal_quantile():
    assert t_quantile(100_000) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-4)


@pytest.mark.parametrize(("degrees", "level"), [(0, 0.95), (3, 0.0), (3, 1.0)])
def test_impossible_quantiles_are_refused(degrees, level):
    with pytest.raises(DataError, match="two seeds"):
        t_quantile(degrees, level)


def test_an_interval_by_hand():
    # mean 4, deviations -2, 0, 2, s = 2, s / sqrt(3) = 1.1547, t(2) = 4.3027
    estimate = t_interval([2.0, 4.0, 6.0])
    assert (estimate.mean, estimate.count, estimate.kind) == (4.0, 3, "seeds")
    assert (estimate.low, estimate.high) == pytest.approx((4 - 4.3027 * 1.1547, 4 + 4.3027 * 1.1547), abs=1e-3)


def test_one_value_has_no_interval_and_none_is_an_error():
    assert t_interval([0.3]) == Estimate(0.3, None, None, 1, "none")
    with pytest.raises(DataError):
        t_interval([])


def test_equal_values_have_an_interval_without_width():
    assert t_interval([0.5, 0.5]) == Estimate(0.5, 0.5, 0.5, 2, "seeds")


def test_the_interval_covers_the_mean_as_often_as_it_says():
    generator = random.Random(0)
    covered = 0
    for _ in range(2000):
        estimate = t_interval([generator.gauss(0.0, 1.0) for _ in range(4)])
        covered += estimate.low <= 0.0 <= estimate.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_differences_are_paired_and_use_shared_seeds_only():
    scores = {"a": {0: 0.5, 1: 0.9, 2: 0.1}, "b": {1: 0.6, 0: 0.4, 7: 0.0}}
    assert contrast_by_seed(scores, {"a": 1, "b": -1}) == pytest.approx({0: 0.1, 1: 0.3})
    assert contrast_by_seed(scores, {"a": 1, "absent": -1}) == {}


def test_a_contrast_of_four_runs():
    scores = {"both": {0: 0.9}, "first": {0: 0.6}, "second": {0: 0.7}, "neither": {0: 0.5}}
    weights = {"both": 1, "first": -1, "second": -1, "neither": 1}
    assert contrast_by_seed(scores, weights) == pytest.approx({0: 0.1})
