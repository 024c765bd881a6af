"""Log-ratio advantages: the sign convention of the package lives here and nowhere else."""

import math

import torch
from torch import Tensor

from sg_opd_trl.core._checks import check_floating, check_number, check_shape, detached


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
    check_floating(2, student_logps=student_logps, teacher_logps=teacher_logps)
    return detached(teacher_logps) - detached(student_logps)


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
        reference_logps: `(B, T)` lR in nats, or None where `lam` is the number 1. Not read where lam is 1.
        lam: The extrapolation factor, one number or a `(B, T)` tensor.

    Returns:
        `(B, T)` advantages, detached, float32 or wider.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: The shapes differ, `lam` is not finite, or the reference is missing although `lam` is not 1.
    """
    advantages = reverse_kl_advantage(student_logps, teacher_logps)
    if not isinstance(lam, Tensor):
        check_number("lam", lam, low=-math.inf, reason="It multiplies log-probs. Set it to 1 for plain distillation.")
        if lam == 1:
            return advantages
    if reference_logps is None:
        raise ValueError(
            f"`reference_logps` must be given unless `lam` is the number 1, got None with lam={lam}. lam - 1 weighs "
            f"teacher against reference. Set `lam` to 1 or pass the reference's log-probs."
        )
    check_floating(2, teacher_logps=teacher_logps, reference_logps=reference_logps)
    gain = detached(teacher_logps) - detached(reference_logps)
    if not isinstance(lam, Tensor):
        return advantages + (lam - 1) * gain
    check_shape("lam", lam, "student_logps", student_logps.shape)
    lam = detached(lam)
    # The branch, not a product with zero, keeps lam = 1 exact whatever the reference holds there.
    return torch.where(lam == 1, advantages, advantages + (lam - 1) * gain)
