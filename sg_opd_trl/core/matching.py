"""Distillation of whole distributions: their targets, their losses, and how these enter the policy loss."""

import torch
from torch import Tensor

from sg_opd_trl.core._checks import checked, number


@checked(
    teacher_log_probs="const B T V",
    reference_log_probs="const B T V",
    lambdas="const B T",
)
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
    teacher, reference = teacher_log_probs, reference_log_probs
    if reference is None or lambdas is None:
        return teacher.log_softmax(dim=-1)
    lam = lambdas.unsqueeze(-1)
    # The branch, not a product with zero, keeps lam = 1 exact whatever the reference holds there.
    return torch.where(lam == 1, teacher, lam * teacher + (1 - lam) * reference).log_softmax(dim=-1)


@checked(
    student_logits_on_support="float B T K",
    teacher_logits_on_support="const B T K",
)
def local_support_matching(student_logits_on_support: Tensor, teacher_logits_on_support: Tensor) -> Tensor:
    """Reverse KL between student and teacher, both renormalised over the teacher's top-K tokens.

        L_t = sum_{v in S_t} p_v (log p_v - log q_v),  p = softmax(z_student[S_t]),  q = softmax(z_teacher[S_t])

    Revisiting OPD (arXiv:2603.25562). Exact gradient through p and log p; none through the teacher. Log-probs serve as
    well as logits: a shift common to one side's K values changes nothing.

    Args:
        student_logits_on_support: `(B, T, K)` student logits, divided by the temperature, at the teacher's top-K ids;
            with gradient.
        teacher_logits_on_support: `(B, T, K)` teacher logits, divided by the same temperature.

    Returns:
        `(B, T)` losses in nats, >= 0, float32 or wider, with gradient to the student; apply the mask afterwards.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: The shapes differ or are not `(B, T, K)`.
    """
    teacher_log_probs = teacher_logits_on_support.log_softmax(dim=-1)
    student_log_probs = student_logits_on_support.to(teacher_log_probs.dtype).log_softmax(dim=-1)
    return (student_log_probs.exp() * (student_log_probs - teacher_log_probs)).sum(dim=-1)


@checked(
    student_logps="const B T",
    teacher_logps="const B T",
    threshold=number(-1.0, 1.0, reason="It is a difference of probabilities. Set it to 0."),
)
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
    if threshold == 0:
        # Tokens whose probabilities both underflow still have a sign.
        return teacher_logps <= student_logps
    return teacher_logps.exp() - student_logps.exp() <= threshold


@checked(
    student_log_probs="float B T K",
    teacher_log_probs="const B T K",
    scale=number(0.0, reason="It weighs a loss. Set it to None for 1/K."),
)
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
    factor = 1 / teacher_log_probs.size(-1) if scale is None else scale
    gap = teacher_log_probs - student_log_probs.to(teacher_log_probs.dtype)
    return factor * (teacher_log_probs.exp() * gap).sum(dim=-1)


@checked(
    advantages="float B T",
    losses="float B T",
    matched="any B T",
    weights="any B T",
)
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
    weighted = losses
    for weight in weights:
        weighted = weighted * weight.detach()
    return torch.where(matched != 0, -weighted, advantages.detach())
