import math

import pytest
import torch

from sg_opd_trl.core import extrapolated_advantage, reverse_kl_advantage


def log_probs(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(*shape, generator=generator, dtype=torch.float64).mul(4).to(dtype)


def test_reverse_kl_advantage_by_hand() -> None:
    student = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -0.25, -4.0]])
    teacher = torch.tensor([[-0.5, -2.0, -1.5], [-1.0, -0.75, -3.5]])
    expected = torch.tensor([[0.5, 0.0, -1.0], [2.0, -0.5, 0.5]])  # teacher - student
    assert torch.equal(reverse_kl_advantage(student, teacher), expected)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0, 1.25, 1.8, -0.5])
def test_extrapolated_advantage_against_loop(lam: float) -> None:
    student, teacher, reference = (log_probs(3, 5, seed=seed, dtype=torch.float64) for seed in range(3))
    advantages = extrapolated_advantage(student, teacher, reference, lam)
    for row in range(3):
        for column in range(5):
            s, t, r = (x[row, column].item() for x in (student, teacher, reference))
            assert advantages[row, column].item() == pytest.approx(lam * t + (1 - lam) * r - s, abs=1e-12)


def test_lambda_tensor_is_per_token() -> None:
    student, teacher, reference = (log_probs(2, 3, seed=seed) for seed in range(3))
    lam = torch.tensor([[1.0, 1.8, 0.5], [1.8, 1.0, 1.0]])
    advantages = extrapolated_advantage(student, teacher, reference, lam)
    for row in range(2):
        for column in range(3):
            alone = extrapolated_advantage(student, teacher, reference, lam[row, column].item())
            torch.testing.assert_close(advantages[row, column], alone[row, column], atol=1e-6, rtol=0)


def test_lambda_one_is_the_log_ratio_bit_for_bit() -> None:
    student, teacher, reference = (log_probs(4, 7, seed=seed) for seed in range(3))
    plain = reverse_kl_advantage(student, teacher)
    reference[0, 0] = -torch.inf
    assert torch.equal(extrapolated_advantage(student, teacher, reference, 1.0), plain)
    assert torch.equal(extrapolated_advantage(student, teacher, None, 1), plain)
    assert torch.equal(extrapolated_advantage(student, teacher, reference, torch.ones(4, 7)), plain)


def test_results_are_detached_whatever_comes_in() -> None:
    student, teacher, reference = (log_probs(2, 3, seed=seed).requires_grad_() for seed in range(3))
    lam = torch.full((2, 3), 1.5, requires_grad=True)
    assert not reverse_kl_advantage(student, teacher).requires_grad
    assert not extrapolated_advantage(student, teacher, reference, 1.8).requires_grad
    assert not extrapolated_advantage(student, teacher, reference, lam).requires_grad


def test_half_precision_is_subtracted_in_float32() -> None:
    # Subtracted in bfloat16 (8 bits) the result would be rounded to 3.015625.
    student = torch.tensor([[-3.015625]], dtype=torch.bfloat16)
    teacher = torch.tensor([[-0.0001]], dtype=torch.bfloat16)
    advantage = reverse_kl_advantage(student, teacher)
    assert advantage.dtype == torch.float32
    assert advantage.item() == pytest.approx(student.double().item() * -1 + teacher.double().item(), abs=1e-7)
    assert reverse_kl_advantage(student, teacher.double()).dtype == torch.float64


def test_row_permutation() -> None:
    student, teacher, reference = (log_probs(5, 4, seed=seed) for seed in range(3))
    order = torch.tensor([3, 0, 4, 1, 2])
    whole = extrapolated_advantage(student, teacher, reference, 1.8)
    assert torch.equal(extrapolated_advantage(student[order], teacher[order], reference[order], 1.8), whole[order])


def test_refusals() -> None:
    student, teacher = log_probs(2, 3, seed=0), log_probs(2, 3, seed=1)
    with pytest.raises(ValueError, match=r"`reference_logps` must be given unless `lam` is the number 1, got None"):
        extrapolated_advantage(student, teacher, None, 1.25)
    with pytest.raises(ValueError, match=r"`reference_logps` must be given"):
        extrapolated_advantage(student, teacher, None, torch.ones(2, 3))
    with pytest.raises(
        ValueError, match=r"`teacher_logps` must have the shape of `student_logps` \(2, 3\), got \(2, 2\)"
    ):
        reverse_kl_advantage(student, teacher[:, :2])
    with pytest.raises(ValueError, match=r"`reference_logps` must have the shape of `teacher_logps`"):
        extrapolated_advantage(student, teacher, teacher[:1], 1.8)
    with pytest.raises(ValueError, match=r"`lam` must have the shape of `student_logps`"):
        extrapolated_advantage(student, teacher, teacher, torch.ones(2))
    with pytest.raises(ValueError, match=r"`student_logps` must have 2 dimension\(s\), got shape \(3,\)"):
        reverse_kl_advantage(student[0], teacher[0])
    with pytest.raises(TypeError, match=r"`teacher_logps` must have a floating dtype, got torch.int64"):
        reverse_kl_advantage(student, teacher.long())
    with pytest.raises(TypeError, match=r"`student_logps` must be a torch.Tensor, got list"):
        reverse_kl_advantage([[0.0]], teacher)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`lam` must be finite, got nan"):
        extrapolated_advantage(student, teacher, teacher, math.nan)
