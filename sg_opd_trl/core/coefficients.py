"""How much the rewards count and how much the teacher: one objective from teacher alone to reward alone."""

import math
from collections.abc import Sequence

from torch import Tensor

from sg_opd_trl.core._checks import checked, number, one_of
from sg_opd_trl.core._phases import phase_end

COEF_SCHEDULES = ("linear", "cosine")
_WEIGHT = number(0.0, reason="It weighs rewards against the teacher. Set it to 1, say.")
_SHARE = number(0.0, 1.0, reason="Set it to a share of the run.")


@checked(
    total_steps=number(1, reason="It counts optimizer steps. Set it to the run's length."),
    step=number(1, reason="Steps are counted from 1. Set it to the finished steps plus 1."),
    schedule=one_of(*COEF_SCHEDULES),
)
def scheduled_coefficient(
    step: int, total_steps: int, values: Sequence[float], phase_end_fracs: Sequence[float], schedule: str = "linear"
) -> float:
    """A coefficient at one optimizer step: its first value, a way from there to its second one, and that.

        w = w1                          t <= P1
        w = w1 + (w2 - w1) x            P1 < t <= P2, linear: x = (t - P1) / (P2 - P1)
        w = w1 + (w2 - w1) (1 - cos(pi x)) / 2                cosine
        w = w2                          t > P2

    with P = floor(frac * total_steps + 1e-9) as of the anchor. P1 = P2 is a hard switch after step P1. One value is a
    constant. The switch is that of Sequential Beats Joint (arXiv:2609.04108), at second hand.

    Args:
        step: t, the optimizer step, counted from 1.
        total_steps: Optimizer steps of the whole run.
        values: One number, or w1 and w2.
        phase_end_fracs: Shares of the run at the end of which the change begins and is complete.
        schedule: `linear` or `cosine`.

    Returns:
        w.

    Raises:
        ValueError: A number or a name is out of range.
    """
    for place, value in enumerate(values):
        _WEIGHT(f"values[{place}]", value)
    for place, share in enumerate(phase_end_fracs):
        _SHARE(f"phase_end_fracs[{place}]", share)
    start, end = values[0], values[-1]
    first, last = (phase_end(share, total_steps) for share in phase_end_fracs)
    if step <= first:
        return float(start)
    if step > last:
        return float(end)
    progress = (step - first) / (last - first)
    if schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * progress


@checked(teacher_advantages="float B T", task_advantages="float B|B T", task_weights="float B T")
def mixed_advantages(
    teacher_advantages: Tensor,
    task_advantages: Tensor,
    *,
    teacher_coef: float,
    task_coef: float,
    task_weights: Tensor | None = None,
) -> Tensor:
    """Teacher and rewards in one advantage.

        A = w_t T + w_r a1r

    T has its weights already: stability and prefix are functions of a2 and weigh the teacher alone. The rewards are
    normalised before, and the sum is not: centring a2 would break the signs of the gate. With constant coefficients
    and T = a2 this is the sum of ms-swift and miles; its gradient at a ratio of 1 is GRPO's plus w_t times that of
    a2^2 / 2 (KDRL, arXiv:2506.02208).

    Args:
        teacher_advantages: T, `(B, T)`, routed and weighted.
        task_advantages: a1r, `(B,)` or `(B, T)`: the group advantages of all rewards.
        teacher_coef: w_t.
        task_coef: w_r.
        task_weights: `(B, T)` weights that count for a1r too, as the drift gate's.

    Returns:
        `(B, T)`, with the gradient that T has: of a loss over distributions.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: The shapes do not fit.
    """
    task = task_advantages.detach().to(teacher_advantages.dtype)
    task = (task if task.dim() == 2 else task.unsqueeze(1)).expand_as(teacher_advantages)
    if task_weights is not None:
        task = task * task_weights.detach()
    return teacher_coef * teacher_advantages + task_coef * task
