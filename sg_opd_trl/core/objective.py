"""How the parts of the objective are put together: token weights, reference rows, and the anchor's share."""

import torch
from torch import Tensor

from sg_opd_trl.core._checks import check_floating, check_shape, check_tensor
from sg_opd_trl.core.gate import VERIFIER_ZERO, RouteReferences


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
    check_floating(2, advantages=advantages)
    product = advantages.detach()
    for weight in weights:
        check_tensor("weights", weight)
        check_shape("weights", weight, "advantages", advantages.shape)
        product = product * weight.detach()
    return product


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
    check_floating(1, verifier_advantages=verifier_advantages)
    decided = verifier_advantages.abs() > VERIFIER_ZERO
    return torch.where(decided, any(routes), routes.neutral)


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


def masked_sum_and_count(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the values that count, and how many there are, so that ranks can add both before dividing.

    Args:
        values: `(B, T)`; any value, NaN too, where the mask is 0.
        mask: `(B, T)`, 1 = counts.

    Returns:
        `(2,)` float32.

    Raises:
        TypeError: `values` is not a floating tensor.
        ValueError: The shapes differ.
    """
    check_floating(2, values=values)
    check_shape("mask", mask, "values", values.shape)
    chosen = torch.where(mask != 0, values.detach().float(), 0.0)
    return torch.stack([chosen.sum(), (mask != 0).sum().float()])


def mean_of(sum_and_count: Tensor) -> Tensor:
    """Mean from a reduced `masked_sum_and_count`; 1 where nothing counts, so that dividing by it changes nothing."""
    total, count = sum_and_count.unbind()
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)
