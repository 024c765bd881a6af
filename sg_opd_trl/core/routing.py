"""The sign-consistency gate, and the one table that says where the tokens of each class go.

Whatever depends on a `disagree_mode` asks `DISAGREE_ROUTES`: the advantages, the targets of distributions, who needs
the reference, which settings are used, what their help says, and what is refused.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sg_opd_trl.core._checks import Check, checked, number, one_of
from sg_opd_trl.core.advantage import FACTOR, extrapolated, log_ratio, reverse_kl_advantage

#: |a1| up to here is a group without variance: (r - mu) / (sigma + epsilon) of equal rewards is rounding noise.
VERIFIER_ZERO = 1e-6
#: Settings whose values a route may name; those of `cell_lambdas` are named one by one.
ROUTE_NUMBERS = (
    *("lambda_high", "lambda_base", "disagree_interp_beta"),
    *(f"cell_lambdas[{cell}]" for cell in range(4)),
)


# --- what a route is -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class RouteSettings:
    """The settings of the routes. The public functions take them one by one and hand on this; packing checks them."""

    lambda_high: float
    lambda_base: float
    disagree_mode: str
    disagree_interp_beta: float
    neutral_mode: str
    cell_lambdas: Sequence[float]

    def __post_init__(self) -> None:
        for name, check in _SETTING_CHECKS.items():
            check(name, getattr(self, name))

    def value_of(self, part: float | str) -> float:
        """A part of a route as a number: the one that it is, or that of the setting which it names."""
        if not isinstance(part, str):
            return part
        name, _, cell = part.partition("[")
        value = getattr(self, name)
        return value[int(cell.rstrip("]"))] if cell else value


class TokenSignals(NamedTuple):
    """What the routes read of the tokens, `(B, T)` each.

    Attributes:
        a1: the verifier's advantage, 0 where it abstained.
        a2: the teacher's advantage over the student.
        gain: lT - lR; None where no lambda differs from 1, and for targets, which do not read it.
    """

    a1: Tensor
    a2: Tensor
    gain: Tensor | None


class RoutedLambdas(NamedTuple):
    """Which target a token is matched to, and how much that counts.

    Attributes:
        lambdas: `(B, T)` extrapolation factors of the target.
        scales: `(B, T)` factors of the loss.
    """

    lambdas: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Route(ABC):
    """Where the tokens of a class go. Each field is a number, or the name of the setting that holds it.

    All that is asked of a route is a method here, so that a further kind of route answers it all or fails when the
    table is imported.
    """

    def __post_init__(self) -> None:
        for part in astuple(self):
            if isinstance(part, str) and part not in ROUTE_NUMBERS:
                raise ValueError(f"A route names {part!r}, which is no setting of the routes: {ROUTE_NUMBERS}.")

    def settings(self) -> set[str]:
        """Names of the settings that it reads."""
        return {part.partition("[")[0] for part in astuple(self) if isinstance(part, str)}

    @property
    @abstractmethod
    def has_distribution(self) -> bool:
        """Whether it names a target for the distribution at the token's position, and not only an advantage."""

    @abstractmethod
    def lambdas(self, settings: RouteSettings) -> dict[str, float]:
        """The lambdas that it may use, under the name of their setting or as the number that they are."""

    @abstractmethod
    def advantage(self, tokens: TokenSignals, settings: RouteSettings) -> Tensor:
        """The advantage of every token that goes this way, `(B, T)`."""

    @abstractmethod
    def target(self, tokens: TokenSignals, settings: RouteSettings) -> RoutedLambdas:
        """The target of every token's distribution; only asked where `has_distribution`."""


@dataclass(frozen=True)
class TeacherRoute(Route):
    """`scale * A(lambda)`: towards the teacher, extrapolated.

    Attributes:
        lambda_up: of tokens that the teacher likes more than the student does, a2 > 0.
        lambda_down: of tokens that it likes less.
        scale: of the advantage, or of the loss where distributions are matched.
    """

    lambda_up: float | str
    lambda_down: float | str
    scale: float | str

    @property
    def has_distribution(self) -> bool:
        """The teacher's, extrapolated in full."""
        return True

    def lambdas(self, settings: RouteSettings) -> dict[str, float]:
        """One, or two that may be equal."""
        return {str(part): settings.value_of(part) for part in (self.lambda_up, self.lambda_down)}

    def advantage(self, tokens: TokenSignals, settings: RouteSettings) -> Tensor:
        """scale * A(lambda)."""
        up, down = settings.value_of(self.lambda_up), settings.value_of(self.lambda_down)
        towards_target = extrapolated(tokens.a2, tokens.gain, up)
        if up != down:
            downwards = extrapolated(tokens.a2, tokens.gain, down)
            towards_target = torch.where(_upwards(tokens), towards_target, downwards)
        return _scaled(towards_target, settings.value_of(self.scale))

    def target(self, tokens: TokenSignals, settings: RouteSettings) -> RoutedLambdas:
        """Lambda and scale, whose product with A is the advantage."""
        up, down = settings.value_of(self.lambda_up), settings.value_of(self.lambda_down)
        lambdas = torch.full_like(tokens.a2, up)
        if up != down:
            lambdas = torch.where(_upwards(tokens), lambdas, down)
        return RoutedLambdas(lambdas, torch.full_like(tokens.a2, settings.value_of(self.scale)))


@dataclass(frozen=True)
class VerifierRoute(Route):
    """`scale * a1`: the verifier's own advantage, as in GRPO.

    Attributes:
        scale: of the advantage.
    """

    scale: float | str = 1.0

    @property
    def has_distribution(self) -> bool:
        """None: the verifier judges the token that was sampled and says nothing of the others."""
        return False

    def lambdas(self, settings: RouteSettings) -> dict[str, float]:
        """None: neither teacher nor reference is read."""
        return {}

    def advantage(self, tokens: TokenSignals, settings: RouteSettings) -> Tensor:
        """scale * a1."""
        return _scaled(tokens.a1, settings.value_of(self.scale))

    def target(self, tokens: TokenSignals, settings: RouteSettings) -> RoutedLambdas:
        """Raises: there is none."""
        raise TypeError("The verifier's advantage is of one token and no target distribution.")


def towards(lam: float | str, *, scale: float | str = 1.0) -> TeacherRoute:
    """The route with one lambda whatever the sign of a2."""
    return TeacherRoute(lam, lam, scale)


def _scaled(advantages: Tensor, scale: float) -> Tensor:
    # Nearly all scales are 1: no pass over the tokens for those.
    return advantages if scale == 1 else scale * advantages


def _upwards(tokens: TokenSignals) -> Tensor:
    """Where a2 points up. Without a sign of its own, a2 = 0 counts as opposed to a1.

    Only neutral tokens that are treated as conflicts have such an a2 here.
    """
    return (tokens.a2 > 0) | ((tokens.a2 == 0) & (tokens.a1 < 0))


# --- the table -------------------------------------------------------------------------------------------------------
class DisagreeMode(NamedTuple):
    """What a `disagree_mode` is. There are no defaults: an entry that forgets something fails when it is imported.

    Attributes:
        consensus: route of the tokens on which verifier and teacher agree.
        conflict: route of those on which they do not, and of neutral ones under neutral_mode="conflict".
        forward_kl: set False if conflict tokens must never be pulled to the teacher; the mode is then refused together
            with `asymmetric`, which pulls the tokens that the teacher likes less to it in full, whatever their route.
        help: what a conflict token's advantage is, for the help of the setting and the model card.
    """

    consensus: Route
    conflict: Route
    forward_kl: bool
    help: str

    def settings(self) -> set[str]:
        """Names of the settings that its routes read."""
        return self.consensus.settings() | self.conflict.settings()

    def has_distributions(self) -> bool:
        """Whether a loss over distributions can follow it."""
        return self.consensus.has_distribution and self.conflict.has_distribution


# A new mode is one entry here: nothing else in the package has to name it. Tests then ask for its row in
# docs/methods.md and for its equation in their oracle.
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
        conflict=VerifierRoute(),
        # The policy gradient of `asymmetric` takes a1 like any other advantage, and its forward KL reads no mode's
        # route (AOPD has no gate): conflict tokens that it matches go to the teacher, here as under the other modes.
        forward_kl=True,
        help="the verifier's advantage",
    ),
    "cells": DisagreeMode(
        # One lambda for each of (sign a1, sign a2) = ++, +-, -+, --. The sign of a2 picks up or down.
        consensus=TeacherRoute(lambda_up="cell_lambdas[0]", lambda_down="cell_lambdas[3]", scale=1.0),  # ++ --
        conflict=TeacherRoute(lambda_up="cell_lambdas[2]", lambda_down="cell_lambdas[1]", scale=1.0),  # -+ +-
        forward_kl=True,
        help="A(lambda) with one lambda per pair of signs (paper, appendix H)",
    ),
}
#: Of neutral tokens under neutral_mode="base", and of all tokens without the gate.
BASE_ROUTE = towards("lambda_base")
DISAGREE_MODES = tuple(DISAGREE_ROUTES)
NEUTRAL_MODES = ("base", "conflict")


def disagree_mode_help() -> str:
    """Every mode and what it makes of a conflict token, for the help of a setting."""
    return ", ".join(f"{name!r} {mode.help}" for name, mode in DISAGREE_ROUTES.items())


def modes_without_distribution() -> tuple[str, ...]:
    """Modes with a route that names no target, so that no loss over distributions can follow them."""
    return tuple(name for name, mode in DISAGREE_ROUTES.items() if not mode.has_distributions())


def modes_without_forward_kl() -> tuple[str, ...]:
    """Modes that must not meet the forward KL of `asymmetric`, which does not read the route of a token."""
    return tuple(name for name, mode in DISAGREE_ROUTES.items() if not mode.forward_kl)


def disagree_modes_using(setting: str) -> tuple[str, ...]:
    """Modes whose routes of consensus or conflict tokens read a setting: `lambda_high`, ..., or `cell_lambdas`.

    Raises:
        ValueError: It is no setting that a route can read.
    """
    readable = dict.fromkeys(part.partition("[")[0] for part in ROUTE_NUMBERS)
    if setting not in readable:
        raise ValueError(
            f"`setting` must be one of {', '.join(readable)}, got {setting!r}. Routes read no other "
            "settings. Set it to one of them."
        )
    return tuple(name for name, mode in DISAGREE_ROUTES.items() if setting in mode.settings())


# --- the gate --------------------------------------------------------------------------------------------------------
@checked(
    teacher_advantages="const B T",
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
    a2 = teacher_advantages
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
    """Gate and routing in one call: the advantage of every token (SG-OPD, arXiv:2606.09304, Eq. 4 and then Eq. 5-8).

    The trainer calls the two apart, `sign_consistency_gate` and `route_gated_advantages`: between them a control may
    replace the gate, and the metrics count it.

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


# --- where the tokens of each class go -------------------------------------------------------------------------------
@checked(
    student_logps="const B T",
    teacher_logps="const B T",
    reference_logps="const B T like teacher_logps",
    gate="any B T",
    verifier_advantages="float B|B T",
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
    settings = RouteSettings(
        lambda_high=lambda_high,
        lambda_base=lambda_base,
        disagree_mode=disagree_mode,
        disagree_interp_beta=disagree_interp_beta,
        neutral_mode=neutral_mode,
        cell_lambdas=cell_lambdas,
    )
    routes = _routes(settings)
    if reference_logps is None:
        _require_no_reference(routes, settings)
    a2 = log_ratio(of=teacher_logps, over=student_logps)
    gain = None if reference_logps is None else log_ratio(of=teacher_logps, over=reference_logps)
    tokens = TokenSignals(_per_token(verifier_advantages, a2), a2, gain)
    # Once per route, not per class: conflict and neutral tokens may share one.
    advantages = {route: route.advantage(tokens, settings) for route in dict.fromkeys(routes)}
    return _by_class(gate, *(advantages[route] for route in routes))


@checked(
    teacher_advantages="const B T",
    gate="any B T",
    verifier_advantages="float B|B T",
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
        ValueError: A shape, a number or a name is out of range, or `disagree_mode` is one of
            `modes_without_distribution`.
    """
    settings = RouteSettings(
        lambda_high=lambda_high,
        lambda_base=lambda_base,
        disagree_mode=disagree_mode,
        disagree_interp_beta=disagree_interp_beta,
        neutral_mode=neutral_mode,
        cell_lambdas=cell_lambdas,
    )
    routes = _routes(settings)
    if not all(route.has_distribution for route in routes):
        others = [mode for mode in DISAGREE_MODES if mode not in modes_without_distribution()]
        raise ValueError(
            f"`disagree_mode` must be one of {', '.join(others)} here, got {disagree_mode!r}. The verifier's "
            f"advantage is of one token and no target distribution. Set `disagree_mode` to one of them."
        )
    a2 = teacher_advantages
    tokens = TokenSignals(_per_token(verifier_advantages, a2), a2, gain=None)
    targets = [route.target(tokens, settings) for route in routes]
    return RoutedLambdas(
        lambdas=_by_class(gate, *(target.lambdas for target in targets)),
        scales=_by_class(gate, *(target.scales for target in targets)),
    )


class RouteReferences(NamedTuple):
    """Which routes have a lambda other than 1 and so need the reference's log-probs."""

    consensus: bool
    conflict: bool
    neutral: bool


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
    settings = RouteSettings(
        lambda_high=lambda_high,
        lambda_base=lambda_base,
        disagree_mode=disagree_mode,
        disagree_interp_beta=disagree_interp_beta,
        neutral_mode=neutral_mode,
        cell_lambdas=cell_lambdas,
    )
    routes = _routes(settings) if sign_gated else _Routes(BASE_ROUTE, BASE_ROUTE, BASE_ROUTE)
    return RouteReferences(*(any(lam != 1 for lam in route.lambdas(settings).values()) for route in routes))


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


# --- shared ----------------------------------------------------------------------------------------------------------
class _Routes(NamedTuple):
    """The routes of the three classes."""

    consensus: Route
    conflict: Route
    neutral: Route


def _routes(settings: RouteSettings) -> _Routes:
    """The routes of a run."""
    mode = DISAGREE_ROUTES[settings.disagree_mode]
    neutral = mode.conflict if settings.neutral_mode == "conflict" else BASE_ROUTE
    return _Routes(mode.consensus, mode.conflict, neutral)


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
_SETTING_CHECKS: dict[str, Check] = {
    "disagree_mode": one_of(*DISAGREE_MODES),
    "neutral_mode": one_of(*NEUTRAL_MODES),
    "lambda_high": FACTOR,
    "lambda_base": FACTOR,
    "disagree_interp_beta": FACTOR,
    "cell_lambdas": _cell_lambdas,
}


def _require_no_reference(routes: _Routes, settings: RouteSettings) -> None:
    """Name the first lambda that cannot do without the reference."""
    for name, route in routes._asdict().items():
        for setting, lam in sorted(route.lambdas(settings).items()):
            if lam != 1:
                raise ValueError(
                    f"`reference_logps` must be given, got None. `{setting}`={lam} weighs teacher against reference "
                    f"on {name} tokens. Set `{setting}` to 1 or pass the reference's log-probs."
                )


def _by_class(gate: Tensor, consensus: Tensor, conflict: Tensor, neutral: Tensor) -> Tensor:
    """Each token's entry of its class."""
    # Only an optimisation: one `where` less where both classes share a route, with the same result.
    if neutral is conflict:
        return torch.where(gate > 0, consensus, conflict)
    return torch.where(gate > 0, consensus, torch.where(gate == 0, neutral, conflict))


def _per_token(verifier_advantages: Tensor, a2: Tensor) -> Tensor:
    """a1 as `(B, T)` in the dtype of a2; an abstention (NaN) becomes 0."""
    a1 = verifier_advantages.detach().to(a2.dtype)
    a1 = a1 if a1.dim() == 2 else a1.unsqueeze(1)
    return torch.where(a1.isnan(), 0.0, a1).expand_as(a2)
