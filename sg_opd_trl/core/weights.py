"""Weights that multiply the advantages, masks that take tokens out, and controls of gate and teacher; all detached."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from sg_opd_trl.core._checks import checked, number, one_of, positive


# --- weights, all >= 0 ----------------------------------------------------------------------------------------------
@checked(
    teacher_advantages="const B T",
    mask="any B T",
    tau=positive(reason="It is a magnitude on |a2|. Set it to None to switch phi off."),
    norm=one_of("sequence", "batch", "none"),
    denominator="any ...",
)
def stability_weight(
    teacher_advantages: Tensor,
    mask: Tensor,
    tau: float | None,
    norm: str = "sequence",
    denominator: Tensor | None = None,
) -> Tensor:
    """Weight that bounds the pull of tokens on which teacher and student are far apart.

        phi = min(1, tau / |a2|), phi = 1 at a2 = 0;  phi_hat = phi / mean(phi over valid tokens)

    SG-OPD (arXiv:2606.09304) Eq. 9. It multiplies the routed advantage, whose size it does not read: only where a2
    itself is routed is the product a2 clipped to +-tau. The paper leaves the scope of the mean open.

    Args:
        teacher_advantages: `(B, T)` a2 in nats; any value, NaN too, where the mask is 0.
        mask: `(B, T)`, 1 = counts.
        tau: Magnitude of a2 in nats above which a token is damped; None switches phi off: ones everywhere.
        norm: `sequence` divides by the mean of each row, `batch` by one mean, `none` leaves phi as it is.
        denominator: 0-dim mean of phi over all valid tokens of all ranks; only for `batch`, whose mean is otherwise
            that of the tensors given.

    Returns:
        `(B, T)` weights, detached, float32 or wider, 0 where the mask is 0.

    Raises:
        TypeError: `teacher_advantages` is not a floating tensor.
        ValueError: A shape, `tau` or `norm` is out of range, or a `denominator` comes with another `norm`.
    """
    if denominator is not None and (norm != "batch" or denominator.dim() != 0):
        raise ValueError(
            f'`denominator` must be a 0-dim tensor with norm="batch", got shape {tuple(denominator.shape)} with '
            f"norm={norm!r}. It is one mean for the whole batch. Set it to None or `norm` to batch."
        )
    valid = mask != 0
    if tau is None:
        return torch.ones_like(teacher_advantages)
    phi = torch.where(valid, (tau / teacher_advantages.abs()).clamp(max=1.0), 0.0)
    if norm == "none":
        return phi
    if denominator is not None:
        return phi / denominator.detach()
    return _unit_mean(phi, valid, dims=(0, 1) if norm == "batch" else (1,))


@checked(
    teacher_advantages="const B T",
    mask="any B T",
    gamma=number(0.0, reason="It is an extra weight. Set it to 0 for plain distillation."),
)
def prefix_importance_weight(teacher_advantages: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Weight that favours tokens whose prefix the teacher still agrees with.

        w_t = 1 + gamma (1 - sum_{k<t} |a2_k| / sum_k |a2_k|)

    sums over valid tokens, the last one included; in [1, 1 + gamma], not of unit mean. IW-OPD (arXiv:2606.22600).

    Args:
        teacher_advantages: `(B, T)` a2 in nats, before any routing; any value, NaN too, where the mask is 0.
        mask: `(B, T)`, 1 = counts.
        gamma: Extra weight of the first token, >= 0; 0 is plain distillation.

    Returns:
        `(B, T)` weights, detached, float32 or wider, 0 where the mask is 0.

    Raises:
        TypeError: `teacher_advantages` is not a floating tensor.
        ValueError: A shape or `gamma` is out of range.
    """
    valid = mask != 0
    magnitudes = torch.where(valid, teacher_advantages.abs(), 0.0)
    before = magnitudes.cumsum(dim=1) - magnitudes
    share = before / magnitudes.sum(dim=1, keepdim=True).clamp(min=1e-8)
    return torch.where(valid, 1 + gamma * (1 - share), 0.0)


@checked(
    behavior_logps="const B T",
    current_logps="const B T",
    mask="any B T",
    tau=number(0.0, reason="It is a decay rate. Set it to 0 for equal weights."),
    block_size=number(1, reason="It is a number of tokens. Set it to 64."),
    span_ids="int B T",
    mean=one_of("signed", "absolute"),
    norm=one_of("sequence", "none"),
)
def drift_gate(
    behavior_logps: Tensor,
    current_logps: Tensor,
    mask: Tensor,
    tau: float,
    block_size: int = 64,
    *,
    span_ids: Tensor | None = None,
    mean: str = "signed",
    norm: str = "sequence",
) -> Tensor:
    """Weight that damps blocks of tokens on which the policy has drifted since the rollout.

        delta_t = log pi_behaviour(y_t) - log pi_current(y_t)
        g_b = exp(-tau |mean_{t in b} delta_t|);  w_t = g_{b(t)} / mean(g over the row's valid tokens)

    Blockwise policy-drift gating (arXiv:2606.24084) Eq. 1, known at second hand. The mean is signed, so opposite
    drifts inside a block cancel; mean="absolute" takes |delta_t| instead (our choice). A row of a single block has
    w = 1.

    Args:
        behavior_logps: `(B, T)` log-probs in nats under the policy that made the rollout, recomputed by the trainer.
        current_logps: `(B, T)` log-probs in nats under the policy being updated.
        mask: `(B, T)`, 1 = counts; both log-probs may hold anything, NaN too, where it is 0.
        tau: Decay per nat, >= 0.
        block_size: Columns per block, counted from the first column; the last block may be short. Not read where
            `span_ids` are given.
        span_ids: `(B, T)` whole numbers in [0, T), the block of each token in its row; see `span_numbers`.
        mean: `signed` or `absolute`.
        norm: `sequence` gives w, `none` gives g.

    Returns:
        `(B, T)` weights, detached, float32 or wider, 0 where the mask is 0; w has mean 1 over each row's valid
        tokens, g is in [0, 1].

    Raises:
        TypeError: A log-prob is not a floating tensor, or `span_ids` does not hold whole numbers.
        ValueError: A shape, a number or a name is out of range.
    """
    valid = mask != 0
    drift = torch.where(valid, behavior_logps - current_logps, 0.0)
    drift = drift.abs() if mean == "absolute" else drift
    means = _block_mean(drift, valid, block_size) if span_ids is None else _span_mean(drift, valid, span_ids)
    decay = tau * means.abs()
    if norm == "none":
        return torch.where(valid, (-decay).exp(), 0.0)
    # A common factor cancels in the mean: starting at the row's least decay keeps exp from flushing a row to zero.
    least = decay.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    return _unit_mean(torch.where(valid, (least - decay).exp(), 0.0), valid, dims=(1,))


@checked(
    completion_ids="int B T",
    ending_ids="int N",
)
def span_numbers(completion_ids: Tensor, ending_ids: Tensor) -> Tensor:
    """Number of each token's span, where a span ends with every token out of a set, for instance those with a newline.

    The second granularity of blockwise policy-drift gating (arXiv:2606.24084); the token that ends a span is in it.

    Args:
        completion_ids: `(B, T)` token ids.
        ending_ids: `(N,)` token ids that end a span.

    Returns:
        `(B, T)` int64, from 0 in each row.

    Raises:
        TypeError: An argument does not hold whole numbers.
        ValueError: An argument has another number of dimensions.
    """
    ends = torch.isin(completion_ids, ending_ids).long()
    return ends.cumsum(dim=1) - ends


@checked(
    advantages="float B T",
    weights="any B T",
)
def weighted_advantages(advantages: Tensor, *weights: Tensor) -> Tensor:
    """Advantages after all token weights.

        A_t <- A_t prod_k w_kt

    Weights are non-negative, so that weighting the advantage or the clipped loss is the same (SG-OPD,
    arXiv:2606.09304, Eq. 10).

    Args:
        advantages: `(B, T)` routed advantages.
        weights: `(B, T)` each.

    Returns:
        `(B, T)`, detached.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: The shapes differ.
    """
    product = advantages.detach()
    for weight in weights:
        product = product * weight.detach()
    return product


# --- masks and controls ----------------------------------------------------------------------------------------------
@checked(
    completion_ids="int B T",
    mask="any B T",
    scope=one_of("first", "all"),
)
def without_special_tokens(
    completion_ids: Tensor, mask: Tensor, special_ids: Sequence[int], scope: str = "first"
) -> Tensor:
    """Mask without the tokens on which the chat templates of teacher and student differ.

        m'_t = m_t [y_t is not a special token, or not its first occurrence in the row]

    Revisiting OPD (arXiv:2603.25562), whose code masks the first occurrence of each id. Tokens that leave the mask
    leave the loss and the counts it is divided by.

    Args:
        completion_ids: `(B, T)` token ids.
        mask: `(B, T)`, 1 = counts; occurrences where it is 0 are not occurrences.
        special_ids: Token ids, each on its own.
        scope: `first` occurrence of each id in each row, or `all`.

    Returns:
        `(B, T)` mask of the dtype of `mask`.

    Raises:
        TypeError: `completion_ids` does not hold whole numbers, or `mask` is not a tensor.
        ValueError: The shapes differ, or `scope` is unknown.
    """
    valid = mask != 0
    left_out = torch.zeros_like(valid)
    for special in special_ids:
        found = valid & (completion_ids == special)
        left_out |= found if scope == "all" else found & (found.cumsum(dim=1) == 1)
    return mask.masked_fill(left_out, 0)


@checked(
    numbers="float B T",
    mask="any B T",
    gate="any B T",
)
def random_gate(gate: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
    """The gate with its decisions dealt out anew: as many consensus tokens, on other tokens.

        g'_t = 0 where g_t = 0;  +1 on the n non-neutral tokens with the smallest numbers;  -1 on the others

    with n the consensus tokens of the gate. Our control of SG-OPD (arXiv:2606.09304) Eq. 4: what is left of its
    effect without the verifier is that of the mean lambda.

    Args:
        gate: `(B, T)` of the verifier: +1 consensus, -1 conflict, 0 neutral; anything where the mask is 0.
        mask: `(B, T)`, 1 = counts. Other tokens are neither counted nor chosen.
        numbers: `(B, T)` random numbers, independent of everything else; ties go to the earlier token.

    Returns:
        `(B, T)` int8, 0 where the mask is 0.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: The shapes differ.
    """
    valid = mask != 0
    decided = valid & (gate != 0)
    share = (valid & (gate > 0)).sum()
    order = numbers.detach().masked_fill(~decided, torch.inf).flatten().argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    consensus = decided & (place.view_as(decided) < share)
    return torch.where(decided, 2 * consensus.to(torch.int8) - 1, 0).to(torch.int8)


@checked(
    values="float B T",
    rows="any B",
    value=number(reason="It is an advantage or a weight. Set it to -1."),
)
def fixed_on_rows(values: Tensor, rows: Tensor, value: float) -> Tensor:
    """One value for all tokens of some rows.

        x_it <- c where row i is chosen

    With the advantages, the wrong rollouts and c < 0 this is the control of arXiv:2608.31046: is it the teacher who
    says what is wrong with a wrong rollout, or does saying "wrong" do?

    Args:
        values: `(B, T)`; anything, NaN too, in the chosen rows.
        rows: `(B,)`, 1 = chosen.
        value: c, finite.

    Returns:
        `(B, T)`, detached.

    Raises:
        TypeError: `values` is not a floating tensor, or `rows` is not a tensor.
        ValueError: The shapes do not fit, or `value` is not finite.
    """
    return torch.where((rows != 0).unsqueeze(1), value, values.detach())


def _block_mean(values: Tensor, valid: Tensor, block_size: int) -> Tensor:
    """Mean of each block's valid entries, on every column of the block; `values` is 0 off the mask."""
    columns = values.shape[1]
    missing = -columns % block_size
    blocks = ((columns + missing) // block_size, block_size)
    sums = pad(values, (0, missing)).unflatten(1, blocks).sum(dim=2)
    counts = pad(valid, (0, missing)).unflatten(1, blocks).sum(dim=2).clamp(min=1)
    return (sums / counts).repeat_interleave(block_size, dim=1)[:, :columns]


def _span_mean(values: Tensor, valid: Tensor, span_ids: Tensor) -> Tensor:
    """Mean of each span's valid entries, on every column of the span; `values` is 0 off the mask."""
    spans = span_ids.long()
    sums = torch.zeros_like(values).scatter_add(1, spans, values)
    counts = torch.zeros_like(values).scatter_add(1, spans, valid.to(values.dtype)).clamp(min=1)
    return (sums / counts).gather(1, spans)


def _unit_mean(weights: Tensor, valid: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Divide by the mean over the valid entries of `dims`; 0 where there is none. `weights` is 0 off the mask."""
    total = weights.sum(dim=dims, keepdim=True)
    count = valid.sum(dim=dims, keepdim=True)
    return torch.where(total > 0, weights * (count / total), 0.0)
