"""The sign-consistency gate and the routing of every token's advantage through it."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sg_opd_trl.core._checks import check_choice, check_floating, check_number, check_shape, check_tensor, detached
from sg_opd_trl.core.log_ratio import extrapolated_advantage, reverse_kl_advantage

DISAGREE_MODES = ("interp", "interp_lambda", "preserve", "grpo", "cells")
NEUTRAL_MODES = ("base", "conflict")
#: |a1| up to here is a group without variance: (r - mu) / (sigma + epsilon) of equal rewards is rounding noise.
VERIFIER_ZERO = 1e-6


class RouteReferences(NamedTuple):
    """Which routes have a lambda other than 1 and so need the reference's log-probs."""

    consensus: bool
    conflict: bool
    neutral: bool


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
    check_floating(2, teacher_advantages=teacher_advantages)
    check_number("dead_zone", dead_zone, low=0.0, reason="It is a magnitude on |a2|. Set it to 0 to disable.")
    teacher = detached(teacher_advantages)
    verifier = verifier_per_token(verifier_advantages, teacher)
    decided = (verifier.abs() > VERIFIER_ZERO) & (teacher.abs() > dead_zone)
    agree = (verifier > 0) == (teacher > 0)
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
        disagree_mode: `interp`, `interp_lambda`, `preserve`, `grpo` or `cells`.
        disagree_interp_beta: beta of `interp` and `interp_lambda`.
        neutral_mode: `base` or `conflict`.
        cell_lambdas: Lambdas of (sign a1, sign a2) = ++, +-, -+, --.

    Returns:
        `(B, T)` advantages, detached, float32 or wider.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: A shape, a number or a name is out of range, or a route needs the reference and it is None.
    """
    lambdas = lambdas_of_routes(
        True, lambda_high, lambda_base, disagree_mode, disagree_interp_beta, neutral_mode, cell_lambdas
    )
    _check_reference(reference_logps, lambdas)
    teacher = reverse_kl_advantage(student_logps, teacher_logps)
    check_tensor("gate", gate)
    check_shape("gate", gate, "student_logps", teacher.shape)
    verifier = verifier_per_token(verifier_advantages, teacher)
    extrapolate = partial(extrapolated_advantage, student_logps, teacher_logps, reference_logps)
    if disagree_mode == "cells":
        consensus, conflict = _cell_advantages(teacher, verifier, extrapolate, cell_lambdas)
    else:
        beta, consensus = disagree_interp_beta, extrapolate(lambda_high)
        conflict = _conflict_advantage(teacher, verifier, extrapolate, disagree_mode, beta, lambda_base)
    routed = torch.where(gate > 0, consensus, conflict)
    return routed if neutral_mode == "conflict" else torch.where(gate == 0, extrapolate(lambda_base), routed)


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
    """Which routes read the reference: those with a lambda other than 1, the only ones that a forward is worth.

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
    lambdas = lambdas_of_routes(
        sign_gated, lambda_high, lambda_base, disagree_mode, disagree_interp_beta, neutral_mode, cell_lambdas
    )
    return RouteReferences(**{route: any(lam != 1 for lam in named.values()) for route, named in lambdas.items()})


def lambdas_of_routes(
    sign_gated: bool,
    lambda_high: float,
    lambda_base: float,
    disagree_mode: str,
    disagree_interp_beta: float,
    neutral_mode: str,
    cell_lambdas: Sequence[float],
) -> dict[str, dict[str, float]]:
    """Per route, the lambdas that it may use, under the name of their setting."""
    check_choice("disagree_mode", disagree_mode, DISAGREE_MODES)
    check_choice("neutral_mode", neutral_mode, NEUTRAL_MODES)
    if len(cell_lambdas) != 4:
        raise ValueError(
            f"`cell_lambdas` must hold 4 numbers, got {len(cell_lambdas)}. There is one per sign cell of (a1, a2). "
            f"Set them in the order ++, +-, -+, --."
        )
    base, beta = {"lambda_base": lambda_base}, {"disagree_interp_beta": disagree_interp_beta}
    cells = {f"cell_lambdas[{index}]": lam for index, lam in enumerate(cell_lambdas)}
    for name, value in {"lambda_high": lambda_high, **base, **beta, **cells}.items():
        check_number(name, value, low=-math.inf, reason="It multiplies log-probs. Set it to 1 for plain distillation.")
    if not sign_gated:
        return {"consensus": base, "conflict": base, "neutral": base}
    opposed = {name: cells[name] for name in ("cell_lambdas[1]", "cell_lambdas[2]")}
    by_mode = {"interp": {}, "interp_lambda": beta, "preserve": base, "grpo": {}, "cells": opposed}
    agreed = {name: cells[name] for name in ("cell_lambdas[0]", "cell_lambdas[3]")}
    return {
        "consensus": agreed if disagree_mode == "cells" else {"lambda_high": lambda_high},
        "conflict": by_mode[disagree_mode],
        "neutral": base if neutral_mode == "base" else by_mode[disagree_mode],
    }


def _check_reference(reference_logps: Tensor | None, lambdas: dict[str, dict[str, float]]) -> None:
    """Name the first lambda that cannot do without the reference, if there is none."""
    if reference_logps is not None:
        return
    for route, named in lambdas.items():
        for name, lam in named.items():
            if lam != 1:
                raise ValueError(
                    f"`reference_logps` must be given, got None. `{name}`={lam} weighs teacher against reference on "
                    f"{route} tokens. Set `{name}` to 1 or pass the reference's log-probs."
                )


def _conflict_advantage(
    teacher: Tensor,
    verifier: Tensor,
    extrapolate: Callable[[float], Tensor],
    disagree_mode: str,
    beta: float,
    lambda_base: float,
) -> Tensor:
    """Eq. 7 and its alternatives, on every position."""
    if disagree_mode == "interp":
        return beta * teacher
    if disagree_mode == "grpo":
        return verifier
    return extrapolate(beta if disagree_mode == "interp_lambda" else lambda_base)


def _cell_advantages(
    teacher: Tensor, verifier: Tensor, extrapolate: Callable[[float], Tensor], cell_lambdas: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """A of the ++ and -- cells, and of the +- and -+ cells, each picked by the sign of a2."""
    both_up, verifier_up, teacher_up, both_down = (extrapolate(lam) for lam in cell_lambdas)
    # Without a sign of its own, a2 = 0 counts as opposed to a1: only neutral tokens treated as conflicts get here.
    upwards = (teacher > 0) | ((teacher == 0) & (verifier < 0))
    return torch.where(upwards, both_up, both_down), torch.where(upwards, teacher_up, verifier_up)


def verifier_per_token(verifier_advantages: Tensor, teacher_advantages: Tensor) -> Tensor:
    """a1 as `(B, T)` in the dtype of a2; an abstention (NaN) becomes 0."""
    check_tensor("verifier_advantages", verifier_advantages)
    check_floating(2 if verifier_advantages.dim() == 2 else 1, verifier_advantages=verifier_advantages)
    verifier = verifier_advantages if verifier_advantages.dim() == 2 else verifier_advantages.unsqueeze(1)
    shape = teacher_advantages.shape if verifier_advantages.dim() == 2 else (teacher_advantages.shape[0], 1)
    check_shape("verifier_advantages", verifier, "teacher_advantages (one per row or per token)", shape)
    verifier = verifier.detach().to(teacher_advantages.dtype)
    return torch.where(verifier.isnan(), 0.0, verifier).expand_as(teacher_advantages)
