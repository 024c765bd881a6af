"""Sums and counts for the metrics of a batch, so that ranks and micro-batches reduce first and divide last."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sg_opd_trl.core._checks import checked, require_shape

#: Suffixes of the row groups: all rows, rows judged right, rows judged wrong.
ROW_GROUPS = ("", "/right", "/wrong")
#: Metric -> (its sum, its count), both names of the row sums below.
_RATIOS = {
    "gate/consensus": ("consensus", "gated"),
    "gate/conflict": ("conflict", "gated"),
    "gate/neutral": ("neutral", "gated"),
    "gate/sign_flips": ("sign_flips", "consensus"),
    "gate/advantage_consensus": ("advantage_consensus", "consensus"),
    "gate/advantage_conflict": ("advantage_conflict", "conflict"),
    "gate/advantage_neutral": ("advantage_neutral", "neutral"),
    "teacher/kl_k1": ("kl_k1", "tokens"),
    "teacher/kl_k3": ("kl_k3", "tokens"),
    "teacher/abs_advantage_mean": ("abs_advantage", "tokens"),
    "teacher/phi_mean": ("phi", "tokens"),
    "weights/prefix_mean": ("prefix_weights", "prefix_tokens"),
    "weights/drift_mean": ("drift_gates", "drift_tokens"),
}
METRIC_NAMES = tuple(name + group for group in ROW_GROUPS for name in _RATIOS)
#: Metric -> (the ratio that says whether there is a token, the sign under which it is a maximum).
_EXTREMES = {
    "teacher/abs_advantage_max": ("teacher/kl_k1", 1.0),
    "weights/drift_max": ("weights/drift_mean", 1.0),
    "weights/drift_min": ("weights/drift_mean", -1.0),
}
MAXIMUM_NAMES = tuple(name + group for name in _EXTREMES for group in ROW_GROUPS)
#: exp(20) is 5e8: beyond it one token would drown the mean, and float32 overflows at 88.
_K3_LIMIT = 20.0


class TokenStatistics(NamedTuple):
    """What one batch adds to the metrics.

    Attributes:
        totals: `(2 * len(METRIC_NAMES),)` float32, (sum, count) of each metric in turn; reduce by summing.
        maxima: `(len(MAXIMUM_NAMES),)` float32, least values with their sign turned; in a group without tokens 0 for
            the largest and -1 for the least values, which are of numbers in [0, 1]; reduce by the maximum.
    """

    totals: Tensor
    maxima: Tensor


@torch.no_grad()
@checked(
    teacher_advantages="const B T",
    advantages="const B T",
    stability_weights="const B T",
    mask="any B T",
    gate="any B T",
    right="any B like mask",
    wrong="any B like mask",
    taught="any B like mask",
    prefix_weights="float B T like mask",
    drift_gates="float B T like mask",
)
def token_statistics(
    *,
    gate: Tensor | None,
    advantages: Tensor,
    teacher_advantages: Tensor,
    stability_weights: Tensor,
    mask: Tensor,
    right: Tensor,
    wrong: Tensor,
    taught: Tensor | None = None,
    prefix_weights: Tensor | None = None,
    drift_gates: Tensor | None = None,
) -> TokenStatistics:
    """Sums and counts of every `gate/`, `teacher/` and `weights/` metric, over all rows, right rows and wrong rows.

        kl_k1 = -a2;  kl_k3 = exp(a2) - a2 - 1, a2 cut at 20;  sign flip: consensus with sign(A) sign(a2) < 0

    k1 and k3 estimate KL(student || teacher) on the student's own samples. The shares of the three classes are those
    of SG-OPD (arXiv:2606.09304) Figure 7. Nothing waits for the device.

    Args:
        gate: `(B, T)`: +1 consensus, -1 conflict, 0 neutral; None where the gate is off, which leaves `gate/` out.
        advantages: `(B, T)` routed advantages A, before any weight.
        teacher_advantages: `(B, T)` a2 in nats.
        stability_weights: `(B, T)` phi as applied.
        mask: `(B, T)`, 1 = counts; the other tensors may hold anything, NaN too, where it is 0.
        right: `(B,)`, 1 = judged right.
        wrong: `(B,)`, 1 = judged wrong; an abstention is neither.
        taught: `(B,)`, 1 = the teacher's scores of the row are known; the others are only in `weights/drift_*`. None:
            all of them.
        prefix_weights: `(B, T)` from `prefix_importance_weight`; None leaves `weights/prefix_mean` out.
        drift_gates: `(B, T)` g from `drift_gate`, in [0, 1]; None leaves `weights/drift_*` out.

    Returns:
        The statistics, on the device of the inputs.

    Raises:
        TypeError: An argument is not a tensor of the right kind.
        ValueError: The shapes do not fit.
    """
    counted, is_right, is_wrong = mask != 0, right != 0, wrong != 0
    valid = counted if taught is None else counted & (taught != 0).unsqueeze(1)
    a2 = torch.where(valid, teacher_advantages.float(), 0.0)
    features = _teacher_features(a2, stability_weights, valid) | _gate_features(gate, advantages, a2, valid)
    features |= _weight_features("prefix_weights", "prefix_tokens", prefix_weights, valid)
    features |= _weight_features("drift_gates", "drift_tokens", drift_gates, counted)
    # Not a matmul with the groups: autocast and TF32 would round the counts.
    groups = torch.stack([torch.ones_like(is_right), is_right, is_wrong])
    gates = torch.where(features["drift_tokens"], features["drift_gates"], 1.0)
    extremes = torch.stack(
        [_maxima(a2.abs(), groups, 0.0), _maxima(features["drift_gates"], groups, 0.0), _maxima(-gates, groups, -1.0)]
    )
    return TokenStatistics(_totals(features, groups), extremes.flatten())


def combine(statistics: Sequence[TokenStatistics]) -> TokenStatistics:
    """Merge the statistics of several micro-batches or ranks.

    Args:
        statistics: One or more, on one device.

    Returns:
        Sum of the totals, maximum of the maxima.

    Raises:
        ValueError: The sequence is empty.
    """
    if not statistics:
        raise ValueError(
            "`statistics` must hold at least one entry, got none. There is nothing to merge. Set it to the statistics "
            "of the step's micro-batches."
        )
    totals = torch.stack([entry.totals for entry in statistics]).sum(dim=0)
    return TokenStatistics(totals, torch.stack([entry.maxima for entry in statistics]).amax(dim=0))


def finalize(totals: Tensor, maxima: Tensor | None = None) -> dict[str, Tensor]:
    """Divide the reduced sums by the reduced counts. The only place that waits for the device, once.

    Args:
        totals: `(2 * len(METRIC_NAMES),)` (sum, count) pairs, already reduced over micro-batches and ranks.
        maxima: `(len(MAXIMUM_NAMES),)`, already reduced; None leaves the largest and least values out.

    Returns:
        Metric name -> 0-dim float32 tensor on the CPU; names without a single token are absent.

    Raises:
        ValueError: A tensor has the wrong length.
    """
    require_shape("totals", totals, "(sum, count) pairs of METRIC_NAMES", (2 * len(METRIC_NAMES),))
    packed = totals if maxima is None else torch.cat([totals, maxima])
    values = packed.detach().float().cpu()
    sums, counts = values[: totals.numel()].view(-1, 2).unbind(dim=1)
    means = sums / counts
    present = dict(zip(METRIC_NAMES, (counts > 0).tolist(), strict=True))
    metrics = {name: means[index] for index, name in enumerate(METRIC_NAMES) if present[name]}
    if maxima is not None:
        require_shape("maxima", maxima, "MAXIMUM_NAMES", (len(MAXIMUM_NAMES),))
        shown = [(present[seen + group], sign) for seen, sign in _EXTREMES.values() for group in ROW_GROUPS]
        largest = zip(MAXIMUM_NAMES, shown, values[totals.numel() :], strict=True)
        metrics |= {name: sign * value for name, (there, sign), value in largest if there}
    return metrics


def sum_and_count(statistics: TokenStatistics, name: str) -> tuple[float, float]:
    """One metric before the division: waits for the device, unless the statistics are on the CPU by now.

    Args:
        statistics: reduced, or of one rank.
        name: one of `METRIC_NAMES`.
    """
    index = 2 * METRIC_NAMES.index(name)
    total, count = statistics.totals[index : index + 2].tolist()
    return total, count


@checked(values="float B T", mask="any B T")
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
    chosen = torch.where(mask != 0, values.detach().float(), 0.0)
    return torch.stack([chosen.sum(), (mask != 0).sum().float()])


def mean_of(sum_and_count: Tensor) -> Tensor:
    """Mean from a reduced `masked_sum_and_count`; 1 where nothing counts, so that dividing by it changes nothing."""
    total, count = sum_and_count.unbind()
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def _totals(features: dict[str, Tensor], groups: Tensor) -> Tensor:
    """(sum, count) pairs in the order of `METRIC_NAMES`; `groups` `(3, B)`."""
    names = list(features)
    row_sums = torch.stack([features[name].float() for name in names]).sum(dim=-1)
    sums = torch.where(groups.unsqueeze(1), row_sums, 0.0).sum(dim=-1)
    order = [names.index(name) for pair in _RATIOS.values() for name in pair]
    return torch.stack([sums[:, index] for index in order], dim=1).flatten()


def _maxima(values: Tensor, groups: Tensor, without_tokens: float) -> Tensor:
    """Largest entry of each row group, `(3,)`."""
    return torch.where(groups.unsqueeze(-1), values, without_tokens).flatten(1).amax(dim=1)


def _weight_features(name: str, count: str, weights: Tensor | None, valid: Tensor) -> dict[str, Tensor]:
    """`(B, T)` summands of a weight's mean; zero without it, so that every rank sends the same vector."""
    if weights is None:
        return {name: torch.zeros_like(valid, dtype=torch.float32), count: torch.zeros_like(valid)}
    return {name: torch.where(valid, weights.detach().float(), 0.0), count: valid}


def _teacher_features(a2: Tensor, stability_weights: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """`(B, T)` summands of the `teacher/` metrics; `a2` is 0 off the mask, where k3 is 0 too."""
    bounded = a2.clamp(max=_K3_LIMIT)
    return {
        "tokens": valid,
        "kl_k1": -a2,
        "kl_k3": torch.expm1(bounded) - bounded,
        "abs_advantage": a2.abs(),
        "phi": torch.where(valid, stability_weights.float(), 0.0),
    }


def _gate_features(gate: Tensor | None, advantages: Tensor, a2: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """`(B, T)` summands of the `gate/` metrics; all zero without a gate, so that every rank sends the same vector."""
    gated = valid if gate is not None else torch.zeros_like(valid)
    signs = torch.zeros_like(a2) if gate is None else gate
    routed = advantages.float()
    classes = {"consensus": gated & (signs > 0), "conflict": gated & (signs < 0), "neutral": gated & (signs == 0)}
    means = {f"advantage_{name}": torch.where(chosen, routed, 0.0) for name, chosen in classes.items()}
    flips = classes["consensus"] & (routed.sign() * a2.sign() < 0)
    return {"gated": gated, "sign_flips": flips, **classes, **means}
