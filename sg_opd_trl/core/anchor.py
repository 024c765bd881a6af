"""The anchor: cross-entropy on verified teacher rollouts, its annealing (SG-OPD, arXiv:2606.09304, Eq. 2-3, 11)."""

import math

import torch
from torch import Tensor

from sg_opd_trl.core._checks import checked, number, one_of, positive
from sg_opd_trl.core._phases import phase_end

ANCHOR_WEIGHTS = ("none", "chord", "dft")
ANCHOR_REDUCTIONS = ("token_mean", "seq_mean", "sum")


@checked(
    student_logps="const B T",
    mask="any B T",
    kind=one_of(*ANCHOR_WEIGHTS),
)
def anchor_token_weights(student_logps: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Weight of each teacher token in the anchor, by how sure the student already is.

        none 1 | chord p (1 - p) | dft p,  with p = pi_student(y_t);  divided by the mean over the row's valid tokens

    `chord` is CHORD-phi (arXiv:2508.11408), `dft` dynamic fine-tuning (arXiv:2508.05629); SG-OPD (arXiv:2606.09304),
    appendix C, normalises to unit mean. Per row, which is our choice: no second forward and no exchange between ranks.

    Args:
        student_logps: `(B, T)` log-probs in nats of the teacher's tokens; any value, NaN too, where the mask is 0.
        mask: `(B, T)`, 1 = counts.
        kind: `none`, `chord` or `dft`.

    Returns:
        `(B, T)` weights, detached, float32 or wider, 0 where the mask is 0 and in rows whose raw weights are all 0.

    Raises:
        TypeError: `student_logps` is not a floating tensor.
        ValueError: The shapes differ or `kind` is unknown.
    """
    valid = mask != 0
    # Rounding can leave a log-prob a hair above 0, which would turn 1 - p negative.
    logps = student_logps.clamp(max=0.0)
    if kind == "none":
        return valid.to(logps.dtype)
    raw = logps.exp() if kind == "dft" else logps.exp() * -torch.expm1(logps)
    raw = torch.where(valid, raw, 0.0)
    total = raw.sum(dim=1, keepdim=True)
    return torch.where(total > 0, raw * (valid.sum(dim=1, keepdim=True) / total), 0.0)


@checked(
    student_logps="float B T",
    weights="const B T",
    mask="any B T",
    kept="any B like mask",
    reduction=one_of(*ANCHOR_REDUCTIONS),
    total="any ...",
)
def anchor_cross_entropy(
    student_logps: Tensor,
    mask: Tensor,
    kept: Tensor,
    weights: Tensor,
    *,
    reduction: str,
    total: float | Tensor,
) -> Tensor:
    """Weighted cross-entropy of the student on the kept teacher rollouts.

        token_mean  sum_jt k_j m_jt w_jt CE_jt / max(1, total)
        seq_mean    sum_j k_j (sum_t m_jt w_jt CE_jt / |y_j|) / max(1, total)
        sum         sum_jt k_j m_jt w_jt CE_jt

    with CE = -log pi_student(y_t) and |y_j| the row's valid tokens. SG-OPD (arXiv:2606.09304) Eq. 2 prints the sum.
    Rows that are not kept add nothing to value or gradient, so dropping them and zeroing them are the same update.

    Args:
        student_logps: `(B, T)` log-probs in nats of the teacher's tokens, with gradient; any value, NaN too, where the
            mask is 0 and in rows that are not kept.
        mask: `(B, T)`, 1 = counts.
        kept: `(B,)`, 1 = used.
        weights: `(B, T)` from `anchor_token_weights`; no gradient runs through them.
        reduction: `token_mean`, `seq_mean` or `sum`.
        total: The sum over all micro-batches and ranks of `anchor_denominator`; not read by `sum`.

    Returns:
        0-dim loss with gradient to `student_logps`, float32 or wider.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: The shapes do not fit or `reduction` is unknown.
    """
    valid = mask != 0
    counted = valid & (kept != 0).unsqueeze(1)
    scale = torch.where(counted, weights, 0.0)
    # Selecting before multiplying: 0 * NaN is NaN, in the value and in the gradient.
    rows = -(torch.where(counted, student_logps, 0.0).to(scale.dtype) * scale).sum(dim=1)
    if reduction == "seq_mean":
        rows = rows / valid.sum(dim=1).clamp(min=1)
    loss = rows.sum()
    if reduction == "sum":
        return loss
    return loss / (total.detach().clamp(min=1) if isinstance(total, Tensor) else max(1.0, total))


@checked(
    mask="any B T",
    kept="any B",
    reduction=one_of(*ANCHOR_REDUCTIONS),
)
def anchor_denominator(mask: Tensor, kept: Tensor, reduction: str) -> Tensor:
    """What these rows add to the `total` of `anchor_cross_entropy`.

        token_mean  sum_jt k_j m_jt | seq_mean  sum_j k_j | sum  0 (divides by nothing)

    Args:
        mask: `(B, T)`, 1 = counts.
        kept: `(B,)`, 1 = used.
        reduction: `token_mean`, `seq_mean` or `sum`.

    Returns:
        0-dim float32 count, to be summed over micro-batches and ranks.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: The shapes do not fit or `reduction` is unknown.
    """
    counted = (mask != 0) & (kept != 0).unsqueeze(1)
    if reduction == "token_mean":
        return counted.sum(dtype=torch.float32)
    return (kept != 0).sum(dtype=torch.float32) * (reduction == "seq_mean")


def anchored_loss(policy_loss: Tensor, anchor_loss: Tensor, alpha: float, world_size: int) -> Tensor:
    """The whole loss of a micro-batch.

        L = L_TLT + alpha W L_SLT

    SG-OPD (arXiv:2606.09304) Eq. 11. `anchor_loss` is this rank's part of a sum over ranks and micro-batches, while
    gradients are averaged over the W ranks.

    Args:
        policy_loss: 0-dim, already divided by the accumulation steps.
        anchor_loss: 0-dim, from `anchor_cross_entropy` with the step's global total.
        alpha: from `anchor_schedule`.
        world_size: W.

    Returns:
        0-dim loss with the gradient of both.
    """
    return policy_loss + alpha * world_size * anchor_loss


_ALPHA = number(0.0, reason="A negative weight would push away from the teacher. Set it to 0.")


@checked(
    total_steps=number(1, reason="It counts optimizer steps. Set it to the run's length."),
    step=number(1, reason="Steps are counted from 1. Set it to the finished steps plus 1."),
    phase1_end_frac=number(0.0, 1.0, reason="Set it to a share of the run."),
    alpha_start=_ALPHA,
    alpha_end=_ALPHA,
)
def anchor_schedule(
    step: int,
    total_steps: int,
    phase1_end_frac: float,
    phase2_end_frac: float,
    alpha_start: float,
    alpha_end: float,
) -> float:
    """Weight of the anchor loss at one optimizer step: constant, then a half cosine, then off.

        alpha = alpha_start                                                                 t <= P1
        alpha = alpha_end + (alpha_start - alpha_end) / 2 (1 + cos(pi (t - P1) / (P2 - P1)))  P1 < t <= P2
        alpha = 0                                                                           t > P2

    with P = floor(frac * total_steps + 1e-9), so that 0.3 of 10 is 3. P1 = P2 jumps from alpha_start to 0. SG-OPD
    (arXiv:2606.09304) Eq. 3.

    Args:
        step: t, the optimizer step, counted from 1.
        total_steps: Optimizer steps of the whole run.
        phase1_end_frac: Share of the run with the full anchor, in [0, 1].
        phase2_end_frac: Share of the run after which the anchor is off, in [phase1_end_frac, 1].
        alpha_start: Weight in phase 1, >= 0.
        alpha_end: Weight at the last step of phase 2, >= 0.

    Returns:
        alpha.

    Raises:
        ValueError: An argument is NaN or out of range.
    """
    follows = number(
        phase1_end_frac,
        1.0,
        reason="Phase 2 follows phase 1. Set it to a share of the run at or after `phase1_end_frac`.",
    )
    follows("phase2_end_frac", phase2_end_frac)
    phase1_end, phase2_end = phase_end(phase1_end_frac, total_steps), phase_end(phase2_end_frac, total_steps)
    if step <= phase1_end:
        return float(alpha_start)
    if step > phase2_end:
        return 0.0
    progress = (step - phase1_end) / (phase2_end - phase1_end)
    return alpha_end + (alpha_start - alpha_end) / 2 * (1 + math.cos(math.pi * progress))


def separated_schedule(step: int, total_steps: int, phase1_end_frac: float, alpha_start: float) -> float:
    """Weight of the anchor loss where it is separated from the student's loss in time (TimeSep).

        alpha = alpha_start  t <= P1: stage 1, the anchor is the whole loss
        alpha = 0            t > P1:  stage 2, the student's loss alone

    with P1 as in `anchor_schedule`. SG-OPD (arXiv:2606.09304) Table 3e; it prints no boundary, P1 is our choice.

    Args:
        step: t, the optimizer step, counted from 1.
        total_steps: Optimizer steps of the whole run.
        phase1_end_frac: Share of the run that is stage 1, in [0, 1].
        alpha_start: Weight in stage 1, >= 0.

    Returns:
        alpha.

    Raises:
        ValueError: An argument is NaN or out of range.
    """
    return anchor_schedule(step, total_steps, phase1_end_frac, phase1_end_frac, alpha_start, alpha_start)


@checked(
    per_step=number(1, reason="It counts prompts. Set it to at least 1."),
    alpha_start=positive(reason="At 0 there is no anchor to separate. Set it to 0.2, say."),
)
def separated_prompts(
    step: int,
    total_steps: int,
    phase1_end_frac: float,
    phase2_end_frac: float,
    alpha_start: float,
    alpha_end: float,
    per_step: int,
) -> tuple[int, int]:
    """Teacher prompts of one step of TimeSep: as many over stage 1 as SG-OPD draws over both of its phases.

        N = per_step * #{t: alpha(t) > 0},  step t of P1 draws prompts floor(N (t-1) / P1) to floor(N t / P1)

    with alpha from `anchor_schedule`. SG-OPD (arXiv:2606.09304) Table 3e compares at equal teacher rollouts; to spread
    them evenly is our choice.

    Args:
        step: t, the optimizer step, counted from 1.
        total_steps: Optimizer steps of the whole run.
        phase1_end_frac: Share of the run that is stage 1, in [0, 1].
        phase2_end_frac: Share of the run after which SG-OPD's anchor is off, in [phase1_end_frac, 1].
        alpha_start: SG-OPD's weight in phase 1, > 0.
        alpha_end: SG-OPD's weight at the last step of phase 2, >= 0.
        per_step: Teacher prompts that SG-OPD draws in a step, >= 1.

    Returns:
        First prompt, counted from 0 over the run, and the one after the last; empty after stage 1.

    Raises:
        ValueError: An argument is NaN or out of range.
    """
    fractions = (phase1_end_frac, phase2_end_frac)
    anchor_schedule(step, total_steps, *fractions, alpha_start, alpha_end)  # refuses what is out of range
    stage, end = (phase_end(share, total_steps) for share in fractions)
    # Only the last step of phase 2 may have an alpha of 0.
    last = anchor_schedule(max(1, end), total_steps, *fractions, alpha_start, alpha_end)
    prompts = per_step * (end if last > 0 else max(0, end - 1))
    if step > stage:
        return prompts, prompts
    return prompts * (step - 1) // stage, prompts * step // stage
