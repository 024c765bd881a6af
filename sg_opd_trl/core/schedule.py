"""The annealing of the teacher anchor."""

import math

from sg_opd_trl.core._checks import check_number


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
    check_number("total_steps", total_steps, low=1, reason="It counts optimizer steps. Set it to the run's length.")
    check_number("step", step, low=1, reason="Steps are counted from 1. Set it to the finished steps plus 1.")
    check_number("phase1_end_frac", phase1_end_frac, low=0.0, high=1.0, reason="Set it to a share of the run.")
    check_number(
        "phase2_end_frac",
        phase2_end_frac,
        low=phase1_end_frac,
        high=1.0,
        reason="Phase 2 follows phase 1. Set it to a share of the run at or after `phase1_end_frac`.",
    )
    for name, alpha in (("alpha_start", alpha_start), ("alpha_end", alpha_end)):
        check_number(name, alpha, low=0.0, reason="A negative weight would push away from the teacher. Set it to 0.")
    phase1_end = math.floor(phase1_end_frac * total_steps + 1e-9)
    phase2_end = math.floor(phase2_end_frac * total_steps + 1e-9)
    if step <= phase1_end:
        return float(alpha_start)
    if step > phase2_end:
        return 0.0
    progress = (step - phase1_end) / (phase2_end - phase1_end)
    return alpha_end + (alpha_start - alpha_end) / 2 * (1 + math.cos(math.pi * progress))
