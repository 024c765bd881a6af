"""Coefficients of rewards and teacher, against numbers worked by hand and the sum written out."""

import pytest
import torch

from sg_opd_trl import core

# shares, schedule -> w at steps 60, 61, 75, 90, 105, 120, 121 of 150, from 1 to 0
WAYS = [
    ((0.4, 0.4), "linear", (1, 0, 0, 0, 0, 0, 0)),
    ((0.4, 0.4), "cosine", (1, 0, 0, 0, 0, 0, 0)),
    ((0.4, 0.8), "linear", (1, 59 / 60, 0.75, 0.5, 0.25, 0, 0)),
    ((0.4, 0.8), "cosine", (1, 0.999315, 0.853553, 0.5, 0.146447, 0, 0)),
    ((0.0, 1.0), "linear", (0.6, 89 / 150, 0.5, 0.4, 0.3, 0.2, 29 / 150)),
    ((1.0, 1.0), "linear", (1, 1, 1, 1, 1, 1, 1)),
    ((0.0, 0.0), "linear", (0, 0, 0, 0, 0, 0, 0)),
]


@pytest.mark.parametrize(("shares", "schedule", "expected"), WAYS)
def test_the_way_from_one_to_zero(shares: tuple, schedule: str, expected: tuple) -> None:
    steps = (60, 61, 75, 90, 105, 120, 121)
    found = [core.scheduled_coefficient(step, 150, [1.0, 0.0], shares, schedule) for step in steps]
    assert found == pytest.approx(expected, abs=1e-6)
    rising = [core.scheduled_coefficient(step, 150, [0.0, 1.0], shares, schedule) for step in steps]
    assert rising == pytest.approx([1 - x for x in found])
    assert core.scheduled_coefficient(7, 150, [0.3], shares, schedule) == 0.3


def test_rewards_beside_the_teacher() -> None:
    """Eight rollouts of which two are right: 1.6198 and -.5399 (methods of the field, worked by hand)."""
    verdicts = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    a1r = (verdicts - verdicts.mean()) / (verdicts.std() + 1e-4)
    a2 = torch.tensor([0.5, -2.0, 0.03], dtype=torch.float64).expand(8, 3)
    for teacher, right, wrong in (
        (1.0, (2.1198, -0.3802, 1.6498), (-0.0399, -2.5399, -0.5099)),
        (0.002, (1.6208, 1.6158, 1.6199), None),
    ):
        mixed = core.mixed_advantages(a2, a1r, teacher_coef=teacher, task_coef=1.0)
        assert mixed[0].tolist() == pytest.approx(right, abs=1e-4)
        if wrong is not None:
            assert mixed[-1].tolist() == pytest.approx(wrong, abs=1e-4)


def test_weights_of_the_drift_gate_are_the_rewards_too() -> None:
    a2, weights = torch.randn(2, 3), torch.rand(2, 3)
    task = torch.tensor([2.0, -1.0])
    mixed = core.mixed_advantages(a2, task, teacher_coef=0.5, task_coef=3.0, task_weights=weights)
    for row in range(2):
        for t in range(3):
            expected = 0.5 * a2[row, t] + 3 * task[row] * weights[row, t]
            assert float(mixed[row, t]) == pytest.approx(float(expected), rel=1e-6)


def test_the_gradient_is_that_of_the_teachers_part() -> None:
    """Of a loss over distributions; rewards have none."""
    losses, rewards = torch.randn(2, 3, requires_grad=True), torch.randn(2, requires_grad=True)
    core.mixed_advantages(losses, rewards, teacher_coef=0.25, task_coef=1.0).sum().backward()
    assert torch.equal(losses.grad, torch.full((2, 3), 0.25))
    assert rewards.grad is None


@pytest.mark.parametrize(
    ("values", "shares"), [([-1.0], (0.0, 1.0)), ([float("nan"), 1.0], (0.0, 1.0)), ([1.0, 0.0], (0.2, 1.5))]
)
def test_numbers_out_of_range_are_refused(values: list, shares: tuple) -> None:
    with pytest.raises(ValueError, match=r"(values|phase_end_fracs)\[[01]\]` must be"):
        core.scheduled_coefficient(1, 10, values, shares)
