"""Targets of whole distributions, their losses, and their way into the policy loss."""

import itertools
import math

import pytest
import torch

from sg_opd_trl.core import (
    asymmetric_tokens,
    extrapolated_advantage,
    extrapolated_log_probs,
    forward_kl_on_support,
    local_support_matching,
    matched_advantages,
    reverse_kl_advantage,
    route_gated_advantages,
    route_lambdas,
)

SETTINGS = {"lambda_high": 1.8, "lambda_base": 1.25, "disagree_interp_beta": 0.7, "cell_lambdas": (1.6, 0.8, 1.2, 1.4)}


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_probs(*shape: int, seed: int) -> torch.Tensor:
    return (2 * numbers(*shape, seed=seed)).log_softmax(-1)


# --- routes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("neutral_mode", ["base", "conflict"])
@pytest.mark.parametrize("mode", ["interp", "interp_lambda", "preserve", "cells"])
def test_scale_times_the_advantage_at_lambda_is_the_routed_advantage(mode: str, neutral_mode: str) -> None:
    student, teacher, reference = (numbers(6, 30, seed=seed) - 3 for seed in range(3))
    teacher[:, 0] = student[:, 0]  # a2 = 0
    verifier = torch.tensor([1.0, -1.0, 0.0, math.nan, 0.5, -2.0], dtype=torch.float64)
    gate = torch.randint(-1, 2, student.shape, generator=torch.Generator().manual_seed(3))
    settings = SETTINGS | {"disagree_mode": mode, "neutral_mode": neutral_mode}
    expected = route_gated_advantages(gate, student, teacher, reference, verifier, **settings)
    lambdas, scales = route_lambdas(gate, reverse_kl_advantage(student, teacher), verifier, **settings)
    found = scales * extrapolated_advantage(student, teacher, reference, lambdas)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert len(lambdas.unique()) >= 2
    assert (mode == "interp") == bool((scales != 1).any())


@pytest.mark.parametrize(
    ("mode", "neutral_mode", "lambdas", "scales"),
    [
        ("interp", "base", [1.8, 1.0, 1.25], [1, 0.7, 1]),
        ("interp", "conflict", [1.8, 1.0, 1.0], [1, 0.7, 0.7]),
        ("interp_lambda", "base", [1.8, 0.7, 1.25], [1, 1, 1]),
        ("interp_lambda", "conflict", [1.8, 0.7, 0.7], [1, 1, 1]),
        ("preserve", "base", [1.8, 1.25, 1.25], [1, 1, 1]),
        # a1 > 0: ++ with a2 = 1, +- with a2 = -1, and for the neutral token a2 = -1 again.
        ("cells", "base", [1.6, 0.8, 1.25], [1, 1, 1]),
        ("cells", "conflict", [1.6, 0.8, 0.8], [1, 1, 1]),
    ],
)
def test_routes_by_hand(mode: str, neutral_mode: str, lambdas: list[float], scales: list[float]) -> None:
    gate, a2 = torch.tensor([[1, -1, 0]]), torch.tensor([[1.0, -1.0, -1.0]])
    settings = SETTINGS | {"disagree_mode": mode, "neutral_mode": neutral_mode}
    found = route_lambdas(gate, a2, torch.ones(1), **settings)
    assert found.lambdas.tolist() == [pytest.approx(lambdas)]
    assert found.scales.tolist() == [pytest.approx(scales)]


def test_the_verifiers_advantage_has_no_distribution() -> None:
    with pytest.raises(ValueError, match=r"`disagree_mode` must be one of interp, ((?!grpo).)* here, got 'grpo'"):
        route_lambdas(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1), lambda_high=1.8, disagree_mode="grpo")


# --- targets ---------------------------------------------------------------------------------------------------------
def test_the_extrapolated_target_by_loop() -> None:
    teacher, reference = log_probs(2, 3, 5, seed=0), log_probs(2, 3, 5, seed=1)
    lambdas = torch.tensor([[1.0, 1.8, 0.5], [0.0, 2.5, 1.25]], dtype=torch.float64)
    found = extrapolated_log_probs(teacher, reference, lambdas)
    for row, t in itertools.product(range(2), range(3)):
        lam = lambdas[row, t].item()
        powers = [
            math.exp(a) ** lam * math.exp(b) ** (1 - lam)
            for a, b in zip(teacher[row, t].tolist(), reference[row, t].tolist(), strict=True)
        ]
        assert found[row, t].exp().tolist() == pytest.approx([power / sum(powers) for power in powers], abs=1e-12)


def test_the_target_by_hand() -> None:
    # (.5^2/.25, .5^2/.75) = (1, 1/3) -> (3/4, 1/4)
    teacher, reference = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    found = extrapolated_log_probs(teacher, reference, torch.full((1, 1), 2.0))
    assert found.exp().flatten().tolist() == pytest.approx([0.75, 0.25])


def test_the_reference_is_not_read_at_lambda_one() -> None:
    teacher = log_probs(1, 2, 4, seed=0)
    lambdas = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    found = extrapolated_log_probs(teacher, torch.full_like(teacher, math.nan), lambdas)
    assert torch.equal(found[:, 0], extrapolated_log_probs(teacher[:, :1], None, None)[:, 0])
    assert found[:, 1].isnan().all()


def test_targets_are_detached() -> None:
    teacher, reference = log_probs(1, 2, 4, seed=0).requires_grad_(), log_probs(1, 2, 4, seed=1).requires_grad_()
    assert not extrapolated_log_probs(teacher, reference, torch.full((1, 2), 2.0).double()).requires_grad


@pytest.mark.parametrize("lam", [1.0, 1.8, 0.6])
def test_the_expected_sampled_gradient_is_that_of_the_whole_distribution(lam: float) -> None:
    """OPD's score-function gradient, every token of the vocabulary weighed by its probability."""
    teacher, reference = log_probs(1, 1, 6, seed=1), log_probs(1, 1, 6, seed=2)
    logits = (2 * numbers(1, 1, 6, seed=0)).requires_grad_()
    target = extrapolated_log_probs(teacher, reference, torch.full((1, 1), lam, dtype=torch.float64))
    (whole,) = torch.autograd.grad(local_support_matching(logits, target).sum(), logits)
    student = logits.log_softmax(-1)[0]
    # Each token of the vocabulary as the only one of a row.
    rows = [x.reshape(-1, 1) for x in (student, teacher[0], reference[0])]
    advantages = extrapolated_advantage(*rows, lam)
    loss = -(student.detach().exp().reshape(-1, 1) * advantages * rows[0]).sum()
    (sampled,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(sampled, whole, rtol=0, atol=1e-12)
    assert whole.abs().max() > 0.05


def test_every_sequence_of_a_two_token_model() -> None:
    """The sum over all sequences of OPD's gradient is the sequence-level reverse KL's, prefix by prefix."""
    first, second = numbers(3, seed=0).requires_grad_(), numbers(3, 3, seed=1).requires_grad_()
    teacher = log_probs(3, seed=2), log_probs(3, 3, seed=3)
    student = first.log_softmax(-1), second.log_softmax(-1)
    sampled = whole = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product(range(3), range(3)):
        logps = torch.stack([student[0][a], student[1][a, b]]).unsqueeze(0)
        weight = logps.detach().sum().exp()
        a2 = reverse_kl_advantage(logps, torch.stack([teacher[0][a], teacher[1][a, b]]).unsqueeze(0))
        sampled = sampled - weight * (a2 * logps).sum()
        targets = torch.stack([teacher[0], teacher[1][a]]).unsqueeze(0)
        losses = local_support_matching(torch.stack([first, second[a]]).unsqueeze(0), targets)
        whole = whole + weight * losses.sum()
    expected = torch.autograd.grad(whole, (first, second), retain_graph=True)
    for found, other in zip(torch.autograd.grad(sampled, (first, second)), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=0, atol=1e-12)


# --- asymmetric ------------------------------------------------------------------------------------------------------
def test_the_forward_kl_by_hand() -> None:
    # K = 2: (.6 ln(.6/.2) + .3 ln(.3/.3)) / 2 = (.659167 + 0) / 2 = .329584
    student, teacher = torch.tensor([[[0.2, 0.3]]]).log(), torch.tensor([[[0.6, 0.3]]]).log()
    assert forward_kl_on_support(student, teacher).item() == pytest.approx(0.329584, abs=1e-6)
    assert forward_kl_on_support(student, teacher, 0.25).item() == pytest.approx(0.329584 / 2, abs=1e-6)


def test_the_forward_kl_has_the_gradient_of_finite_differences() -> None:
    teacher, student = log_probs(2, 3, 4, seed=0), log_probs(2, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: forward_kl_on_support(x, teacher), (student,))
    teacher.requires_grad_()
    forward_kl_on_support(student, teacher).sum().backward()
    assert teacher.grad is None


def test_which_tokens_are_asymmetric() -> None:
    student = torch.tensor([[0.5, 0.5, 0.5, 0.1]]).log()
    teacher = torch.tensor([[0.4, 0.5, 0.7, 0.4]]).log()
    assert asymmetric_tokens(student, teacher).tolist() == [[True, True, False, False]]
    assert asymmetric_tokens(student, teacher, 0.25).tolist() == [[True, True, True, False]]
    assert asymmetric_tokens(student, teacher, -0.05).tolist() == [[True, False, False, False]]
    assert asymmetric_tokens(student, teacher, 1.0).all()
    assert not asymmetric_tokens(student, teacher, -1.0).any()


def test_the_sign_of_a_token_that_underflows() -> None:
    far = torch.tensor([[-200.0, -201.0]])
    assert asymmetric_tokens(far, far.flip(1)).tolist() == [[True, False]]


@pytest.mark.parametrize("threshold", [-1.5, 1.5, math.nan])
def test_a_threshold_that_is_no_difference_of_probabilities(threshold: float) -> None:
    with pytest.raises(ValueError, match="`threshold` must be"):
        asymmetric_tokens(torch.zeros(1, 1), torch.zeros(1, 1), threshold)


# --- into the policy loss --------------------------------------------------------------------------------------------
def test_matched_advantages() -> None:
    advantages = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    losses = torch.tensor([[0.5, 0.25, math.nan]], requires_grad=True)
    weights = torch.tensor([[2.0, 1.0, 1.0]], requires_grad=True), torch.tensor([[3.0, 1.0, 1.0]])
    found = matched_advantages(advantages, losses, torch.tensor([[1, 1, 0]]), *weights)
    assert found.tolist() == [[-3.0, -0.25, 3.0]]
    found[:, :2].sum().backward()
    assert losses.grad.tolist() == [[-6.0, -1.0, 0.0]]
    assert advantages.grad is weights[0].grad is None


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: route_lambdas(x, y, torch.zeros(2), lambda_high=1.8),
        lambda x, y: matched_advantages(x, y, x),
        lambda x, y: asymmetric_tokens(x, y),
        lambda x, y: extrapolated_log_probs(x.unsqueeze(2), y.unsqueeze(2), x),
        lambda x, y: forward_kl_on_support(x.unsqueeze(2), y.unsqueeze(2)),
    ],
)
def test_shapes_are_checked(call: object) -> None:
    call(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must have the shape"):
        call(torch.zeros(2, 3), torch.zeros(2, 1))


# --- reverse KL on the support ---------------------------------------------------------------------------------------
def support_logits(*shape: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_kl(student: list[float], teacher: list[float]) -> float:
    def normalised(values: list[float]) -> list[float]:
        powers = [math.exp(v) for v in values]
        return [p / sum(powers) for p in powers]

    return sum(p * math.log(p / q) for p, q in zip(normalised(student), normalised(teacher), strict=True))


def test_the_reverse_kl_by_hand() -> None:
    # p = [.1554, .4223, .4223], q = [.6652, .2447, .0900]
    # .1554 ln(.1554/.6652) + .4223 ln(.4223/.2447) + .4223 ln(.4223/.0900) = -.2260 + .2304 + .6528 = .6572
    loss = local_support_matching(torch.tensor([[[0.0, 1.0, 1.0]]]), torch.tensor([[[2.0, 1.0, 0.0]]]))
    assert loss.shape == (1, 1)
    assert loss.item() == pytest.approx(0.657205, abs=1e-6)


def test_the_reverse_kl_against_loop() -> None:
    student, teacher = support_logits(3, 4, 5, seed=0), support_logits(3, 4, 5, seed=1)
    losses = local_support_matching(student, teacher)
    for row in range(3):
        for t in range(4):
            expected = slow_kl(student[row, t].tolist(), teacher[row, t].tolist())
            assert losses[row, t].item() == pytest.approx(expected, abs=1e-12)


def test_the_reverse_kl_is_zero_at_equality_and_shifts_change_nothing() -> None:
    student, teacher = support_logits(2, 3, 5, seed=0), support_logits(2, 3, 5, seed=1)
    whole = local_support_matching(student, teacher)
    torch.testing.assert_close(local_support_matching(student + 3.0, teacher - 7.0), whole)
    torch.testing.assert_close(local_support_matching(teacher + 2.0, teacher), torch.zeros(2, 3, dtype=torch.float64))
    assert (whole > 0).all()


def test_the_reverse_kl_has_the_gradient_of_finite_differences_and_the_teacher_none() -> None:
    student, teacher = (
        support_logits(2, 3, 4, seed=0).requires_grad_(),
        support_logits(2, 3, 4, seed=1).requires_grad_(),
    )
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


def test_the_reverse_kl_in_rows_columns_and_half_precision() -> None:
    student, teacher = support_logits(3, 4, 5, seed=0), support_logits(3, 4, 5, seed=1)
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


def test_refusals_of_the_reverse_kl() -> None:
    student = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"`teacher_logits_on_support` must have the shape of"):
        local_support_matching(student, torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"`student_logits_on_support` must have 3 dimension"):
        local_support_matching(student[0], student[0])
    with pytest.raises(TypeError, match=r"`teacher_logits_on_support` must have a floating dtype"):
        local_support_matching(student, student.long())
