"""The verifier's group advantage, the trust signal a1 of the gate."""

import torch
from torch import Tensor

from sg_opd_trl.core._checks import check_choice, check_floating, check_number, detached


def verifier_group_advantages(
    verdicts: Tensor, num_generations: int, scale: str = "group", epsilon: float = 1e-4
) -> Tensor:
    """Group-relative advantage of the verifier's verdicts.

        a1_i = (r_i - mu_x) / (sigma_x + epsilon)

    over the G completions of prompt x, sigma the unbiased standard deviation; GRPO's advantage, used by SG-OPD
    (arXiv:2606.09304) section 3. A verdict of NaN abstains: it enters neither mu nor sigma and its own advantage is 0.
    A group whose remaining verdicts are all equal is exactly 0, so that rounding can never open or shut the gate.

    Args:
        verdicts: `(N,)` with N = groups * G, the completions of one prompt adjacent; 1 right, 0 wrong, NaN abstains.
        num_generations: G, completions per prompt.
        scale: `group` divides by the group's sigma, `batch` by that of all verdicts, `none` only centres.
        epsilon: Added to sigma; TRL's 1e-4.

    Returns:
        `(N,)` advantages, detached, float32 or wider.

    Raises:
        TypeError: `verdicts` is not a floating tensor.
        ValueError: N is not a multiple of G, or `scale` or `epsilon` is out of range.
    """
    check_floating(1, verdicts=verdicts)
    check_choice("scale", scale, ("group", "batch", "none"))
    check_number("epsilon", epsilon, low=0.0, reason="It is added to a standard deviation. Set it to 1e-4.")
    if num_generations < 1 or verdicts.numel() % num_generations:
        raise ValueError(
            f"`num_generations` must be >= 1 and divide the number of verdicts {verdicts.numel()}, got "
            f"{num_generations}. Verdicts are grouped by prompt. Set it to the number of completions per prompt."
        )
    values = detached(verdicts).view(verdicts.numel() // num_generations, num_generations)
    judged = ~values.isnan()
    centred = values - _mean(values, judged, dim=1)
    if scale == "group":
        centred = centred / (_standard_deviation(values, judged, dim=1) + epsilon)
    elif scale == "batch":
        flat, flat_judged = values.view(1, -1), judged.view(1, -1)
        centred = centred / (_standard_deviation(flat, flat_judged, dim=1) + epsilon)
    highest = values.masked_fill(~judged, -torch.inf).amax(dim=1, keepdim=True)
    lowest = values.masked_fill(~judged, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(judged & (highest > lowest), centred, 0.0).view(-1)


def _mean(values: Tensor, judged: Tensor, dim: int) -> Tensor:
    """Mean of the entries that were judged; 0 where there are none."""
    return values.masked_fill(~judged, 0.0).sum(dim, keepdim=True) / judged.sum(dim, keepdim=True).clamp(min=1)


def _standard_deviation(values: Tensor, judged: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation of the entries that were judged; 0 where there are fewer than two."""
    squares = (values - _mean(values, judged, dim)).square().masked_fill(~judged, 0.0)
    return (squares.sum(dim, keepdim=True) / (judged.sum(dim, keepdim=True) - 1).clamp(min=1)).sqrt()
