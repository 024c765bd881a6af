"""Controls that no paper of the field ships: a gate without the verifier, and wrong rollouts without the teacher."""

import math

import torch
from torch import Tensor

from sg_opd_trl.core._checks import check_floating, check_mask, check_number, check_rank, check_shape, check_tensor


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
    check_floating(2, numbers=numbers)
    valid = check_mask("mask", mask, "numbers", numbers.shape)
    check_tensor("gate", gate)
    check_shape("gate", gate, "numbers", numbers.shape)
    decided = valid & (gate != 0)
    share = (valid & (gate > 0)).sum()
    order = numbers.detach().masked_fill(~decided, torch.inf).flatten().argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    consensus = decided & (place.view_as(decided) < share)
    return torch.where(decided, 2 * consensus.to(torch.int8) - 1, 0).to(torch.int8)


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
    check_floating(2, values=values)
    chosen = check_mask("rows", rows, "the rows of values", values.shape[:1])
    check_rank("rows", rows, 1)
    check_number("value", value, low=-math.inf, reason="It is an advantage or a weight. Set it to -1.")
    return torch.where(chosen.unsqueeze(1), value, values.detach())
