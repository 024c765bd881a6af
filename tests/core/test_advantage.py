"""Advantages: the verifier's a1, the teacher's a2, and A(lambda)."""

import math
import statistics

import pytest
import torch

from sg_opd_trl.core import extrapolated_advantage, reverse_kl_advantage, verifier_group_advantages

# --- the verifier's --------------------------------------------------------------------------------------------------
NAN = math.nan


def slow_group_advantages(verdicts: list[float], size: int, scale: str, epsilon: float) -> list[float]:
    judged = [v for v in verdicts if not math.isnan(v)]
    result = []
    for start in range(0, len(verdicts), size):
        group = verdicts[start : start + size]
        heard = [v for v in group if not math.isnan(v)]
        for verdict in group:
            if math.isnan(verdict) or len(set(heard)) < 2:
                result.append(0.0)
                continue
            spread = {"group": statistics.stdev(heard), "batch": statistics.stdev(judged), "none": None}[scale]
            centred = verdict - statistics.fmean(heard)
            result.append(centred if spread is None else centred / (spread + epsilon))
    return result


def test_two_right_of_eight() -> None:
    # mean .25, unbiased std sqrt((2 * .5625 + 6 * .0625) / 7) = .46291; .75 / .46301 = 1.6198, -.25 / .46301 = -.5399
    verdicts = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])
    advantages = verifier_group_advantages(verdicts, 8)
    expected = torch.where(verdicts == 1, 1.6198, -0.5399)
    torch.testing.assert_close(advantages, expected, atol=5e-5, rtol=0)
    finer = verifier_group_advantages(verdicts, 8, epsilon=1e-6)
    torch.testing.assert_close(finer, torch.where(verdicts == 1, 1.6202, -0.5401), atol=5e-5, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("seed", range(5))
def test_group_advantages_against_loop(scale: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    verdicts = torch.randint(0, 2, (24,), generator=generator).double()
    verdicts[torch.rand(24, generator=generator) < 0.25] = NAN
    advantages = verifier_group_advantages(verdicts, 4, scale=scale)
    expected = torch.tensor(slow_group_advantages(verdicts.tolist(), 4, scale, 1e-4), dtype=torch.float64)
    assert (expected == 0).any() and (expected != 0).any()
    torch.testing.assert_close(advantages, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "group",
    [[0.11] * 3, [1.0] * 3, [0.0] * 3, [NAN, 0.1, 0.1], [NAN, NAN, 1.0], [NAN] * 3],
)
def test_no_variance_is_exactly_zero(scale: str, group: list[float]) -> None:
    # In float32 the mean of three 0.11 is not 0.11.
    verdicts = torch.tensor([*group, 1.0, 0.0, 1.0])
    advantages = verifier_group_advantages(verdicts, 3, scale=scale)
    assert torch.equal(advantages[:3], torch.zeros(3))
    assert (advantages[3:] != 0).all()


def test_abstention_is_neither_right_nor_wrong() -> None:
    # Without the abstaining row: mean .5, std sqrt(2 * .25) = .70711; +-.5 / .70721 = +-.70701
    advantages = verifier_group_advantages(torch.tensor([1.0, NAN, 0.0]), 3)
    torch.testing.assert_close(advantages, torch.tensor([0.70701, 0.0, -0.70701]), atol=1e-5, rtol=0)


def test_groups_permute_and_rows_permute_within() -> None:
    verdicts = torch.tensor([1.0, 0, 0, NAN, 1, 1, 0, NAN, 0])
    order = torch.tensor([8, 6, 7, 1, 2, 0, 5, 3, 4])
    whole = verifier_group_advantages(verdicts, 3)
    torch.testing.assert_close(verifier_group_advantages(verdicts[order], 3), whole[order])


def test_group_advantages_dtype_gradient_and_empty() -> None:
    advantages = verifier_group_advantages(torch.tensor([1.0, 0.0], dtype=torch.bfloat16), 2)
    assert advantages.dtype == torch.float32
    assert not verifier_group_advantages(torch.tensor([1.0, 0.0], requires_grad=True), 2).requires_grad
    assert verifier_group_advantages(torch.zeros(0), 4).shape == (0,)
    assert torch.equal(verifier_group_advantages(torch.tensor([1.0, 0.0]), 1), torch.zeros(2))


def test_refusals_of_group_advantages() -> None:
    verdicts = torch.tensor([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"`num_generations` must be >= 1 and divide the number of verdicts 3, got 2"):
        verifier_group_advantages(verdicts, 2)
    with pytest.raises(ValueError, match=r"`num_generations` must be >= 1"):
        verifier_group_advantages(verdicts, 0)
    with pytest.raises(ValueError, match=r"`scale` must be one of group, batch, none, got 'sequence'"):
        verifier_group_advantages(verdicts, 3, scale="sequence")
    with pytest.raises(ValueError, match=r"`epsilon` must be >= 0.0 and finite, got nan"):
        verifier_group_advantages(verdicts, 3, epsilon=NAN)
    with pytest.raises(ValueError, match=r"`verdicts` must have 1 dimension"):
        verifier_group_advantages(verdicts[None], 3)
    with pytest.raises(TypeError, match=r"`verdicts` must have a floating dtype, got torch.bool"):
        verifier_group_advantages(verdicts.bool(), 3)


# --- the teacher's, and A(lambda) ------------------------------------------------------------------------------------
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


def test_extrapolated_advantage_under_row_permutation() -> None:
    student, teacher, reference = (log_probs(5, 4, seed=seed) for seed in range(3))
    order = torch.tensor([3, 0, 4, 1, 2])
    whole = extrapolated_advantage(student, teacher, reference, 1.8)
    assert torch.equal(extrapolated_advantage(student[order], teacher[order], reference[order], 1.8), whole[order])


def test_refusals_of_the_teachers_advantages() -> None:
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
