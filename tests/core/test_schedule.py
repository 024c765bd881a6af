import math
from fractions import Fraction

import pytest

from sg_opd_trl.core import anchor_schedule, separated_prompts, separated_schedule


@pytest.mark.parametrize(
    ("step", "expected"),
    # 30/35 of 100 steps; (1 + cos(pi k / 5)) / 2 for k = 1..5
    [(1, 1.0), (30, 1.0), (31, 0.9045), (32, 0.6545), (33, 0.3455), (34, 0.0955), (35, 0.0), (36, 0.0), (100, 0.0)],
)
def test_one_to_zero(step: int, expected: float) -> None:
    assert anchor_schedule(step, 100, 0.30, 0.35, 1.0, 0.0) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("step", "expected"), [(30, 0.2), (31, 0.1828), (35, 0.02), (36, 0.0)])
def test_end_above_zero_jumps(step: int, expected: float) -> None:
    # step 31: .02 + .18 * .9045 = .1828
    assert anchor_schedule(step, 100, 0.30, 0.35, 0.2, 0.02) == pytest.approx(expected, abs=5e-5)


def test_equal_phase_ends_jump() -> None:
    values = [anchor_schedule(step, 10, 0.5, 0.5, 0.2, 0.1) for step in range(1, 11)]
    assert values == [0.2] * 5 + [0.0] * 5


def test_phase_ends_survive_binary_fractions() -> None:
    # .29 * 100 and .57 * 100 are a hair below 29 and 57 in binary.
    assert 0.29 * 100 < 29 and 0.57 * 100 < 57
    for percent in range(101):
        frac = percent / 100
        full = [anchor_schedule(step, 100, frac, frac, 1.0, 1.0) for step in range(1, 101)]
        assert sum(full) == math.floor(Fraction(percent, 100) * 100)


def test_short_runs_and_extremes() -> None:
    assert anchor_schedule(1, 1, 0.3, 0.35, 1.0, 0.0) == 0.0  # both ends are step 0
    assert anchor_schedule(1, 10, 0.0, 0.0, 1.0, 0.0) == 0.0
    assert anchor_schedule(10, 10, 1.0, 1.0, 0.7, 0.0) == 0.7


@pytest.mark.parametrize("total", [7, 40, 100])
def test_against_loop_and_monotone(total: int) -> None:
    first, last = math.floor(Fraction(3, 10) * total), math.floor(Fraction(4, 5) * total)
    values = [anchor_schedule(step, total, 0.3, 0.8, 0.5, 0.1) for step in range(1, total + 1)]
    for step, value in enumerate(values, start=1):
        # Half-angle form: (1 + cos x) / 2 = cos(x / 2)^2
        angle = math.pi / 2 * (step - first) / (last - first)
        expected = 0.5 if step <= first else 0.1 + 0.4 * math.cos(angle) ** 2 if step <= last else 0.0
        assert value == pytest.approx(expected, abs=1e-12)
    assert values == sorted(values, reverse=True)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"`phase2_end_frac` must be in \[0.5, 1.0\], got 0.4. Phase 2 follows phase 1"
    ):
        anchor_schedule(1, 10, 0.5, 0.4, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"`phase1_end_frac` must be in \[0.0, 1.0\], got nan"):
        anchor_schedule(1, 10, math.nan, 0.4, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"`phase2_end_frac` must be in"):
        anchor_schedule(1, 10, 0.3, 1.1, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"`step` must be >= 1 and finite, got 0. Steps are counted from 1"):
        anchor_schedule(0, 10, 0.3, 0.4, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"`total_steps` must be >= 1"):
        anchor_schedule(1, 0, 0.3, 0.4, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"`alpha_start` must be >= 0.0 and finite, got -0.1"):
        anchor_schedule(1, 10, 0.3, 0.4, -0.1, 0.0)
    with pytest.raises(ValueError, match=r"`alpha_end` must be"):
        anchor_schedule(1, 10, 0.3, 0.4, 0.1, math.nan)


def test_separated_in_time_is_a_constant_and_then_nothing() -> None:
    assert [separated_schedule(step, 10, 0.3, 0.2) for step in range(1, 11)] == [0.2] * 3 + [0.0] * 7
    assert separated_schedule(29, 100, 0.29, 0.5) == 0.5  # .29 * 100 is a hair below 29 in binary
    assert separated_schedule(30, 100, 0.29, 0.5) == 0.0


def test_separated_prompts_by_hand() -> None:
    # 30/35 of 100 steps: alpha is 0 in step 35, so 34 steps with 2 prompts are 68 prompts over 30 steps.
    drawn = [separated_prompts(step, 100, 0.30, 0.35, 0.2, 0.0, 2) for step in range(1, 101)]
    assert drawn[:4] == [(0, 2), (2, 4), (4, 6), (6, 9)]  # floor(68 k / 30) = 2.27, 4.53, 6.8, 9.07
    assert drawn[29] == (65, 68)
    assert set(drawn[30:]) == {(68, 68)}
    # With alpha_end above 0 step 35 counts too: 70.
    assert separated_prompts(30, 100, 0.30, 0.35, 0.2, 0.02, 2)[1] == 70


@pytest.mark.parametrize("ends", [(0.3, 0.35), (0.5, 0.5), (1.0, 1.0), (0.13, 0.9), (0.05, 0.05)])
@pytest.mark.parametrize("alpha_end", [0.0, 0.1])
@pytest.mark.parametrize("total", [7, 20, 100])
def test_separated_prompts_are_sg_opds_in_number_and_order(ends: tuple, alpha_end: float, total: int) -> None:
    per_step = 3
    anchored = sum(anchor_schedule(step, total, *ends, 0.2, alpha_end) > 0 for step in range(1, total + 1))
    drawn = [
        position
        for step in range(1, total + 1)
        if separated_schedule(step, total, ends[0], 0.2) > 0
        for position in range(*separated_prompts(step, total, *ends, 0.2, alpha_end, per_step))
    ]
    stage = [step for step in range(1, total + 1) if separated_schedule(step, total, ends[0], 0.2) > 0]
    assert drawn == (list(range(per_step * anchored)) if stage else [])


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 10, 0.3, 0.4, 0.2, 0.0, 1),
        (1, 10, 0.3, 0.2, 0.2, 0.0, 1),
        (1, 10, 0.3, 0.4, 0.0, 0.0, 1),
        (1, 10, 0.3, 0.4, 0.2, -0.1, 1),
        (1, 10, 0.3, 0.4, 0.2, 0.0, 0),
        (1, 10, math.nan, 0.4, 0.2, 0.0, 1),
    ],
)
def test_separated_prompts_refuse_what_is_out_of_range(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="must be"):
        separated_prompts(*arguments)
