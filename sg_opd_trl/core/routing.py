"""The sign-consistency gate, and the one table that says where the tokens of each class go.

Advantages, targets of distributions and "who needs the reference" are three readings of `DISAGREE_ROUTES`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from sg_opd_trl.core._checks import checked, detached, number, one_of
from sg_opd_trl.core.advantage import FACTOR, extrapolated, log_ratio, reverse_kl_advantage

#: |a1| up to here is a group without variance: (r - mu) / (sigma + epsilon) of equal rewards is rounding noise.
VERIFIER_ZERO = 1e-6
#: Settings whose values a route may name; those of `cell_lambdas` are named one by one.
ROUTE_NUMBERS = (
    *("lambda_high", "lambda_base", "disagree_interp_beta"),
    *(f"cell_lambdas[{cell}]" for cell in range(4)),
)


# --- the table -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Route:
    """A way through the gate: `scale * A(lambda)`. Each part is a number, or the setting that holds it.

    Attributes:
        lambda_up: of tokens that the teacher likes more than the student does, a2 > 0.
        lambda_down: of tokens that it likes less.
        scale: of the advantage, or of the loss where distributions are matched.
    """

    lambda_up: float | str
    lambda_down: float | str
    scale: float | str

    def __post_init__(self) -> None:
        for part in astuple(self):
            if isinstance(part, str) and part not in ROUTE_NUMBERS:
                raise ValueError(f"A route names {part!r}, which is no setting of the routes: {ROUTE_NUMBERS}.")


#: The only route that is no `scale * A(lambda)`: the verifier's own advantage. It names no distribution.
A1: Final = "a1"
AnyRoute = Route | Literal["a1"]


def towards(lam: float | str, *, scale: float | str = 1.0) -> Route:
    """The route with one lambda whatever the sign of a2."""
    return Route(lam, lam, scale)


class DisagreeMode(NamedTuple):
    """What a `disagree_mode` is. There are no defaults: an entry that forgets something fails when it is imported.

    Attributes:
        consensus: route of the tokens on which verifier and teacher agree.
        conflict: route of those on which they do not, and of neutral ones under neutral_mode="conflict".
        forward_kl: whether it goes with `asymmetric`, whose forward KL matches a token to the teacher in full and does
            not read its route. A mode that must not leave a conflict token to the teacher says False and is refused.
        help: what a conflict token's advantage is, for the help of the setting.
    """

    consensus: Route
    conflict: AnyRoute
    forward_kl: bool
    help: str

    def settings(self) -> set[str]:
        """Names of the settings that its routes read."""
        routes = [route for route in (self.consensus, self.conflict) if isinstance(route, Route)]
        return {part.partition("[")[0] for route in routes for part in astuple(route) if isinstance(part, str)}


DISAGREE_ROUTES: dict[str, DisagreeMode] = {
    "interp": DisagreeMode(
        consensus=towards("lambda_high"),
        conflict=towards(1.0, scale="disagree_interp_beta"),
        forward_kl=True,
        help="beta*a2 (paper, Eq. 7)",
    ),
    "interp_lambda": DisagreeMode(
        consensus=towards("lambda_high"),
        conflict=towards("disagree_interp_beta"),
        forward_kl=True,
        help="A(beta) (our choice, the other reading of 'interp')",
    ),
    "preserve": DisagreeMode(
        consensus=towards("lambda_high"),
        conflict=towards("lambda_base"),
        forward_kl=True,
        help="A(lambda_base)",
    ),
    "grpo": DisagreeMode(
        consensus=towards("lambda_high"),
        conflict=A1,
        forward_kl=True,
        help="the verifier's advantage",
    ),
    "cells": DisagreeMode(
        # One lambda for each of (sign a1, sign a2) = ++, +-, -+, --.
        consensus=Route("cell_lambdas[0]", "cell_lambdas[3]", scale=1.0),
        conflict=Route("cell_lambdas[2]", "cell_lambdas[1]", scale=1.0),
        forward_kl=True,
        help="A(lambda) with one lambda per pair of signs (paper, appendix H)",
    ),
}
DISAGREE_MODES = tuple(DISAGREE_ROUTES)
NEUTRAL_MODES = ("base", "conflict")


def disagree_mode_help() -> str:
    """Every mode and what it makes of a conflict token, for the help of a setting."""
    return ", ".join(f"{name!r} {mode.help}" for name, mode in DISAGREE_ROUTES.items())


def modes_without_distribution() -> tuple[str, ...]:
    """Modes with a route that names no target, so that no loss over distributions can follow them."""
    return tuple(name for name, mode in DISAGREE_ROUTES.items() if A1 in (mode.consensus, mode.conflict))


def modes_without_forward_kl() -> tuple[str, ...]:
    """Modes that must not meet the forward KL of `asymmetric`, which does not read the route of a token."""
    return tuple(name for name, mode in DISAGREE_ROUTES.items() if not mode.forward_kl)


def disagree_modes_using(setting: str) -> tuple[str, ...]:
    """Modes whose routes of consensus or conflict tokens read a setting: `lambda_high`, ..., or `cell_lambdas`."""
    return tuple(name for name, mode in DISAGREE_ROUTES.items() if setting in mode.settings())


# --- the gate --------------------------------------------------------------------------------------------------------
@checked(
    teacher_advantages="float B T",
    dead_zone=number(0.0, reason="It is a magnitude on |a2|. Set it to 0 to disable."),
    verifier_advantages="float B|B T",
)
def sign_consistency_gate(verifier_advantages: Tensor, teacher_advantages: Tensor, dead_zone: float = 0.0) -> Tensor:
    """Whether verifier and teacher push a sampled token the same way.

        g = sign(a1) sign(a2), and 0 where |a1| <= 1e-6, a2 = 0 or |a2| <= dead_zone

    SG-OPD (arXiv:2606.09304) Eq. 4, with the zeros as a class of their own (its Figure 7) instead of conflicts.

    Args:
        verifier_advantages: a1, `(B,)` or `(B, T)`; NaN (abstained) counts as 0.
        teacher_advantages: a2, `(B, T)` in nats, positive where the teacher prefers the token.
        dead_zone: |a2| in nats up to which its sign is taken for noise.

    Returns:
        `(B, T)` int8: +1 consensus, -1 conflict, 0 neutral.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: The shapes do not fit, or `dead_zone` is negative or not finite.
    """
    a2 = detached(teacher_advantages)
    a1 = _per_token(verifier_advantages, a2)
    decided = (a1.abs() > VERIFIER_ZERO) & (a2.abs() > dead_zone)
    agree = (a1 > 0) == (a2 > 0)
    return torch.where(decided, 2 * agree.to(torch.int8) - 1, 0).to(torch.int8)


def route_advantages(
    student_logps: Tensor,
    teacher_logps: Tensor,
    reference_logps: Tensor | None,
    verifier_advantages: Tensor,
    *,
    lambda_high: float,
    lambda_base: float = 1.0,
    disagree_mode: str = "interp",
    disagree_interp_beta: float = 1.0,
    neutral_mode: str = "base",
    dead_zone: float = 0.0,
    cell_lambdas: Sequence[float] = (1.5, 1.0, 1.0, 1.5),
) -> Tensor:
    """Advantage of every token: the gate of Eq. 4 followed by the routing of Eq. 5-8 of SG-OPD (arXiv:2606.09304).

    Args:
        student_logps: `(B, T)` lS in nats.
        teacher_logps: `(B, T)` lT in nats.
        reference_logps: `(B, T)` lR in nats; None where no route has a lambda other than 1.
        verifier_advantages: a1, `(B,)` or `(B, T)`.
        lambda_high: See `route_gated_advantages`, as for all that follow but `dead_zone`.
        lambda_base: Lambda of neutral tokens, and of conflicts under `preserve`.
        disagree_mode: Equation of conflicts.
        disagree_interp_beta: beta of `interp` and `interp_lambda`.
        neutral_mode: `base` or `conflict`.
        dead_zone: |a2| in nats up to which a token is neutral.
        cell_lambdas: Lambdas of `cells`.

    Returns:
        `(B, T)` advantages, detached, float32 or wider.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: A shape, a number or a name is out of range, or a route needs the reference and it is None.
    """
    gate = sign_consistency_gate(verifier_advantages, reverse_kl_advantage(student_logps, teacher_logps), dead_zone)
    return route_gated_advantages(
        gate,
        student_logps,
        teacher_logps,
        reference_logps,
        verifier_advantages,
        lambda_high=lambda_high,
        lambda_base=lambda_base,
        disagree_mode=disagree_mode,
        disagree_interp_beta=disagree_interp_beta,
        neutral_mode=neutral_mode,
        cell_lambdas=cell_lambdas,
    )


# --- three readings of the table -------------------------------------------------------------------------------------
def _cell_lambdas(name: str, lambdas: Sequence[float]) -> None:
    """One finite number per pair of signs."""
    if len(lambdas) != 4:
        raise ValueError(
            f"`{name}` must hold 4 numbers, got {len(lambdas)}. There is one per sign cell of (a1, a2). Set them in "
            f"the order ++, +-, -+, --."
        )
    for cell, lam in enumerate(lambdas):
        FACTOR(f"{name}[{cell}]", lam)


#: What the settings of the routes have to be, wherever they are given.
_SETTINGS: dict[str, Any] = {
    "disagree_mode": one_of(*DISAGREE_MODES),
    "neutral_mode": one_of(*NEUTRAL_MODES),
    "lambda_high": FACTOR,
    "lambda_base": FACTOR,
    "disagree_interp_beta": FACTOR,
    "cell_lambdas": _cell_lambdas,
}


@checked(
    student_logps="float B T",
    teacher_logps="float B T",
    reference_logps="float B T like teacher_logps",
    gate="any B T",
    verifier_advantages="float B|B T",
    **_SETTINGS,
)
def route_gated_advantages(
    gate: Tensor,
    student_logps: Tensor,
    teacher_logps: Tensor,
    reference_logps: Tensor | None,
    verifier_advantages: Tensor,
    *,
    lambda_high: float,
    lambda_base: float = 1.0,
    disagree_mode: str = "interp",
    disagree_interp_beta: float = 1.0,
    neutral_mode: str = "base",
    cell_lambdas: Sequence[float] = (1.5, 1.0, 1.0, 1.5),
) -> Tensor:
    """Advantage of every token under a gate that is already known (SG-OPD, arXiv:2606.09304, Eq. 5-8).

        consensus  A(lambda_high)
        conflict   interp beta a2 | interp_lambda A(beta) | preserve A(lambda_base) | grpo a1
        neutral    A(lambda_base), or the conflict's under neutral_mode="conflict" (Eq. 4 to the letter)

    A is `extrapolated_advantage`. `cells` (appendix H) takes the lambda of the token's sign cell, for neutral tokens
    under neutral_mode="conflict" that of the conflict cell with their a2 (or, at a2 = 0, with their a1).

    Args:
        gate: `(B, T)`: +1 consensus, -1 conflict, 0 neutral.
        student_logps: `(B, T)` lS in nats.
        teacher_logps: `(B, T)` lT in nats.
        reference_logps: `(B, T)` lR in nats; None where no route has a lambda other than 1.
        verifier_advantages: a1, `(B,)` or `(B, T)`, NaN counts as 0; beyond its sign only `grpo` reads it.
        lambda_high: Lambda of consensus tokens (not in `cells`).
        lambda_base: Lambda of neutral tokens, and of conflicts under `preserve`.
        disagree_mode: A key of `DISAGREE_ROUTES`.
        disagree_interp_beta: beta of `interp` and `interp_lambda`.
        neutral_mode: `base` or `conflict`.
        cell_lambdas: Lambdas of (sign a1, sign a2) = ++, +-, -+, --.

    Returns:
        `(B, T)` advantages, detached, float32 or wider.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: A shape, a number or a name is out of range, or a route needs the reference and it is None.
    """
    values = _values(lambda_high, lambda_base, disagree_interp_beta, cell_lambdas)
    routes = _routes(disagree_mode, neutral_mode)
    if reference_logps is None:
        _require_no_reference(routes, values)
    a2 = log_ratio(teacher_logps, student_logps)
    gain = None if reference_logps is None else log_ratio(teacher_logps, reference_logps)
    a1 = _per_token(verifier_advantages, a2)

    def advantage(route: AnyRoute) -> Tensor:
        if not isinstance(route, Route):
            return a1
        scale, up, down = _read(route, values)
        towards_target = extrapolated(a2, gain, up)
        if up != down:
            towards_target = torch.where(_upwards(a1, a2), towards_target, extrapolated(a2, gain, down))
        return towards_target if scale == 1 else scale * towards_target

    # Once per route, not per class: conflict and neutral tokens may share one.
    advantages = {route: advantage(route) for route in dict.fromkeys(routes)}
    return _by_class(gate, *(advantages[route] for route in routes))


class RoutedLambdas(NamedTuple):
    """Which target a token is matched to, and how much that counts.

    Attributes:
        lambdas: `(B, T)` extrapolation factors of the target.
        scales: `(B, T)` factors of the loss.
    """

    lambdas: Tensor
    scales: Tensor


@checked(
    teacher_advantages="float B T",
    gate="any B T",
    verifier_advantages="float B|B T",
    **_SETTINGS,
)
def route_lambdas(
    gate: Tensor,
    teacher_advantages: Tensor,
    verifier_advantages: Tensor,
    *,
    lambda_high: float,
    lambda_base: float = 1.0,
    disagree_mode: str = "interp",
    disagree_interp_beta: float = 1.0,
    neutral_mode: str = "base",
    cell_lambdas: Sequence[float] = (1.5, 1.0, 1.0, 1.5),
) -> RoutedLambdas:
    """The routes of `route_gated_advantages` for a loss over distributions: its advantage is `scale * A(lambda)`.

        consensus  lambda_high
        conflict   interp 1, scaled by beta | interp_lambda beta | preserve lambda_base
        neutral    lambda_base, or the conflict's under neutral_mode="conflict"

    `cells` takes the lambda of the token's sign cell, as there. SG-OPD (arXiv:2606.09304) Eq. 5-8; that the sampled
    token's class picks the target of its whole position is our generalisation.

    Args:
        gate: `(B, T)`: +1 consensus, -1 conflict, 0 neutral.
        teacher_advantages: `(B, T)` a2 of the sampled tokens.
        verifier_advantages: a1, `(B,)` or `(B, T)`, NaN counts as 0.
        lambda_high: As in `route_gated_advantages`, as for all that follow.
        lambda_base: As there.
        disagree_mode: As there, but for `modes_without_distribution`.
        disagree_interp_beta: As there.
        neutral_mode: As there.
        cell_lambdas: As there.

    Returns:
        Lambdas and scales, detached, float32 or wider.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: A shape, a number or a name is out of range, or `disagree_mode` is one `without_distribution`.
    """
    routes = _routes(disagree_mode, neutral_mode)
    targets = [route for route in routes if isinstance(route, Route)]
    if len(targets) < len(routes):
        raise ValueError(
            f"`disagree_mode` must not be {disagree_mode!r}, got {disagree_mode!r}. The verifier's advantage is of "
            f"one token and no target distribution. Set `disagree_mode` to 'interp'."
        )
    values = _values(lambda_high, lambda_base, disagree_interp_beta, cell_lambdas)
    a2 = detached(teacher_advantages)
    a1 = _per_token(verifier_advantages, a2)
    lambdas, scales = [], []
    for route in targets:
        scale, up, down = _read(route, values)
        constant = torch.full_like(a2, up)
        lambdas.append(constant if up == down else torch.where(_upwards(a1, a2), constant, down))
        scales.append(torch.full_like(a2, scale))
    return RoutedLambdas(_by_class(gate, *lambdas), _by_class(gate, *scales))


class RouteReferences(NamedTuple):
    """Which routes have a lambda other than 1 and so need the reference's log-probs."""

    consensus: bool
    conflict: bool
    neutral: bool


@checked(**_SETTINGS)
def routes_need_reference(
    *,
    sign_gated: bool,
    lambda_high: float,
    lambda_base: float,
    disagree_mode: str,
    disagree_interp_beta: float,
    neutral_mode: str,
    cell_lambdas: Sequence[float],
) -> RouteReferences:
    """Which classes of tokens need the reference's log-probs, from the settings alone.

    Args:
        sign_gated: False sends every token to A(lambda_base), whatever its class.
        lambda_high: As in `route_gated_advantages`, as for all that follow.
        lambda_base: As there.
        disagree_mode: As there.
        disagree_interp_beta: As there.
        neutral_mode: As there.
        cell_lambdas: As there.

    Returns:
        One bool per class of tokens.

    Raises:
        ValueError: A number or a name is out of range.
    """
    values = _values(lambda_high, lambda_base, disagree_interp_beta, cell_lambdas)
    routes = _routes(disagree_mode, neutral_mode) if sign_gated else _Routes(_BASE, _BASE, _BASE)
    return RouteReferences(*(any(lam != 1 for lam in _lambdas(route, values).values()) for route in routes))


@checked(verifier_advantages="float B")
def rows_needing_reference(verifier_advantages: Tensor, routes: RouteReferences) -> Tensor:
    """Rows of which some token may take a route with a lambda other than 1.

    A row with a verifier advantage can have tokens of all three classes, a row without one is neutral throughout.

    Args:
        verifier_advantages: a1, `(B,)`; NaN (abstained) counts as 0.
        routes: from `routes_need_reference`.

    Returns:
        `(B,)` bool.

    Raises:
        TypeError: `verifier_advantages` is not a floating tensor.
        ValueError: It does not have one dimension.
    """
    decided = verifier_advantages.abs() > VERIFIER_ZERO
    return torch.where(decided, any(routes), routes.neutral)


# --- how it is read --------------------------------------------------------------------------------------------------
class _Routes(NamedTuple):
    """The routes of the three classes."""

    consensus: AnyRoute
    conflict: AnyRoute
    neutral: AnyRoute


_BASE = towards("lambda_base")


def _routes(disagree_mode: str, neutral_mode: str) -> _Routes:
    """The routes of a run; a mode that is not in the table is a KeyError."""
    consensus, conflict = DISAGREE_ROUTES[disagree_mode][:2]
    return _Routes(consensus, conflict, neutral=conflict if neutral_mode == "conflict" else _BASE)


def _values(
    lambda_high: float, lambda_base: float, disagree_interp_beta: float, cell_lambdas: Sequence[float]
) -> dict[str, float]:
    """The numbers that the table names."""
    return dict(zip(ROUTE_NUMBERS, (lambda_high, lambda_base, disagree_interp_beta, *cell_lambdas), strict=True))


def _read(route: Route, values: Mapping[str, float]) -> tuple[float, float, float]:
    """Scale and lambdas, upwards and downwards, as numbers."""
    scale, up, down = (
        values[part] if isinstance(part, str) else part for part in (route.scale, route.lambda_up, route.lambda_down)
    )
    return scale, up, down


def _lambdas(route: AnyRoute, values: Mapping[str, float]) -> dict[str, float]:
    """The lambdas that a route may use, under the name of their setting or as the number that they are."""
    if not isinstance(route, Route):
        return {}
    _, up, down = _read(route, values)
    return {str(route.lambda_up): up, str(route.lambda_down): down}


def _require_no_reference(routes: _Routes, values: Mapping[str, float]) -> None:
    """Name the first lambda that cannot do without the reference."""
    for name, route in routes._asdict().items():
        for setting, lam in sorted(_lambdas(route, values).items()):
            if lam != 1:
                raise ValueError(
                    f"`reference_logps` must be given, got None. `{setting}`={lam} weighs teacher against reference "
                    f"on {name} tokens. Set `{setting}` to 1 or pass the reference's log-probs."
                )


def _by_class(gate: Tensor, consensus: Tensor, conflict: Tensor, neutral: Tensor) -> Tensor:
    """Each token's entry of its class."""
    if neutral is conflict:
        return torch.where(gate > 0, consensus, conflict)
    return torch.where(gate > 0, consensus, torch.where(gate == 0, neutral, conflict))


def _upwards(a1: Tensor, a2: Tensor) -> Tensor:
    """Where a2 points up. Without a sign of its own, a2 = 0 counts as opposed to a1.

    Only neutral tokens that are treated as conflicts have such an a2 here.
    """
    return (a2 > 0) | ((a2 == 0) & (a1 < 0))


def _per_token(verifier_advantages: Tensor, a2: Tensor) -> Tensor:
    """a1 as `(B, T)` in the dtype of a2; an abstention (NaN) becomes 0."""
    a1 = verifier_advantages.detach().to(a2.dtype)
    a1 = a1 if a1.dim() == 2 else a1.unsqueeze(1)
    return torch.where(a1.isnan(), 0.0, a1).expand_as(a2)
