"""The gate, and the table of routes: every entry against the float64 oracle."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch

from sg_opd_trl.core import (
    DISAGREE_MODES,
    NEUTRAL_MODES,
    disagree_mode_help,
    disagree_modes_using,
    extrapolated_advantage,
    modes_without_distribution,
    modes_without_forward_kl,
    reverse_kl_advantage,
    route_advantages,
    route_gated_advantages,
    route_lambdas,
    routes_need_reference,
    routing,
    sign_consistency_gate,
)

CELLS = (1.5, 1.1, 0.9, 1.4)  # ++, +-, -+, --, all different
ZERO = torch.zeros(1, 1)
CLASSES = {1: "consensus", -1: "conflict", 0: "neutral"}

NEEDS_DEFAULTS: dict[str, Any] = {
    "sign_gated": True,
    "lambda_high": 1.8,
    "lambda_base": 1.0,
    "disagree_mode": "interp",
    "disagree_interp_beta": 1.0,
    "neutral_mode": "base",
    "cell_lambdas": (1.5, 1.0, 1.0, 1.5),
}


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


def oracle_args(**settings: Any) -> SimpleNamespace:
    """The routing functions' settings under the names that the trainer's configuration gives them."""
    given = {"lambda_base": 1.0, "disagree_mode": "interp", "disagree_interp_beta": 1.0, "neutral_mode": "base",
             "cell_lambdas": CELLS, "dead_zone": 0.0} | settings  # fmt: skip
    given["disagree_cell_lambdas"], given["gate_dead_zone"] = given["cell_lambdas"], given["dead_zone"]
    return SimpleNamespace(sign_gated_extrapolation=True, **given)


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
        expected = oracle.gate(verifier[row].item(), a2[row, column].item(), dead_zone)
        assert CLASSES[gate[row, column].item()] == expected
    assert set(gate.unique().tolist()) == {-1, 0, 1}


def test_dead_zone_includes_its_edge() -> None:
    a2 = torch.tensor([[0.25, -0.25, 0.2500001, -0.2500001]])
    assert sign_consistency_gate(torch.ones(1), a2, 0.25).tolist() == [[0, 0, 1, -1]]


def test_gate_takes_one_verdict_per_token() -> None:
    a1 = torch.tensor([[1.0, -1.0, 0.0]])
    assert sign_consistency_gate(a1, torch.full((1, 3), 0.5)).tolist() == [[1, -1, 0]]


# --- the table, entry by entry ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", DISAGREE_MODES)
@pytest.mark.parametrize("neutral", NEUTRAL_MODES)
@pytest.mark.parametrize("dead_zone", [0.0, 0.02])
def test_every_mode_against_the_oracle(mode: str, neutral: str, dead_zone: float) -> None:
    """A mode of the table whose equation the oracle does not have is a KeyError with its name."""
    student, teacher, reference, verifier = random_inputs()
    verifier[1] = math.nan
    settings: dict[str, Any] = {
        "lambda_high": 1.8, "lambda_base": 1.25, "disagree_mode": mode, "disagree_interp_beta": 0.7,
        "neutral_mode": neutral, "cell_lambdas": CELLS,
    }  # fmt: skip
    args, a2 = oracle_args(**settings), reverse_kl_advantage(student, teacher)
    routed = route_advantages(student, teacher, reference, verifier, dead_zone=dead_zone, **settings)
    targets = None
    if mode not in modes_without_distribution():
        targets = route_lambdas(sign_consistency_gate(verifier, a2, dead_zone), a2, verifier, **settings)
    for row, column in itertools.product(*map(range, student.shape)):
        a1, (s, t, r) = verifier[row].item(), (x[row, column].item() for x in (student, teacher, reference))
        kind = oracle.gate(a1, t - s, dead_zone)
        assert routed[row, column].item() == pytest.approx(oracle.advantage(args, kind, a1, s, t, r), abs=1e-12)
        if targets is not None:
            found = (targets.lambdas[row, column].item(), targets.scales[row, column].item())
            assert found == pytest.approx(oracle.target(args, kind, a1, t - s))


@pytest.mark.parametrize("mode", DISAGREE_MODES)
def test_every_mode_is_named_by_the_settings_that_it_reads(mode: str) -> None:
    """A number is read by a mode if it changes some consensus or conflict token, and otherwise not."""
    student, teacher, reference, verifier = random_inputs()
    start: dict[str, Any] = {"lambda_high": 1.8, "lambda_base": 1.25, "disagree_interp_beta": 0.7}
    other = {"lambda_high": 2.0, "lambda_base": 1.5, "disagree_interp_beta": 0.5, "cell_lambdas": (2.0, 2.1, 2.2, 2.3)}
    start["cell_lambdas"] = CELLS
    gate = sign_consistency_gate(verifier, reverse_kl_advantage(student, teacher))

    def decided(settings: dict[str, Any]) -> torch.Tensor:
        routed = route_gated_advantages(gate, student, teacher, reference, verifier, disagree_mode=mode, **settings)
        return routed[gate != 0]

    read = {name for name in start if not torch.equal(decided(start), decided(start | {name: other[name]}))}
    assert {name for name in start if mode in disagree_modes_using(name)} == read


def test_what_the_table_says_of_whole_distributions() -> None:
    assert "grpo" in modes_without_distribution()
    published = {"interp", "interp_lambda", "preserve", "cells"}
    assert published.isdisjoint(modes_without_distribution())
    assert (published | {"grpo"}).isdisjoint(modes_without_forward_kl())
    assert disagree_mode_help().startswith("'interp' beta*a2 (paper, Eq. 7), 'interp_lambda' A(beta)")


def test_an_entry_that_forgets_something_fails_where_it_is_written() -> None:
    route = routing.towards("lambda_high")
    with pytest.raises(TypeError, match="forward_kl"):
        routing.DisagreeMode(consensus=route, conflict=route, help="x")
    with pytest.raises(ValueError, match="'lambda_hihg', which is no setting of the routes"):
        routing.towards("lambda_hihg")


def test_a_further_kind_of_route_has_to_answer_all_that_is_asked_of_one() -> None:
    class HalfARoute(routing.Route):
        def advantage(self, tokens: routing.TokenSignals, settings: routing.RouteSettings) -> torch.Tensor:
            return tokens.a1

    with pytest.raises(TypeError, match=r"abstract methods? '?has_distribution'?, '?lambdas'?, '?target"):
        HalfARoute()
    with pytest.raises(AttributeError):
        routing.DisagreeMode(consensus=routing.BASE_ROUTE, conflict="a1", forward_kl=True, help="x").settings()


def test_the_route_of_the_verifier() -> None:
    tokens = routing.TokenSignals(torch.tensor([[2.0, -1.0]]), torch.zeros(1, 2), None)
    settings = routing.RouteSettings(**{name: value for name, value in NEEDS_DEFAULTS.items() if name != "sign_gated"})
    assert routing.VerifierRoute().advantage(tokens, settings) is tokens.a1
    assert routing.VerifierRoute(scale=0.5).advantage(tokens, settings).tolist() == [[1.0, -0.5]]
    assert routing.VerifierRoute(scale="lambda_high").settings() == {"lambda_high"}
    with pytest.raises(TypeError, match="no target distribution"):
        routing.VerifierRoute().target(tokens, settings)


def test_a_name_that_no_route_can_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`setting` must be one of lambda_high, .*, got 'typo'"):
        disagree_modes_using("typo")


@pytest.mark.parametrize(
    "read",
    [
        lambda mode: routes_need_reference(**NEEDS_DEFAULTS | {"disagree_mode": mode}),
        lambda mode: route_advantages(*[ZERO] * 3, torch.zeros(1), lambda_high=1.0, disagree_mode=mode),
        lambda mode: route_gated_advantages(*[ZERO] * 4, torch.zeros(1), lambda_high=1.0, disagree_mode=mode),
        lambda mode: route_lambdas(ZERO, ZERO, torch.zeros(1), lambda_high=1.0, disagree_mode=mode),
    ],
)
def test_an_unknown_mode_is_refused_by_every_reading(read: Any) -> None:
    with pytest.raises(ValueError, match=r"`disagree_mode` must be one of interp, .*, got 'mute'"):
        read("mute")


# --- signs and classes -----------------------------------------------------------------------------------------------
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
