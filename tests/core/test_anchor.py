"""The anchor: token weights, cross-entropy, and its schedules."""

import math
from fractions import Fraction

import pytest
import torch

from sg_opd_trl.core import (
    ANCHOR_REDUCTIONS,
    ANCHOR_WEIGHTS,
    anchor_cross_entropy,
    anchor_denominator,
    anchor_schedule,
    anchor_token_weights,
    separated_prompts,
    separated_schedule,
)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 log-probs, a ragged mask with one empty row, and kept rows."""
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(5, 6, generator=generator, dtype=torch.float64) - 0.01
    lengths = torch.tensor([6, 3, 4, 1, 0])
    mask = torch.arange(6) < lengths[:, None]
    return logps, mask, torch.tensor([True, False, True, True, False])


def slow_loss(logps: torch.Tensor, mask: torch.Tensor, kept: torch.Tensor, weights: torch.Tensor, reduction: str,
              total: float) -> float:  # fmt: skip
    loss = 0.0
    for row in range(logps.shape[0]):
        if not kept[row]:
            continue
        tokens = [-(weights[row, t] * logps[row, t]).item() for t in range(logps.shape[1]) if mask[row, t]]
        loss += sum(tokens) / max(1, len(tokens)) if reduction == "seq_mean" else sum(tokens)
    return loss if reduction == "sum" else loss / max(1.0, total)


def test_chord_weights_by_hand() -> None:
    # p (1 - p) = [.09, .25, .09], mean .14333: [.6279, 1.7442, .6279]
    logps = torch.tensor([[0.1, 0.5, 0.9]]).log()
    weights = anchor_token_weights(logps, torch.ones(1, 3), "chord")
    torch.testing.assert_close(weights, torch.tensor([[0.6279, 1.7442, 0.6279]]), atol=5e-5, rtol=0)


def test_dft_weights_by_hand() -> None:
    # p = [.1, .5, .9], mean .5: [.2, 1, 1.8]
    logps = torch.tensor([[0.1, 0.5, 0.9]]).log()
    torch.testing.assert_close(anchor_token_weights(logps, torch.ones(1, 3), "dft"), torch.tensor([[0.2, 1.0, 1.8]]))


@pytest.mark.parametrize("kind", ANCHOR_WEIGHTS)
def test_weights_against_loop(kind: str) -> None:
    logps, mask, _ = batch()
    weights = anchor_token_weights(logps, mask, kind)
    for row in range(5):
        raw = {}
        for t in range(6):
            if mask[row, t]:
                p = math.exp(logps[row, t].item())
                raw[t] = {"none": 1.0, "chord": p * (1 - p), "dft": p}[kind]
        for t in range(6):
            expected = raw[t] * len(raw) / sum(raw.values()) if t in raw else 0.0
            assert weights[row, t].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ANCHOR_WEIGHTS)
def test_weights_are_detached_and_padding_and_row_order_change_nothing(kind: str) -> None:
    logps, mask, _ = batch()
    whole = anchor_token_weights(logps, mask, kind)
    assert not anchor_token_weights(logps.clone().requires_grad_(), mask, kind).requires_grad
    junk = torch.full((5, 3), math.nan, dtype=logps.dtype)
    padded = anchor_token_weights(torch.cat([logps, junk], 1), torch.cat([mask, torch.zeros(5, 3) > 0], 1), kind)
    torch.testing.assert_close(padded, torch.cat([whole, torch.zeros_like(junk)], 1))
    order = torch.tensor([2, 4, 0, 3, 1])
    torch.testing.assert_close(anchor_token_weights(logps[order], mask[order], kind), whole[order])
    assert anchor_token_weights(logps.to(torch.bfloat16), mask, kind).dtype == torch.float32


def test_certain_rows_have_no_chord_weight() -> None:
    # p = 1: p (1 - p) = 0 everywhere, also where rounding left the log-prob a hair above 0.
    weights = anchor_token_weights(torch.tensor([[0.0, 1e-7]]), torch.ones(1, 2), "chord")
    assert torch.equal(weights, torch.zeros(1, 2))
    mixed = anchor_token_weights(torch.tensor([[1e-7, math.log(0.5)]]), torch.ones(1, 2), "chord")
    assert torch.equal(mixed, torch.tensor([[0.0, 2.0]]))
    # Close to 1, 1 - p must not cancel: -log p = 1e-9 and 3e-9 differ by a factor 3 even in float32.
    close = anchor_token_weights(torch.tensor([[-1e-9, -3e-9]]), torch.ones(1, 2), "chord")
    torch.testing.assert_close(close, torch.tensor([[0.5, 1.5]]))


def test_cross_entropy_by_hand() -> None:
    # Row 0: CE 1, 2 with weights .5, 1.5 -> .5 + 3 = 3.5 over 2 tokens. Row 1: CE 4, weight 1 -> 4 over 1 token.
    logps = torch.tensor([[-1.0, -2.0], [-4.0, -9.0]])
    mask, kept = torch.tensor([[1, 1], [1, 0]]), torch.tensor([1, 1])
    weights = torch.tensor([[0.5, 1.5], [1.0, 7.0]])

    def loss(reduction: str) -> float:
        total = anchor_denominator(mask, kept, reduction)
        return anchor_cross_entropy(logps, mask, kept, weights, reduction=reduction, total=total).item()

    assert loss("token_mean") == pytest.approx(7.5 / 3)
    assert loss("seq_mean") == pytest.approx((1.75 + 4) / 2)
    assert loss("sum") == pytest.approx(7.5)


@pytest.mark.parametrize("reduction", ANCHOR_REDUCTIONS)
@pytest.mark.parametrize("total", [0.0, 7.0, torch.tensor(7.0)])
def test_cross_entropy_against_loop(reduction: str, total: float | torch.Tensor) -> None:
    logps, mask, kept = batch()
    weights = anchor_token_weights(logps, mask, "chord")
    loss = anchor_cross_entropy(logps, mask, kept, weights, reduction=reduction, total=total)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(slow_loss(logps, mask, kept, weights, reduction, float(total)), abs=1e-12)


@pytest.mark.parametrize("reduction", ANCHOR_REDUCTIONS)
def test_denominator(reduction: str) -> None:
    _, mask, kept = batch()
    expected = {"token_mean": 6 + 4 + 1, "seq_mean": 3, "sum": 0}[reduction]
    for typed_mask, typed_kept in ((mask, kept), (mask.long(), kept.float())):
        denominator = anchor_denominator(typed_mask, typed_kept, reduction)
        assert denominator.shape == () and denominator.dtype == torch.float32
        assert denominator.item() == expected


def value_and_gradient(logps: torch.Tensor, mask: torch.Tensor, kept: torch.Tensor, weights: torch.Tensor,
                       reduction: str) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    leaf = logps.clone().requires_grad_()
    total = anchor_denominator(mask, kept, reduction)
    loss = anchor_cross_entropy(leaf, mask, kept, weights, reduction=reduction, total=total)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("reduction", ANCHOR_REDUCTIONS)
def test_zeroed_rows_equal_dropped_rows(reduction: str) -> None:
    logps, mask, kept = batch()
    weights = anchor_token_weights(logps, mask, "chord")
    # Rows that were not kept may hold anything.
    wild = torch.where(kept[:, None], logps, math.nan)
    loss, gradient = value_and_gradient(wild, mask, kept, weights, reduction)
    less, fewer = value_and_gradient(logps[kept], mask[kept], kept[kept], weights[kept], reduction)
    torch.testing.assert_close(loss, less)
    torch.testing.assert_close(gradient[kept], fewer)
    assert torch.equal(gradient[~kept], torch.zeros_like(gradient[~kept]))


@pytest.mark.parametrize("reduction", ANCHOR_REDUCTIONS)
def test_gradient_against_finite_differences_and_zero_on_padding(reduction: str) -> None:
    logps, mask, kept = batch()
    weights = anchor_token_weights(logps, mask, "chord")
    _, gradient = value_and_gradient(logps, mask, kept, weights, reduction)
    total = anchor_denominator(mask, kept, reduction).item()
    for row in range(5):
        for t in range(6):
            step = torch.zeros_like(logps)
            step[row, t] = 1e-6
            up, down = (slow_loss(logps + s, mask, kept, weights, reduction, total) for s in (step, -step))
            assert gradient[row, t].item() == pytest.approx((up - down) / 2e-6, abs=1e-8)
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


@pytest.mark.parametrize("reduction", ANCHOR_REDUCTIONS)
def test_padding_with_nan_row_order_and_splits(reduction: str) -> None:
    logps, mask, kept = batch()
    weights = anchor_token_weights(logps, mask, "dft")
    loss, gradient = value_and_gradient(logps, mask, kept, weights, reduction)
    junk = torch.full((5, 3), math.nan, dtype=logps.dtype)
    wide_mask = torch.cat([mask, torch.zeros(5, 3) > 0], 1)
    padded, wide = value_and_gradient(
        torch.cat([logps, junk], 1), wide_mask, kept, torch.cat([weights, junk], 1), reduction
    )
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(wide, torch.cat([gradient, torch.zeros_like(junk)], 1))
    order = torch.tensor([2, 4, 0, 3, 1])
    shuffled, moved = value_and_gradient(logps[order], mask[order], kept[order], weights[order], reduction)
    torch.testing.assert_close(shuffled, loss)
    torch.testing.assert_close(moved, gradient[order])
    total = anchor_denominator(mask, kept, reduction)
    parts = [
        anchor_cross_entropy(logps[p], mask[p], kept[p], weights[p], reduction=reduction, total=total)
        for p in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(parts[0] + parts[1], loss)


@pytest.mark.parametrize("reduction", ANCHOR_REDUCTIONS)
def test_nothing_verified_is_zero_with_a_gradient(reduction: str) -> None:
    logps, mask, kept = batch()
    loss, gradient = value_and_gradient(logps, mask, torch.zeros_like(kept), torch.ones_like(logps), reduction)
    assert loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros_like(logps))


def test_no_gradient_through_weights_and_half_precision() -> None:
    logps, mask, kept = batch()
    weights = torch.ones_like(logps, requires_grad=True)
    leaf = logps.to(torch.bfloat16).requires_grad_()
    loss = anchor_cross_entropy(leaf, mask, kept, weights.float(), reduction="sum", total=0.0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert weights.grad is None
    assert leaf.grad is not None and torch.equal(leaf.grad.float(), -(mask & kept[:, None]).float())


def test_refusals_of_weights_and_cross_entropy() -> None:
    logps, mask, kept = batch()
    with pytest.raises(ValueError, match=r"`kind` must be one of none, chord, dft, got 'phi'"):
        anchor_token_weights(logps, mask, "phi")
    with pytest.raises(ValueError, match=r"`reduction` must be one of token_mean, seq_mean, sum, got 'mean'"):
        anchor_cross_entropy(logps, mask, kept, logps, reduction="mean", total=1.0)
    with pytest.raises(ValueError, match=r"`reduction` must be one of"):
        anchor_denominator(mask, kept, "mean")
    with pytest.raises(ValueError, match=r"`weights` must have the shape of `student_logps`"):
        anchor_cross_entropy(logps, mask, kept, logps[:1], reduction="sum", total=1.0)
    with pytest.raises(ValueError, match=r"`kept` must have the shape of `the rows of mask` \(5,\), got \(5, 1\)"):
        anchor_cross_entropy(logps, mask, kept[:, None], logps, reduction="sum", total=1.0)
    with pytest.raises(ValueError, match=r"`mask` must have 2 dimension"):
        anchor_denominator(kept, kept, "sum")


# --- schedules -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("step", "expected"),
    # 30/35 of 100 steps; (1 + cos(pi k / 5)) / 2 for k = 1..5
    [(1, 1.0), (30, 1.0), (31, 0.9045), (32, 0.6545), (33, 0.3455), (34, 0.0955), (35, 0.0), (36, 0.0), (100, 0.0)],
)
def test_schedule_from_one_to_zero(step: int, expected: float) -> None:
    assert anchor_schedule(step, 100, 0.30, 0.35, 1.0, 0.0) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("step", "expected"), [(30, 0.2), (31, 0.1828), (35, 0.02), (36, 0.0)])
def test_a_schedule_whose_end_is_above_zero_jumps(step: int, expected: float) -> None:
    # step 31: .02 + .18 * .9045 = .1828
    assert anchor_schedule(step, 100, 0.30, 0.35, 0.2, 0.02) == pytest.approx(expected, abs=5e-5)


def test_a_schedule_with_equal_phase_ends_jumps() -> None:
    values = [anchor_schedule(step, 10, 0.5, 0.5, 0.2, 0.1) for step in range(1, 11)]
    assert values == [0.2] * 5 + [0.0] * 5


def test_phase_ends_survive_binary_fractions() -> None:
    # .29 * 100 and .57 * 100 are a hair below 29 and 57 in binary.
    assert 0.29 * 100 < 29 and 0.57 * 100 < 57
    for percent in range(101):
        frac = percent / 100
        full = [anchor_schedule(step, 100, frac, frac, 1.0, 1.0) for step in range(1, 101)]
        assert sum(full) == math.floor(Fraction(percent, 100) * 100)


def test_short_runs_and_extremes() -> None:
    assert anchor_schedule(1, 1, 0.3, 0.35, 1.0, 0.0) == 0.0  # both ends are step 0
    assert anchor_schedule(1, 10, 0.0, 0.0, 1.0, 0.0) == 0.0
    assert anchor_schedule(10, 10, 1.0, 1.0, 0.7, 0.0) == 0.7


@pytest.mark.parametrize("total", [7, 40, 100])
def test_schedule_against_loop_and_monotone(total: int) -> None:
    first, last = math.floor(Fraction(3, 10) * total), math.floor(Fraction(4, 5) * total)
    values = [anchor_schedule(step, total, 0.3, 0.8, 0.5, 0.1) for step in range(1, total + 1)]
    for step, value in enumerate(values, start=1):
        # Half-angle form: (1 + cos x) / 2 = cos(x / 2)^2
        angle = math.pi / 2 * (step - first) / (last - first)
        expected = 0.5 if step <= first else 0.1 + 0.4 * math.cos(angle) ** 2 if step <= last else 0.0
        assert value == pytest.approx(expected, abs=1e-12)
    assert values == sorted(values, reverse=True)


def test_refusals_of_the_schedule() -> None:
    with pytest.raises(
        ValueError, match=r"`phase2_end_frac` must be in \[0.5, 1.0\], got 0.4. Phase 2 follows phase 1"
    ):
        anchor_schedule(1, 10, 0.5, 0.4, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"`phase1_end_frac` must be in \[0.0, 1.0\], got nan"):
        anchor_schedule(1, 10, math.nan, 0.4, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"`phase2_end_frac` must be in"):
        anchor_schedule(1, 10, 0.3, 1.1, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"`step` must be >= 1 and finite, got 0. Steps are counted from 1"):
        anchor_schedule(0, 10, 0.3, 0.4, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"`total_steps` must be >= 1"):
        anchor_schedule(1, 0, 0.3, 0.4, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"`alpha_start` must be >= 0.0 and finite, got -0.1"):
        anchor_schedule(1, 10, 0.3, 0.4, -0.1, 0.0)
    with pytest.raises(ValueError, match=r"`alpha_end` must be"):
        anchor_schedule(1, 10, 0.3, 0.4, 0.1, math.nan)


def test_separated_in_time_is_a_constant_and_then_nothing() -> None:
    assert [separated_schedule(step, 10, 0.3, 0.2) for step in range(1, 11)] == [0.2] * 3 + [0.0] * 7
    assert separated_schedule(29, 100, 0.29, 0.5) == 0.5  # .29 * 100 is a hair below 29 in binary
    assert separated_schedule(30, 100, 0.29, 0.5) == 0.0


def test_separated_prompts_by_hand() -> None:
    # 30/35 of 100 steps: alpha is 0 in step 35, so 34 steps with 2 prompts are 68 prompts over 30 steps.
    drawn = [separated_prompts(step, 100, 0.30, 0.35, 0.2, 0.0, 2) for step in range(1, 101)]
    assert drawn[:4] == [(0, 2), (2, 4), (4, 6), (6, 9)]  # floor(68 k / 30) = 2.27, 4.53, 6.8, 9.07
    assert drawn[29] == (65, 68)
    assert set(drawn[30:]) == {(68, 68)}
    # With alpha_end above 0 step 35 counts too: 70.
    assert separated_prompts(30, 100, 0.30, 0.35, 0.2, 0.02, 2)[1] == 70


@pytest.mark.parametrize("ends", [(0.3, 0.35), (0.5, 0.5), (1.0, 1.0), (0.13, 0.9), (0.05, 0.05)])
@pytest.mark.parametrize("alpha_end", [0.0, 0.1])
@pytest.mark.parametrize("total", [7, 20, 100])
def test_separated_prompts_are_sg_opds_in_number_and_order(ends: tuple, alpha_end: float, total: int) -> None:
    per_step = 3
    anchored = sum(anchor_schedule(step, total, *ends, 0.2, alpha_end) > 0 for step in range(1, total + 1))
    drawn = [
        position
        for step in range(1, total + 1)
        if separated_schedule(step, total, ends[0], 0.2) > 0
        for position in range(*separated_prompts(step, total, *ends, 0.2, alpha_end, per_step))
    ]
    stage = [step for step in range(1, total + 1) if separated_schedule(step, total, ends[0], 0.2) > 0]
    assert drawn == (list(range(per_step * anchored)) if stage else [])


@pytest.mark.parametrize(
    "arguments",
    [
        (0, 10, 0.3, 0.4, 0.2, 0.0, 1),
        (1, 10, 0.3, 0.2, 0.2, 0.0, 1),
        (1, 10, 0.3, 0.4, 0.0, 0.0, 1),
        (1, 10, 0.3, 0.4, 0.2, -0.1, 1),
        (1, 10, 0.3, 0.4, 0.2, 0.0, 0),
        (1, 10, math.nan, 0.4, 0.2, 0.0, 1),
    ],
)
def test_separated_prompts_refuse_what_is_out_of_range(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="must be"):
        separated_prompts(*arguments)
