"""Advantages: the verifier's a1, the teacher's a2, and A(lambda). The package's sign convention lives here alone."""

import torch
from torch import Tensor

from sg_opd_trl.core._checks import checked, constant, number, one_of

#: What every lambda and beta has to be.
FACTOR = number(reason="It multiplies log-probs. Set it to 1 for plain distillation.")


@checked(
    verdicts="const N",
    scale=one_of("group", "batch", "none"),
    epsilon=number(0.0, reason="It is added to a standard deviation. Set it to 1e-4."),
)
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
    if num_generations < 1 or verdicts.numel() % num_generations:
        raise ValueError(
            f"`num_generations` must be >= 1 and divide the number of verdicts {verdicts.numel()}, got "
            f"{num_generations}. Verdicts are grouped by prompt. Set it to the number of completions per prompt."
        )
    values = verdicts.view(verdicts.numel() // num_generations, num_generations)
    judged = ~values.isnan()
    centred = values - _mean(values, judged)
    if scale == "group":
        centred = centred / (_standard_deviation(values, judged) + epsilon)
    elif scale == "batch":
        centred = centred / (_standard_deviation(values.view(1, -1), judged.view(1, -1)) + epsilon)
    # Equal verdicts are told by comparing them: their difference from the mean may be rounding noise.
    highest = values.masked_fill(~judged, -torch.inf).amax(dim=1, keepdim=True)
    lowest = values.masked_fill(~judged, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(judged & (highest > lowest), centred, 0.0).view(-1)


@checked(student_logps="const B T", teacher_logps="const B T")
def reverse_kl_advantage(student_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Advantage whose policy gradient descends the reverse KL from the student to the teacher.

        a2 = log pi_teacher(y_t) - log pi_student(y_t)

    Positive where the teacher gives the sampled token more mass than the student. This is the negative of the cost
    printed in SG-OPD (arXiv:2606.09304, section 3 and Algorithm 1), and the orientation that its Figure 1, Eq. 4 and
    the loss of Eq. 10 need: maximising `E[a2 log pi_student]` lowers the KL.

    Args:
        student_logps: `(B, T)` log-probs in nats of the sampled tokens under the policy that a2 is measured against.
        teacher_logps: `(B, T)` log-probs in nats of the same tokens under the teacher.

    Returns:
        `(B, T)` a2, detached, float32 or wider.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: The shapes differ or are not `(B, T)`.
    """
    return log_ratio(of=teacher_logps, over=student_logps)


@checked(
    student_logps="const B T",
    teacher_logps="const B T",
    reference_logps="const B T like teacher_logps",
    lam="any B T",
)
def extrapolated_advantage(
    student_logps: Tensor, teacher_logps: Tensor, reference_logps: Tensor | None, lam: float | Tensor
) -> Tensor:
    """Advantage of on-policy distillation towards a teacher that is extrapolated away from the reference.

        A(lam) = lam lT + (1 - lam) lR - lS = a2 + (lam - 1) (lT - lR)

    with lS, lT, lR the log-probs of the sampled token under student, teacher and reference. SG-OPD (arXiv:2606.09304)
    Eq. 5 with both terms in advantage orientation; G-OPD (arXiv:2602.12125). lam = 1 is plain distillation and gives
    a2 bit for bit; lam > 1 extrapolates (ExOPD); 0 < lam < 1 interpolates towards the reference.

    Args:
        student_logps: `(B, T)` lS in nats.
        teacher_logps: `(B, T)` lT in nats.
        reference_logps: `(B, T)` lR in nats, or None where `lam` is the number 1. Its values do not matter where lam
            is 1.
        lam: The extrapolation factor, one number or a `(B, T)` tensor.

    Returns:
        `(B, T)` advantages, detached, float32 or wider.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: The shapes differ, `lam` is not finite, or the reference is missing although `lam` is not 1.
    """
    if not isinstance(lam, Tensor):
        FACTOR("lam", lam)
    gain = None if reference_logps is None else log_ratio(of=teacher_logps, over=reference_logps)
    return extrapolated(log_ratio(of=teacher_logps, over=student_logps), gain, lam)


def log_ratio(*, of: Tensor, over: Tensor) -> Tensor:
    """log(p_of / p_over) from log-probs: a2 is the teacher's over the student's, lT - lR over the reference's.

    By keyword alone: swapped, it would have the other sign and nothing would fail.
    """
    return of - over


def extrapolated(a2: Tensor, gain: Tensor | None, lam: float | Tensor) -> Tensor:
    """A(lam) from a2 and `gain` = lT - lR, which may be None where lam is the number 1."""
    if not isinstance(lam, Tensor) and lam == 1:
        return a2
    if gain is None:
        raise ValueError(
            f"`reference_logps` must be given unless `lam` is the number 1, got None with lam={lam}. lam - 1 weighs "
            f"teacher against reference. Set `lam` to 1 or pass the reference's log-probs."
        )
    if not isinstance(lam, Tensor):
        return a2 + (lam - 1) * gain
    factors: Tensor = constant(lam)
    # The branch, not a product with zero, keeps lam = 1 exact whatever the reference holds there.
    return torch.where(factors == 1, a2, a2 + (factors - 1) * gain)


def _mean(values: Tensor, judged: Tensor) -> Tensor:
    """Mean of each row's entries that were judged; 0 where there are none."""
    return values.masked_fill(~judged, 0.0).sum(1, keepdim=True) / judged.sum(1, keepdim=True).clamp(min=1)


def _standard_deviation(values: Tensor, judged: Tensor) -> Tensor:
    """Unbiased standard deviation of each row's entries that were judged; 0 where there are fewer than two."""
    squares = (values - _mean(values, judged)).square().masked_fill(~judged, 0.0)
    return (squares.sum(1, keepdim=True) / (judged.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()
