import itertools
import math
from typing import Any

import pytest
import torch

from sg_opd_trl.core import (
    DISAGREE_MODES,
    NEUTRAL_MODES,
    extrapolated_advantage,
    reverse_kl_advantage,
    route_advantages,
    route_gated_advantages,
    routes_need_reference,
    sign_consistency_gate,
)

CELLS = (1.5, 1.1, 0.9, 1.4)  # ++, +-, -+, --, all different


def random_inputs(
    rows: int = 6, columns: int = 9, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """lS, lT, lR in float64 and a1 with a zero row; a quarter of the tokens has a2 exactly 0, some a2 are tiny."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher, reference = (
        -3 * torch.rand(rows, columns, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    teacher = torch.where(torch.rand(rows, columns, generator=generator) < 0.25, student, teacher)
    teacher = torch.where(torch.rand(rows, columns, generator=generator) < 0.2, student + 0.01, teacher)
    verifier = torch.randn(rows, generator=generator, dtype=torch.float64)
    verifier[0] = 0.0
    return student, teacher, reference, verifier


def slow_gate(a1: float, a2: float, dead_zone: float) -> int:
    if math.isnan(a1) or abs(a1) <= 1e-6 or a2 == 0 or abs(a2) <= dead_zone:
        return 0
    return 1 if a1 * a2 > 0 else -1


def slow_route(a1: float, s: float, t: float, r: float, *, high: float, base: float, mode: str, beta: float,
               neutral: str, dead_zone: float) -> float:  # fmt: skip
    a2, gate = t - s, slow_gate(a1, t - s, dead_zone)

    def a(lam: float) -> float:
        return lam * t + (1 - lam) * r - s

    if gate == 0 and neutral == "base":
        return a(base)
    if mode == "cells":
        up = a2 > 0 or (a2 == 0 and a1 < 0)
        cell = (0 if up else 3) if gate == 1 else (2 if up else 1)
        return a(CELLS[cell])
    if gate == 1:
        return a(high)
    return {"interp": beta * a2, "interp_lambda": a(beta), "preserve": a(base), "grpo": a1}[mode]


@pytest.mark.parametrize("a1", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("a2", [-0.5, 0.0, 0.5])
def test_nine_sign_pairs(a1: float, a2: float) -> None:
    table = {
        (-1, -1): 1, (-1, 0): 0, (-1, 1): -1,
        (0, -1): 0, (0, 0): 0, (0, 1): 0,
        (1, -1): -1, (1, 0): 0, (1, 1): 1,
    }  # fmt: skip
    signs = (int(math.copysign(1, a1)) if a1 else 0, int(math.copysign(1, a2)) if a2 else 0)
    gate = sign_consistency_gate(torch.tensor([a1]), torch.tensor([[a2]]))
    assert gate.dtype == torch.int8
    assert gate.item() == table[signs]


@pytest.mark.parametrize("dead_zone", [0.0, 0.02, 0.5])
def test_gate_against_loop(dead_zone: float) -> None:
    student, teacher, _, verifier = random_inputs()
    verifier[1], verifier[2], verifier[3] = 1e-6, -9e-7, math.nan
    a2 = reverse_kl_advantage(student, teacher)
    gate = sign_consistency_gate(verifier, a2, dead_zone)
    for row, column in itertools.product(*map(range, a2.shape)):
        assert gate[row, column].item() == slow_gate(verifier[row].item(), a2[row, column].item(), dead_zone)
    assert set(gate.unique().tolist()) == {-1, 0, 1}


def test_dead_zone_includes_its_edge() -> None:
    a2 = torch.tensor([[0.25, -0.25, 0.2500001, -0.2500001]])
    assert sign_consistency_gate(torch.ones(1), a2, 0.25).tolist() == [[0, 0, 1, -1]]


def test_gate_takes_one_verdict_per_token() -> None:
    a1 = torch.tensor([[1.0, -1.0, 0.0]])
    assert sign_consistency_gate(a1, torch.full((1, 3), 0.5)).tolist() == [[1, -1, 0]]


@pytest.mark.parametrize("mode", DISAGREE_MODES)
@pytest.mark.parametrize("neutral", NEUTRAL_MODES)
@pytest.mark.parametrize("dead_zone", [0.0, 0.02])
def test_route_against_loop(mode: str, neutral: str, dead_zone: float) -> None:
    student, teacher, reference, verifier = random_inputs()
    routed = route_advantages(
        student, teacher, reference, verifier, lambda_high=1.8, lambda_base=1.25, disagree_mode=mode,
        disagree_interp_beta=0.7, neutral_mode=neutral, dead_zone=dead_zone, cell_lambdas=CELLS,
    )  # fmt: skip
    for row, column in itertools.product(*map(range, student.shape)):
        s, t, r = (x[row, column].item() for x in (student, teacher, reference))
        expected = slow_route(
            verifier[row].item(), s, t, r, high=1.8, base=1.25, mode=mode, beta=0.7, neutral=neutral,
            dead_zone=dead_zone,
        )  # fmt: skip
        assert routed[row, column].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("a1", "a2", "cell"), [(1, 1, 0), (1, -1, 1), (-1, 1, 2), (-1, -1, 3)])
def test_cells_in_order(a1: int, a2: int, cell: int) -> None:
    # e = 2 everywhere: A = a2 + (lam - 1) 2
    student, teacher = torch.tensor([[-2.0]]), torch.tensor([[-2.0 + a2]])
    routed = route_advantages(
        student, teacher, teacher - 2.0, torch.tensor([float(a1)]), lambda_high=9.0, disagree_mode="cells",
        cell_lambdas=CELLS,
    )  # fmt: skip
    assert routed.item() == pytest.approx(a2 + 2 * (CELLS[cell] - 1), abs=1e-6)


@pytest.mark.parametrize(
    ("a1", "a2", "cell"),
    [(0, 1, 2), (0, -1, 1), (1, 0, 1), (-1, 0, 2)],  # the missing sign counts as the opposite of the other
)
def test_cells_of_neutral_tokens_treated_as_conflicts(a1: int, a2: int, cell: int) -> None:
    student, teacher = torch.tensor([[-2.0]]), torch.tensor([[-2.0 + a2]])
    routed = route_advantages(
        student, teacher, teacher - 2.0, torch.tensor([float(a1)]), lambda_high=9.0, disagree_mode="cells",
        neutral_mode="conflict", cell_lambdas=CELLS,
    )  # fmt: skip
    assert routed.item() == pytest.approx(a2 + 2 * (CELLS[cell] - 1), abs=1e-6)


@pytest.mark.parametrize("high", [1.0, 1.8])
@pytest.mark.parametrize(("beta", "irrelevant"), [(1.0, True), (0.7, False)])
def test_neutral_mode_is_irrelevant_at_base_one_and_beta_one(high: float, beta: float, irrelevant: bool) -> None:
    for seed in range(20):
        inputs = random_inputs(seed=seed)
        settings: dict[str, Any] = {"lambda_high": high, "disagree_interp_beta": beta}
        base, conflict = (route_advantages(*inputs, neutral_mode=mode, **settings) for mode in NEUTRAL_MODES)
        assert torch.equal(base, conflict) == irrelevant


@pytest.mark.parametrize("neutral", NEUTRAL_MODES)
@pytest.mark.parametrize("with_reference", [True, False])
def test_all_ones_is_plain_distillation_bit_for_bit(neutral: str, with_reference: bool) -> None:
    student, teacher, reference, verifier = (x.float() for x in random_inputs())
    for a1 in (verifier, torch.zeros(6), torch.ones(6), -torch.ones(6), torch.full((6,), math.nan)):
        routed = route_advantages(
            student, teacher, reference if with_reference else None, a1, lambda_high=1.0, neutral_mode=neutral
        )
        assert torch.equal(routed, reverse_kl_advantage(student, teacher))


def test_abstention_is_routed_as_neutral_and_never_as_nan() -> None:
    student, teacher, reference, _ = random_inputs()
    abstained, zero = torch.full((6,), math.nan), torch.zeros(6)
    for mode, neutral in itertools.product(DISAGREE_MODES, NEUTRAL_MODES):
        settings: dict[str, Any] = {"lambda_high": 1.8, "disagree_mode": mode, "neutral_mode": neutral}
        routed = route_advantages(student, teacher, reference, abstained, **settings)
        assert torch.equal(routed, route_advantages(student, teacher, reference, zero, **settings))
        assert routed.isfinite().all()


def test_given_gate_is_obeyed() -> None:
    student, teacher, reference, verifier = random_inputs()
    always = route_gated_advantages(torch.ones(6, 9), student, teacher, reference, verifier, lambda_high=1.8)
    assert torch.equal(always, extrapolated_advantage(student, teacher, reference, 1.8))
    never = route_gated_advantages(
        torch.zeros(6, 9), student, teacher, reference, verifier, lambda_high=1.8, lambda_base=1.25
    )
    assert torch.equal(never, extrapolated_advantage(student, teacher, reference, 1.25))


def test_detached_row_permutation_padding_and_half_precision() -> None:
    student, teacher, reference, verifier = random_inputs()
    settings: dict[str, Any] = {"lambda_high": 1.8, "lambda_base": 1.25, "disagree_mode": "preserve"}
    whole = route_advantages(student, teacher, reference, verifier, **settings)
    leaves = [x.clone().requires_grad_() for x in (student, teacher, reference, verifier)]
    assert not route_advantages(*leaves, **settings).requires_grad
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    permuted = route_advantages(student[order], teacher[order], reference[order], verifier[order], **settings)
    assert torch.equal(permuted, whole[order])
    junk, logps = torch.full((6, 3), math.nan, dtype=torch.float64), (student, teacher, reference)
    wide_s, wide_t, wide_r = (torch.cat([x, junk], dim=1) for x in logps)
    assert torch.equal(route_advantages(wide_s, wide_t, wide_r, verifier, **settings)[:, :9], whole)
    halves = [x.to(torch.bfloat16) for x in (student, teacher, reference, verifier)]
    from_half = route_advantages(*halves, **settings)
    assert from_half.dtype == torch.float32
    assert torch.equal(from_half, route_advantages(*(x.float() for x in halves), **settings))


NEEDS_DEFAULTS: dict[str, Any] = {
    "sign_gated": True,
    "lambda_high": 1.8,
    "lambda_base": 1.0,
    "disagree_mode": "interp",
    "disagree_interp_beta": 1.0,
    "neutral_mode": "base",
    "cell_lambdas": (1.5, 1.0, 1.0, 1.5),
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (True, False, False)),
        ({"lambda_high": 1.0}, (False, False, False)),
        ({"lambda_base": 1.25}, (True, False, True)),
        ({"lambda_base": 1.25, "neutral_mode": "conflict"}, (True, False, False)),
        ({"disagree_interp_beta": 0.7}, (True, False, False)),
        ({"disagree_mode": "interp_lambda", "disagree_interp_beta": 0.7}, (True, True, False)),
        ({"disagree_mode": "interp_lambda", "disagree_interp_beta": 0.7, "neutral_mode": "conflict"},
         (True, True, True)),
        ({"disagree_mode": "preserve", "lambda_base": 1.25}, (True, True, True)),
        ({"disagree_mode": "grpo", "neutral_mode": "conflict", "lambda_base": 1.25}, (True, False, False)),
        ({"disagree_mode": "cells", "lambda_high": 1.0}, (True, False, False)),
        ({"disagree_mode": "cells", "cell_lambdas": (1.0, 1.0, 1.2, 1.0)}, (False, True, False)),
        ({"disagree_mode": "cells", "cell_lambdas": (1.0, 1.2, 1.0, 1.0), "neutral_mode": "conflict"},
         (False, True, True)),
        ({"sign_gated": False}, (False, False, False)),
        ({"sign_gated": False, "lambda_base": 1.25}, (True, True, True)),
    ],
)  # fmt: skip
def test_routes_that_need_the_reference(changes: dict[str, Any], expected: tuple[bool, bool, bool]) -> None:
    assert tuple(routes_need_reference(**NEEDS_DEFAULTS | changes)) == expected


def test_need_is_what_the_result_depends_on() -> None:
    """A route needs the reference exactly if another reference changes some token of its class."""
    student, teacher, reference, verifier = random_inputs()
    other = reference - 1.0
    gate = sign_consistency_gate(verifier, reverse_kl_advantage(student, teacher))
    for mode, neutral, high, base, beta in itertools.product(
        DISAGREE_MODES, NEUTRAL_MODES, (1.0, 1.8), (1.0, 1.25), (1.0, 0.7)
    ):
        settings: dict[str, Any] = {
            "lambda_high": high, "lambda_base": base, "disagree_mode": mode, "disagree_interp_beta": beta,
            "neutral_mode": neutral, "cell_lambdas": CELLS,
        }  # fmt: skip
        needs = routes_need_reference(sign_gated=True, **settings)
        one, two = (route_advantages(student, teacher, ref, verifier, **settings) for ref in (reference, other))
        for route, sign in (("consensus", 1), ("conflict", -1), ("neutral", 0)):
            changed = (one != two)[gate == sign].any().item()
            assert getattr(needs, route) == changed, (settings, route)


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"lambda_high": 1.8}, r"`lambda_high`=1.8 .* consensus"),
        ({"lambda_high": 1.0, "lambda_base": 1.25}, r"`lambda_base`=1.25 .* neutral"),
        ({"lambda_high": 1.0, "disagree_mode": "interp_lambda", "disagree_interp_beta": 0.7},
         r"`disagree_interp_beta`=0.7 .* conflict"),
        ({"lambda_high": 1.0, "disagree_mode": "cells"}, r"`cell_lambdas\[0\]`=1.5 .* consensus"),
    ],
)  # fmt: skip
def test_missing_reference_names_the_lambda(settings: dict[str, Any], culprit: str) -> None:
    student, teacher, _, verifier = random_inputs()
    with pytest.raises(ValueError, match=r"`reference_logps` must be given, got None. " + culprit):
        route_advantages(student, teacher, None, verifier, **settings)


def test_refusals() -> None:
    student, teacher, reference, verifier = random_inputs()

    def route(**settings: Any) -> torch.Tensor:
        return route_advantages(student, teacher, reference, verifier, **{"lambda_high": 1.8} | settings)

    with pytest.raises(ValueError, match=r"`disagree_mode` must be one of interp, .*, got 'mute'"):
        route(disagree_mode="mute")
    with pytest.raises(ValueError, match=r"`neutral_mode` must be one of base, conflict, got 'zero'"):
        route(neutral_mode="zero")
    with pytest.raises(
        ValueError, match=r"`dead_zone` must be >= 0.0 and finite, got -0.1. .* Set it to 0 to disable"
    ):
        route(dead_zone=-0.1)
    with pytest.raises(ValueError, match=r"`dead_zone` must be"):
        route(dead_zone=math.nan)
    with pytest.raises(ValueError, match=r"`lambda_high` must be finite, got inf"):
        route(lambda_high=math.inf)
    with pytest.raises(ValueError, match=r"`cell_lambdas` must hold 4 numbers, got 2"):
        route(cell_lambdas=(1.5, 1.0))
    with pytest.raises(ValueError, match=r"`verifier_advantages` must have the shape of `teacher_advantages"):
        sign_consistency_gate(verifier[:2], student)
    with pytest.raises(ValueError, match=r"`verifier_advantages` must have the shape of `teacher_advantages"):
        sign_consistency_gate(verifier[:, None], student)
    with pytest.raises(TypeError, match=r"`verifier_advantages` must have a floating dtype, got torch.int64"):
        sign_consistency_gate(verifier.long(), student)
    with pytest.raises(ValueError, match=r"`gate` must have the shape of `student_logps`"):
        route_gated_advantages(torch.ones(6), student, teacher, reference, verifier, lambda_high=1.8)
