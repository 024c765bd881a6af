import math

import pytest
import torch

from sg_opd_trl.core import local_support_matching


def logits(*shape: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_kl(student: list[float], teacher: list[float]) -> float:
    def normalised(values: list[float]) -> list[float]:
        powers = [math.exp(v) for v in values]
        return [p / sum(powers) for p in powers]

    return sum(p * math.log(p / q) for p, q in zip(normalised(student), normalised(teacher), strict=True))


def test_by_hand() -> None:
    # p = [.1554, .4223, .4223], q = [.6652, .2447, .0900]
    # .1554 ln(.1554/.6652) + .4223 ln(.4223/.2447) + .4223 ln(.4223/.0900) = -.2260 + .2304 + .6528 = .6572
    loss = local_support_matching(torch.tensor([[[0.0, 1.0, 1.0]]]), torch.tensor([[[2.0, 1.0, 0.0]]]))
    assert loss.shape == (1, 1)
    assert loss.item() == pytest.approx(0.657205, abs=1e-6)


def test_against_loop() -> None:
    student, teacher = logits(3, 4, 5, seed=0), logits(3, 4, 5, seed=1)
    losses = local_support_matching(student, teacher)
    for row in range(3):
        for t in range(4):
            expected = slow_kl(student[row, t].tolist(), teacher[row, t].tolist())
            assert losses[row, t].item() == pytest.approx(expected, abs=1e-12)


def test_shift_invariance_and_zero_at_equality() -> None:
    student, teacher = logits(2, 3, 5, seed=0), logits(2, 3, 5, seed=1)
    whole = local_support_matching(student, teacher)
    torch.testing.assert_close(local_support_matching(student + 3.0, teacher - 7.0), whole)
    torch.testing.assert_close(local_support_matching(teacher + 2.0, teacher), torch.zeros(2, 3, dtype=torch.float64))
    assert (whole > 0).all()


def test_gradient_is_the_students_alone_and_matches_finite_differences() -> None:
    student, teacher = logits(2, 3, 4, seed=0).requires_grad_(), logits(2, 3, 4, seed=1).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]) > 0
    torch.where(mask, local_support_matching(student, teacher), 0.0).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert torch.equal(student.grad[~mask], torch.zeros_like(student.grad[~mask]))
    for row, t in mask.nonzero().tolist():
        for k in range(4):
            values, target = student[row, t].tolist(), teacher[row, t].tolist()
            up, down = ([v + (s if i == k else 0.0) for i, v in enumerate(values)] for s in (1e-6, -1e-6))
            difference = (slow_kl(up, target) - slow_kl(down, target)) / 2e-6
            assert student.grad[row, t, k].item() == pytest.approx(difference, abs=1e-8)


def test_rows_columns_and_half_precision() -> None:
    student, teacher = logits(3, 4, 5, seed=0), logits(3, 4, 5, seed=1)
    whole = local_support_matching(student, teacher)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(local_support_matching(student[order], teacher[order]), whole[order])
    assert torch.equal(local_support_matching(student[:, :2], teacher[:, :2]), whole[:, :2])
    half = local_support_matching(student.to(torch.bfloat16), teacher.to(torch.bfloat16))
    assert half.dtype == torch.float32
    expected = local_support_matching(student.to(torch.bfloat16).double(), teacher.to(torch.bfloat16).double())
    torch.testing.assert_close(half.double(), expected, atol=1e-5, rtol=0)
    assert local_support_matching(torch.zeros(2, 0, 5), torch.zeros(2, 0, 5)).shape == (2, 0)


def test_filler_logits_add_nothing() -> None:
    filler = torch.full((1, 1, 1), torch.finfo(torch.float32).min)
    student, teacher = torch.tensor([[[0.0, 1.0, 1.0]]]), torch.tensor([[[2.0, 1.0, 0.0]]])
    padded = local_support_matching(torch.cat([student, filler], -1), torch.cat([teacher, filler], -1))
    torch.testing.assert_close(padded, local_support_matching(student, teacher))


def test_refusals() -> None:
    student = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"`teacher_logits_on_support` must have the shape of"):
        local_support_matching(student, torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"`student_logits_on_support` must have 3 dimension"):
        local_support_matching(student[0], student[0])
    with pytest.raises(TypeError, match=r"`teacher_logits_on_support` must have a floating dtype"):
        local_support_matching(student, student.long())
