"""Distillation of whole distributions: their targets under the gate, and how their losses enter the policy loss."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sg_opd_trl.core._checks import check_floating, check_mask, check_number, check_shape, check_tensor, detached
from sg_opd_trl.core.gate import lambdas_of_routes, verifier_per_token


class RoutedLambdas(NamedTuple):
    """Which target a token is matched to, and how much that counts.

    Attributes:
        lambdas: `(B, T)` extrapolation factors of the target.
        scales: `(B, T)` factors of the loss.
    """

    lambdas: Tensor
    scales: Tensor


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
        disagree_mode: As there, but for `grpo`, which has no distribution.
        disagree_interp_beta: As there.
        neutral_mode: As there.
        cell_lambdas: As there.

    Returns:
        Lambdas and scales, detached, float32 or wider.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: A shape, a number or a name is out of range, or `disagree_mode` is `grpo`.
    """
    lambdas_of_routes(True, lambda_high, lambda_base, disagree_mode, disagree_interp_beta, neutral_mode, cell_lambdas)
    if disagree_mode == "grpo":
        raise ValueError(
            "`disagree_mode` must not be 'grpo', got 'grpo'. The verifier's advantage is of one token and no target "
            "distribution. Set `disagree_mode` to 'interp'."
        )
    check_floating(2, teacher_advantages=teacher_advantages)
    check_tensor("gate", gate)
    check_shape("gate", gate, "teacher_advantages", teacher_advantages.shape)
    teacher = detached(teacher_advantages)
    verifier = verifier_per_token(verifier_advantages, teacher)
    base = torch.full_like(teacher, lambda_base)
    if disagree_mode == "cells":
        consensus, conflict = _cell_lambdas(teacher, verifier, cell_lambdas)
    else:
        fallback = {"interp": 1.0, "interp_lambda": disagree_interp_beta, "preserve": lambda_base}[disagree_mode]
        consensus, conflict = torch.full_like(teacher, lambda_high), torch.full_like(teacher, fallback)
    falls_back = gate < 0 if neutral_mode == "base" else gate <= 0
    lambdas = torch.where(gate > 0, consensus, torch.where(falls_back, conflict, base))
    beta = disagree_interp_beta if disagree_mode == "interp" else 1.0
    return RoutedLambdas(lambdas, torch.where(falls_back, beta, torch.ones_like(lambdas)))


def extrapolated_log_probs(
    teacher_log_probs: Tensor, reference_log_probs: Tensor | None, lambdas: Tensor | None
) -> Tensor:
    """The teacher's distribution extrapolated away from the reference's, over the vocabulary or a part of it.

        q(v) = pi_T(v)^lam pi_R(v)^(1 - lam) / sum_u pi_T(u)^lam pi_R(u)^(1 - lam)

    The distribution whose reverse KL has A(lam) of `extrapolated_advantage` as its policy-gradient advantage, up to a
    constant (G-OPD, arXiv:2602.12125; on a top-K support our generalisation).

    Args:
        teacher_log_probs: `(B, T, V)` log-probs or logits in nats.
        reference_log_probs: `(B, T, V)` of the same tokens; None where every lambda is 1.
        lambdas: `(B, T)`; None for 1 everywhere. The reference is not read where lambda is 1.

    Returns:
        `(B, T, V)` log-probs that sum to one over the last dimension, detached, float32 or wider.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: The shapes do not fit.
    """
    check_floating(3, teacher_log_probs=teacher_log_probs)
    teacher = detached(teacher_log_probs)
    if reference_log_probs is None or lambdas is None:
        return teacher.log_softmax(dim=-1)
    check_floating(3, teacher_log_probs=teacher_log_probs, reference_log_probs=reference_log_probs)
    check_floating(2, lambdas=lambdas)
    check_shape("lambdas", lambdas, "the positions of teacher_log_probs", teacher.shape[:2])
    reference, lam = detached(reference_log_probs), detached(lambdas).unsqueeze(-1)
    # The branch, not a product with zero, keeps lam = 1 exact whatever the reference holds there.
    return torch.where(lam == 1, teacher, lam * teacher + (1 - lam) * reference).log_softmax(dim=-1)


def forward_kl_on_support(student_log_probs: Tensor, teacher_log_probs: Tensor, scale: float | None = None) -> Tensor:
    """Forward KL from the teacher to the student on the teacher's top-K tokens, not renormalised.

        L_t = scale sum_{v in S_t} pi_T(v) (log pi_T(v) - log pi_S(v))

    AOPD (known at second hand: a third party's code that quotes its Eq. 7 and 9). Gradient through log pi_S alone.
    It is no divergence: with mass outside of the support it can be negative.

    Args:
        student_log_probs: `(B, T, K)` log-probs under the student's whole vocabulary, with gradient.
        teacher_log_probs: `(B, T, K)` log-probs of the same tokens under the teacher's.
        scale: factor of the sum; None for AOPD's 1/K.

    Returns:
        `(B, T)` losses in nats, float32 or wider, with gradient to the student.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: The shapes differ or are not `(B, T, K)`, or `scale` is negative or not finite.
    """
    check_floating(3, student_log_probs=student_log_probs, teacher_log_probs=teacher_log_probs)
    factor = 1 / teacher_log_probs.size(-1) if scale is None else scale
    check_number("scale", factor, low=0.0, reason="It weighs a loss. Set it to None for 1/K.")
    teacher = detached(teacher_log_probs)
    gap = teacher - student_log_probs.to(teacher.dtype)
    return factor * (teacher.exp() * gap).sum(dim=-1)


def asymmetric_tokens(student_logps: Tensor, teacher_logps: Tensor, threshold: float = 0.0) -> Tensor:
    """Tokens that AOPD matches by forward KL in place of the policy gradient.

        pi_T(y_t) - pi_S(y_t) <= threshold

    AOPD (known at second hand: a third party's code that quotes its Eq. 10). Threshold 0 takes the tokens with a
    non-positive advantage, -1 hardly any, 1 all.

    Args:
        student_logps: `(B, T)` log-probs in nats of the sampled tokens under the policy that made the rollouts.
        teacher_logps: `(B, T)` log-probs in nats of the same tokens under the teacher.
        threshold: in probability.

    Returns:
        `(B, T)` bool.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: The shapes differ, or the threshold is not in [-1, 1].
    """
    check_floating(2, student_logps=student_logps, teacher_logps=teacher_logps)
    check_number(
        "threshold", threshold, low=-1.0, high=1.0, reason="It is a difference of probabilities. Set it to 0."
    )
    if threshold == 0:
        # Tokens whose probabilities both underflow still have a sign.
        return detached(teacher_logps) <= detached(student_logps)
    return detached(teacher_logps).exp() - detached(student_logps).exp() <= threshold


def matched_advantages(advantages: Tensor, losses: Tensor, matched: Tensor, *weights: Tensor) -> Tensor:
    """Advantages that make the policy loss of some tokens the weighted loss of their distributions.

        -A_t r_t = w_t L_t  with the ratio r_t = 1 at matched tokens and w_t the product of the weights

    The loss of GRPO (SG-OPD, arXiv:2606.09304, Eq. 10) is linear in the advantage where its ratio is 1.

    Args:
        advantages: `(B, T)` of the other tokens, weights included.
        losses: `(B, T)` L, with gradient.
        matched: `(B, T)`, 1 = a token whose distribution is matched.
        weights: `(B, T)` each.

    Returns:
        `(B, T)`; the gradient of `losses` at matched tokens, detached from the weights and the other advantages.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: The shapes differ.
    """
    check_floating(2, advantages=advantages, losses=losses)
    chosen = check_mask("matched", matched, "advantages", advantages.shape)
    weighted = losses
    for weight in weights:
        check_tensor("weights", weight)
        check_shape("weights", weight, "advantages", advantages.shape)
        weighted = weighted * weight.detach()
    return torch.where(chosen, -weighted, advantages.detach())


def _cell_lambdas(teacher: Tensor, verifier: Tensor, cell_lambdas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Lambda of the ++ and -- cells, and of the +- and -+ cells, each picked by the sign of a2."""
    both_up, verifier_up, teacher_up, both_down = cell_lambdas
    # As in the routing of advantages: without a sign of its own, a2 = 0 counts as opposed to a1.
    upwards = (teacher > 0) | ((teacher == 0) & (verifier < 0))
    one = torch.ones_like(teacher)
    return torch.where(upwards, both_up * one, both_down), torch.where(upwards, teacher_up * one, verifier_up)
