"""The anchor: cross-entropy on verified teacher rollouts (SG-OPD, arXiv:2606.09304, Eq. 2)."""

import torch
from torch import Tensor

from sg_opd_trl.core._checks import (
    check_choice,
    check_floating,
    check_mask,
    check_rank,
    check_shape,
    check_tensor,
    detached,
)

ANCHOR_WEIGHTS = ("none", "chord", "dft")
ANCHOR_REDUCTIONS = ("token_mean", "seq_mean", "sum")


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
    check_floating(2, student_logps=student_logps)
    valid = check_mask("mask", mask, "student_logps", student_logps.shape)
    check_choice("kind", kind, ANCHOR_WEIGHTS)
    # Rounding can leave a log-prob a hair above 0, which would turn 1 - p negative.
    logps = detached(student_logps).clamp(max=0.0)
    if kind == "none":
        return valid.to(logps.dtype)
    raw = logps.exp() if kind == "dft" else logps.exp() * -torch.expm1(logps)
    raw = torch.where(valid, raw, 0.0)
    total = raw.sum(dim=1, keepdim=True)
    return torch.where(total > 0, raw * (valid.sum(dim=1, keepdim=True) / total), 0.0)


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
        kept: `(B,)`, 1 = verified.
        weights: `(B, T)` from `anchor_token_weights`; no gradient runs through them.
        reduction: `token_mean`, `seq_mean` or `sum`.
        total: The sum over all micro-batches and ranks of `anchor_denominator`; not read by `sum`.

    Returns:
        0-dim loss with gradient to `student_logps`, float32 or wider.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: The shapes do not fit or `reduction` is unknown.
    """
    check_floating(2, student_logps=student_logps, weights=weights)
    valid = check_mask("mask", mask, "student_logps", student_logps.shape)
    counted = _counted(valid, kept)
    check_choice("reduction", reduction, ANCHOR_REDUCTIONS)
    scale = torch.where(counted, detached(weights), 0.0)
    # Selecting before multiplying: 0 * NaN is NaN, in the value and in the gradient.
    rows = -(torch.where(counted, student_logps, 0.0).to(scale.dtype) * scale).sum(dim=1)
    if reduction == "seq_mean":
        rows = rows / valid.sum(dim=1).clamp(min=1)
    loss = rows.sum()
    if reduction == "sum":
        return loss
    return loss / (total.detach().clamp(min=1) if isinstance(total, Tensor) else max(1.0, total))


def anchor_denominator(mask: Tensor, kept: Tensor, reduction: str) -> Tensor:
    """What these rows add to the `total` of `anchor_cross_entropy`.

        token_mean  sum_jt k_j m_jt | seq_mean  sum_j k_j | sum  0 (divides by nothing)

    Args:
        mask: `(B, T)`, 1 = counts.
        kept: `(B,)`, 1 = verified.
        reduction: `token_mean`, `seq_mean` or `sum`.

    Returns:
        0-dim float32 count, to be summed over micro-batches and ranks.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: The shapes do not fit or `reduction` is unknown.
    """
    check_tensor("mask", mask)
    check_rank("mask", mask, 2)
    counted = _counted(mask != 0, kept)
    check_choice("reduction", reduction, ANCHOR_REDUCTIONS)
    if reduction == "token_mean":
        return counted.sum(dtype=torch.float32)
    return (kept != 0).sum(dtype=torch.float32) * (reduction == "seq_mean")


def _counted(valid: Tensor, kept: Tensor) -> Tensor:
    """Valid tokens of kept rows."""
    check_tensor("kept", kept)
    check_shape("kept", kept, "the rows of mask", valid.shape[:1])
    return valid & (kept != 0).unsqueeze(1)
