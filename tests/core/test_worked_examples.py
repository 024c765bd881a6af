"""Examples worked by hand. lambda_high = 1.8, lambda_base = 1 unless said.

d = lT - lS, e = lT - lR, A(lam) = d + (lam - 1) e.
"""

import math
from typing import Any

import pytest
import torch

from sg_opd_trl.core import extrapolated_advantage, reverse_kl_advantage, route_advantages, sign_consistency_gate

#       name: a1,   lS,   lT,   lR
INPUTS = {
    "E1": (1.0, -2.0, -1.0, -2.0),
    "E2": (1.0, -0.5, -1.5, -0.7),
    "E3": (-1.0, -0.5, -1.5, -0.7),
    "E4": (-1.0, -2.0, -1.0, -2.5),
    "E5": (0.0, -2.0, -1.0, -2.0),
    "E6": (1.0, -1.0, -1.0, -1.5),
    "E7": (-1.0, -0.5, -1.0, -3.0),
    "E8": (1.0, -1.2, -0.4, -0.9),
}
#        d,   e, gate
SIGNALS = {
    "E1": (1.0, 1.0, 1),
    "E2": (-1.0, -0.8, -1),
    "E3": (-1.0, -0.8, 1),
    "E4": (1.0, 1.5, -1),
    "E5": (1.0, 1.0, 0),
    "E6": (0.0, 0.5, 0),
    "E7": (-0.5, 2.0, 1),
    "E8": (0.8, 0.5, 1),
}
# Columns: interp beta 1, interp beta .7, interp_lambda .7, preserve with lambda_base 1.25, grpo.
ROUTES: dict[str, dict[str, Any]] = {
    "interp 1": {"disagree_mode": "interp", "disagree_interp_beta": 1.0},
    "interp 0.7": {"disagree_mode": "interp", "disagree_interp_beta": 0.7},
    "interp_lambda 0.7": {"disagree_mode": "interp_lambda", "disagree_interp_beta": 0.7},
    "preserve 1.25": {"disagree_mode": "preserve", "lambda_base": 1.25},
    "grpo": {"disagree_mode": "grpo"},
}
EXPECTED = {
    "E1": (1.8, 1.8, 1.8, 1.8, 1.8),  # 1 + .8 * 1
    "E2": (-1.0, -0.7, -0.76, -1.2, 1.0),  # -1 | .7 * -1 | -1 - .3 * -.8 | -1 + .25 * -.8 | a1
    "E3": (-1.64, -1.64, -1.64, -1.64, -1.64),  # -1 + .8 * -.8
    "E4": (1.0, 0.7, 0.55, 1.375, -1.0),  # 1 | .7 | 1 - .3 * 1.5 | 1 + .25 * 1.5 | a1
    "E5": (1.0, 1.0, 1.0, 1.25, 1.0),  # A(lambda_base) = 1 + (lambda_base - 1) * 1
    "E6": (0.0, 0.0, 0.0, 0.125, 0.0),  # 0 + (lambda_base - 1) * .5
    "E7": (1.1, 1.1, 1.1, 1.1, 1.1),  # -.5 + .8 * 2: both say down, the extrapolation turns it up
    "E8": (1.2, 1.2, 1.2, 1.2, 1.2),  # .8 + .8 * .5
}


def columns(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """lS, lT, lR as (1, 1) and a1 as (1,)."""
    a1, student, teacher, reference = INPUTS[name]
    return torch.tensor([[student]]), torch.tensor([[teacher]]), torch.tensor([[reference]]), torch.tensor([a1])


@pytest.mark.parametrize("name", INPUTS)
def test_signals_and_gate(name: str) -> None:
    student, teacher, reference, verifier = columns(name)
    d, e, gate = SIGNALS[name]
    assert reverse_kl_advantage(student, teacher).item() == pytest.approx(d, abs=1e-6)
    assert extrapolated_advantage(student, teacher, reference, 2.0).item() == pytest.approx(d + e, abs=1e-6)
    assert sign_consistency_gate(verifier, reverse_kl_advantage(student, teacher)).item() == gate


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("route", ROUTES)
def test_routed_advantage(name: str, route: str) -> None:
    student, teacher, reference, verifier = columns(name)
    routed = route_advantages(student, teacher, reference, verifier, lambda_high=1.8, **ROUTES[route])
    assert routed.item() == pytest.approx(EXPECTED[name][list(ROUTES).index(route)], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("E5", {"disagree_interp_beta": 0.7}, 0.7),  # .7 * 1 instead of 1
        ("E5", {"disagree_mode": "grpo"}, 0.0),  # a1
        ("E6", {"disagree_mode": "grpo"}, 1.0),  # a1
        ("E5", {"disagree_mode": "interp_lambda", "disagree_interp_beta": 0.7}, 0.7),  # 1 - .3 * 1
        ("E6", {"disagree_mode": "preserve", "lambda_base": 1.25}, 0.125),  # 0 + .25 * .5
    ],
)
def test_zeros_as_conflicts(name: str, settings: dict[str, Any], expected: float) -> None:
    student, teacher, reference, verifier = columns(name)
    routed = route_advantages(
        student, teacher, reference, verifier, lambda_high=1.8, neutral_mode="conflict", **settings
    )
    assert routed.item() == pytest.approx(expected, abs=1e-6)


def test_negative_control_printed_cost_must_be_negated() -> None:
    # Eq. 5 as printed, in cost orientation: (lS - lT) + .8 (lR - lT) = -1 - .8 = -1.8 on E1.
    _, student, teacher, reference = INPUTS["E1"]
    printed = (student - teacher) + 0.8 * (reference - teacher)
    assert printed == pytest.approx(-1.8)
    student_t, teacher_t, reference_t, _ = columns("E1")
    assert extrapolated_advantage(student_t, teacher_t, reference_t, 1.8).item() == pytest.approx(-printed, abs=1e-6)


def test_negative_control_half_flipped() -> None:
    # Flipping a2 alone gives d - .8 e = 1 - .8 = .2 on E1: pulled towards the reference instead of away from it.
    student, teacher, reference, verifier = columns("E1")
    routed = route_advantages(student, teacher, reference, verifier, lambda_high=1.8)
    assert abs(routed.item() - 0.2) > 1.0


def test_negative_control_printed_cost_would_gate_consensus_as_conflict() -> None:
    student, teacher, _, verifier = columns("E1")
    assert sign_consistency_gate(verifier, student - teacher).item() == -1
    assert sign_consistency_gate(verifier, reverse_kl_advantage(student, teacher)).item() == 1


def test_student_equal_to_reference_scales_the_log_ratio() -> None:
    # lS = lR: e = d, so consensus is lambda_high d and an interp conflict beta d.
    student = torch.tensor([[-2.0, -0.5]])
    teacher = torch.tensor([[-1.0, -1.5]])  # d = [1, -1], a1 = 1: consensus, conflict
    routed = route_advantages(
        student, teacher, student.clone(), torch.ones(1), lambda_high=1.8, disagree_interp_beta=0.7
    )
    torch.testing.assert_close(routed, torch.tensor([[1.8, -0.7]]), atol=1e-6, rtol=0)


def exact_step(sign: float) -> torch.Tensor:
    """Student after one exact expected policy-gradient step of size 1 from (.5, .5), teacher (.9, .1)."""
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    log_probs = logits.log_softmax(dim=-1)
    teacher = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    advantages = sign * reverse_kl_advantage(log_probs, teacher)
    (log_probs.exp().detach() * advantages * log_probs).sum().backward()
    assert logits.grad is not None
    return (logits + logits.grad).softmax(dim=-1).detach().squeeze(0)


def kl_to_teacher(probs: torch.Tensor) -> float:
    p = probs.tolist()
    return p[0] * math.log(p[0] / 0.9) + p[1] * math.log(p[1] / 0.1)


def test_direction_of_one_step() -> None:
    # d = (ln 1.8, ln .2); E d = -.5108; gradient +-.5 (1.0986) = +-.5493, so the logits part by ln 3: (.75, .25).
    assert kl_to_teacher(torch.tensor([0.5, 0.5])) == pytest.approx(0.5108, abs=5e-5)
    towards = exact_step(+1.0)
    torch.testing.assert_close(towards, torch.tensor([0.75, 0.25], dtype=torch.float64))
    assert kl_to_teacher(towards) == pytest.approx(0.0923, abs=5e-5)
    away = exact_step(-1.0)
    torch.testing.assert_close(away, torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert kl_to_teacher(away) == pytest.approx(1.1909, abs=5e-5)
