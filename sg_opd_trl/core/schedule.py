"""The annealing of the teacher anchor."""

import math

from sg_opd_trl.core._checks import check_number, check_positive


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
    phase1_end, phase2_end = _phase_end(phase1_end_frac, total_steps), _phase_end(phase2_end_frac, total_steps)
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
    check_number("per_step", per_step, low=1, reason="It counts prompts. Set it to at least 1.")
    check_positive("alpha_start", alpha_start, reason="At 0 there is no anchor to separate. Set it to 0.2, say.")
    fractions = (phase1_end_frac, phase2_end_frac)
    anchor_schedule(step, total_steps, *fractions, alpha_start, alpha_end)  # refuses what is out of range
    stage, end = (_phase_end(share, total_steps) for share in fractions)
    # Only the last step of phase 2 may have an alpha of 0.
    last = anchor_schedule(max(1, end), total_steps, *fractions, alpha_start, alpha_end)
    prompts = per_step * (end if last > 0 else max(0, end - 1))
    if step > stage:
        return prompts, prompts
    return prompts * (step - 1) // stage, prompts * step // stage


def _phase_end(share: float, total_steps: int) -> int:
    """Last step of a phase; the small number saves 0.3 of 10 from ending at 2."""
    return math.floor(share * total_steps + 1e-9)
