"""Distillation on the teacher's top-K support."""

from torch import Tensor

from sg_opd_trl.core._checks import check_floating, detached


def local_support_matching(student_logits_on_support: Tensor, teacher_logits_on_support: Tensor) -> Tensor:
    """Reverse KL between student and teacher, both renormalised over the teacher's top-K tokens.

        L_t = sum_{v in S_t} p_v (log p_v - log q_v),  p = softmax(z_student[S_t]),  q = softmax(z_teacher[S_t])

    Revisiting OPD (arXiv:2603.25562). Exact gradient through p and log p; none through the teacher. Log-probs serve as
    well as logits: a shift common to one side's K values changes nothing.

    Args:
        student_logits_on_support: `(B, T, K)` student logits, divided by the temperature, at the teacher's top-K ids;
            with gradient.
        teacher_logits_on_support: `(B, T, K)` teacher logits, divided by the same temperature.

    Returns:
        `(B, T)` losses in nats, >= 0, float32 or wider, with gradient to the student; apply the mask afterwards.

    Raises:
        TypeError: An argument is not a floating tensor.
        ValueError: The shapes differ or are not `(B, T, K)`.
    """
    check_floating(
        3,
        student_logits_on_support=student_logits_on_support,
        teacher_logits_on_support=teacher_logits_on_support,
    )
    teacher_log_probs = detached(teacher_logits_on_support).log_softmax(dim=-1)
    student_log_probs = student_logits_on_support.to(teacher_log_probs.dtype).log_softmax(dim=-1)
    return (student_log_probs.exp() * (student_log_probs - teacher_log_probs)).sum(dim=-1)
