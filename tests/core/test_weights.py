"""Weights of tokens, masks, and the controls of gate and teacher."""

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from sg_opd_trl.core import (
    drift_gate,
    fixed_on_rows,
    prefix_importance_weight,
    random_gate,
    reverse_kl_advantage,
    sign_consistency_gate,
    span_numbers,
    stability_weight,
    without_special_tokens,
)


def ragged(rows: int = 5, columns: int = 11, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of either sign in float64 and a mask with holes and one empty row."""
    generator = torch.Generator().manual_seed(seed)
    values = 4 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    mask[0, 0], mask[-1] = True, False
    return values, mask


def slow_unit_mean(weights: list[list[float]], mask: list[list[bool]], batch: bool) -> list[list[float]]:
    rows = []
    for row, valid in zip(weights, mask, strict=True):
        if batch:
            counted = [w for r, m in zip(weights, mask, strict=True) for w, ok in zip(r, m, strict=True) if ok]
        else:
            counted = [w for w, ok in zip(row, valid, strict=True) if ok]
        rows.append([w * len(counted) / sum(counted) if ok else 0.0 for w, ok in zip(row, valid, strict=True)])
    return rows


def test_stability_weight_by_hand() -> None:
    # tau 2: phi = [1, 2/4, 1, 2/8], mean .6875; phi_hat * a2 is a2 clipped to +-2, divided by .6875.
    a2, mask = torch.tensor([[1.0, -4.0, 0.5, 8.0]]), torch.ones(1, 4)
    raw = stability_weight(a2, mask, 2.0, norm="none")
    torch.testing.assert_close(raw, torch.tensor([[1.0, 0.5, 1.0, 0.25]]))
    torch.testing.assert_close(raw * a2, a2.clamp(-2, 2))
    phi = stability_weight(a2, mask, 2.0)
    torch.testing.assert_close(phi, torch.tensor([[1.4545, 0.7273, 1.4545, 0.3636]]), atol=5e-5, rtol=0)
    torch.testing.assert_close(phi * a2, torch.tensor([[1.4545, -2.9091, 0.7273, 2.9091]]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("norm", ["sequence", "batch", "none"])
@pytest.mark.parametrize("tau", [0.5, 5.0])
def test_stability_weight_against_loop(norm: str, tau: float) -> None:
    a2, mask = ragged()
    a2[1, :3] = 0.0
    raw = [[1.0 if a == 0 else min(1.0, tau / abs(a)) for a in row] for row in a2.tolist()]
    if norm == "none":
        expected = [[p if ok else 0.0 for p, ok in zip(r, m, strict=True)] for r, m in zip(raw, mask, strict=True)]
    else:
        expected = slow_unit_mean(raw, mask.tolist(), batch=norm == "batch")
    weights = stability_weight(a2, mask, tau, norm=norm)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_stability_mean_is_one() -> None:
    a2, mask = ragged()
    per_row = stability_weight(a2, mask, 1.0)
    for row in range(4):
        assert per_row[row][mask[row]].mean().item() == pytest.approx(1.0)
    assert stability_weight(a2, mask, 1.0, norm="batch")[mask].mean().item() == pytest.approx(1.0)


def test_stability_batch_denominator_makes_micro_batches_agree() -> None:
    a2, mask = ragged()
    whole = stability_weight(a2, mask, 1.0, norm="batch")
    raw = stability_weight(a2, mask, 1.0, norm="none")
    denominator = raw.sum() / mask.sum()
    split = [
        stability_weight(a, m, 1.0, "batch", denominator) for a, m in zip(a2.split(2), mask.split(2), strict=True)
    ]
    torch.testing.assert_close(torch.cat(split), whole)
    alone = [stability_weight(a, m, 1.0, "batch") for a, m in zip(a2.split(2), mask.split(2), strict=True)]
    assert not torch.allclose(torch.cat(alone), whole)


def test_stability_switched_off_is_ones() -> None:
    a2, mask = ragged()
    assert torch.equal(stability_weight(a2, mask, None), torch.ones_like(a2))


def test_drift_gate_two_blocks_by_hand() -> None:
    # Block means 0 and .6: g = [1, e^-.6 = .5488], mean .7744, w = [1.2913, .7087].
    current = torch.full((1, 4), -1.0)
    behaviour = current + torch.tensor([[0.0, 0.0, 0.6, 0.6]])
    weights = drift_gate(behaviour, current, torch.ones(1, 4), tau=1.0, block_size=2)
    torch.testing.assert_close(weights, torch.tensor([[1.2913, 1.2913, 0.7087, 0.7087]]), atol=5e-5, rtol=0)


def test_drift_gate_signed_means_cancel() -> None:
    # [.5, -.5] has mean 0; [.2, .2] mean .2: g = [1, .8187], w = [1.0997, .9003].
    current = torch.full((1, 4), -1.0)
    behaviour = current + torch.tensor([[0.5, -0.5, 0.2, 0.2]])
    weights = drift_gate(behaviour, current, torch.ones(1, 4), tau=1.0, block_size=2)
    torch.testing.assert_close(weights, torch.tensor([[1.0997, 1.0997, 0.9003, 0.9003]]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("block_size", [1, 3, 4, 11, 64])
def test_drift_gate_against_loop(block_size: int) -> None:
    drift, mask = ragged()
    behaviour = torch.rand_like(drift)
    raw = []
    for row in range(drift.shape[0]):
        gates = []
        for column in range(drift.shape[1]):
            block = range(column // block_size * block_size, min((column // block_size + 1) * block_size, 11))
            inside = [drift[row, k].item() for k in block if mask[row, k]]
            gates.append(math.exp(-0.3 * abs(sum(inside) / max(1, len(inside)))))
        raw.append(gates)
    weights = drift_gate(behaviour, behaviour - drift, mask, tau=0.3, block_size=block_size)
    expected = torch.tensor(slow_unit_mean(raw, mask.tolist(), batch=False), dtype=torch.float64)
    torch.testing.assert_close(weights, expected)


def test_drift_gate_is_one_without_drift_and_with_one_block() -> None:
    logps, mask = ragged()
    assert torch.equal(drift_gate(logps, logps, mask, tau=5.0, block_size=2), mask.double())
    torch.testing.assert_close(drift_gate(logps, 0 * logps, mask, tau=5.0, block_size=64), mask.double())


def test_drift_gate_survives_drift_beyond_the_range_of_exp() -> None:
    # exp(-1000) and exp(-1001) are 0 in floating point, their ratio e is not: w = 2 [e, 1] / (e + 1).
    behaviour = torch.tensor([[1000.0, 1001.0]], dtype=torch.float64)
    weights = drift_gate(behaviour, torch.zeros_like(behaviour), torch.ones(1, 2), tau=1.0, block_size=1)
    share = 2 / (1 + math.e)
    torch.testing.assert_close(weights, torch.tensor([[math.e * share, share]], dtype=torch.float64))


def test_drift_gate_before_its_norm_and_with_absolute_drift() -> None:
    # Signed means 0 and .2 as above; absolute means .5 and .2: g = [e^-.5, e^-.2], mean .7126, w = [.8511, 1.1489].
    current, ones = torch.full((1, 4), -1.0), torch.ones(1, 4)
    behaviour = current + torch.tensor([[0.5, -0.5, 0.2, 0.2]])
    signed = drift_gate(behaviour, current, ones, 1.0, 2, norm="none")
    torch.testing.assert_close(signed, torch.tensor([[1.0, 1.0, 0.8187, 0.8187]]), atol=5e-5, rtol=0)
    absolute = drift_gate(behaviour, current, ones, 1.0, 2, mean="absolute", norm="none")
    torch.testing.assert_close(absolute, torch.tensor([[0.6065, 0.6065, 0.8187, 0.8187]]), atol=5e-5, rtol=0)
    weights = drift_gate(behaviour, current, ones, 1.0, 2, mean="absolute")
    torch.testing.assert_close(weights, torch.tensor([[0.8511, 0.8511, 1.1489, 1.1489]]), atol=5e-5, rtol=0)


def test_spans_end_with_their_newline() -> None:
    ids = torch.tensor([[5, 9, 5, 5, 8, 9], [9, 9, 1, 1, 1, 8]])
    assert span_numbers(ids, torch.tensor([8, 9])).tolist() == [[0, 0, 1, 1, 1, 2], [0, 1, 2, 2, 2, 2]]
    assert span_numbers(ids, torch.tensor([7])).tolist() == [[0] * 6] * 2
    assert span_numbers(ids, torch.tensor([], dtype=torch.long)).tolist() == [[0] * 6] * 2


@pytest.mark.parametrize("mean", ["signed", "absolute"])
def test_drift_gate_on_spans_against_loop(mean: str) -> None:
    drift, mask = ragged()
    ids = torch.randint(0, 4, drift.shape, generator=torch.Generator().manual_seed(3))
    raw = []
    for row in range(drift.shape[0]):
        gates, start = [], 0
        for column in range(drift.shape[1]):
            end = column == drift.shape[1] - 1 or ids[row, column] == 2
            if end:
                inside = [drift[row, k].item() for k in range(start, column + 1) if mask[row, k]]
                inside = [abs(x) for x in inside] if mean == "absolute" else inside
                gates += [math.exp(-0.3 * abs(sum(inside) / max(1, len(inside))))] * (column + 1 - start)
                start = column + 1
        raw.append(gates)
    spans, behaviour = span_numbers(ids, torch.tensor([2])), torch.rand_like(drift)
    assert spans.max() >= 3
    current = (behaviour - drift).masked_fill(~mask, math.nan)
    weights = drift_gate(behaviour, current, mask, 0.3, span_ids=spans, mean=mean)
    expected = torch.tensor(slow_unit_mean(raw, mask.tolist(), batch=False), dtype=torch.float64)
    torch.testing.assert_close(weights, expected)


def test_spans_of_equal_length_are_blocks() -> None:
    drift, mask = ragged()
    spans = (torch.arange(11) // 3).expand(5, 11)
    by_span = drift_gate(drift, 0 * drift, mask, 0.3, span_ids=spans)
    torch.testing.assert_close(by_span, drift_gate(drift, 0 * drift, mask, 0.3, 3))


def test_special_tokens_leave_the_mask_at_their_first_occurrence() -> None:
    ids = torch.tensor([[7, 3, 7, 3, 4], [3, 3, 4, 4, 7]])
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    # Row 0: the 3 in column 1 does not count, so that in column 3 is the first. Row 1: 7 does not count.
    first = without_special_tokens(ids, mask, [3, 7])
    assert first.tolist() == [[0, 0, 1, 0, 1], [0, 1, 1, 1, 0]]
    assert first.dtype == mask.dtype
    assert without_special_tokens(ids, mask, [3, 7], "all").tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 0]]
    assert torch.equal(without_special_tokens(ids, mask, []), mask)
    assert torch.equal(without_special_tokens(ids, mask, [99], "all"), mask)


def test_prefix_weight_by_hand() -> None:
    # |A| = [1, 1, 2], prefix sums [0, 1, 2] of 4: 1 + .5 (1 - [0, .25, .5]).
    weights = prefix_importance_weight(torch.tensor([[1.0, -1.0, 2.0]]), torch.ones(1, 3), 0.5)
    torch.testing.assert_close(weights, torch.tensor([[1.5, 1.375, 1.25]]))


def test_prefix_weight_against_loop() -> None:
    a2, mask = ragged()
    weights = prefix_importance_weight(a2, mask, 0.5)
    for row in range(a2.shape[0]):
        total = sum(abs(a) for a, ok in zip(a2[row].tolist(), mask[row], strict=True) if ok)
        before = 0.0
        for column in range(a2.shape[1]):
            if not mask[row, column]:
                assert weights[row, column] == 0
                continue
            assert weights[row, column].item() == pytest.approx(1 + 0.5 * (1 - before / total), abs=1e-12)
            before += abs(a2[row, column].item())


def test_prefix_weight_is_one_at_gamma_zero_and_full_without_any_advantage() -> None:
    a2, mask = ragged()
    assert torch.equal(prefix_importance_weight(a2, mask, 0.0), mask.double())
    assert torch.equal(prefix_importance_weight(0 * a2, mask, 0.5), 1.5 * mask.double())


WEIGHTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sequence": lambda a, m: stability_weight(a, m, 1.0),
    "batch": lambda a, m: stability_weight(a, m, 1.0, norm="batch"),
    "raw": lambda a, m: stability_weight(a, m, 1.0, norm="none"),
    "drift": lambda a, m: drift_gate(a, 0.5 * a, m, tau=1.0, block_size=3),
    "raw drift": lambda a, m: drift_gate(a, 0.5 * a, m, tau=1.0, block_size=3, mean="absolute", norm="none"),
    "spans": lambda a, m: drift_gate(a, 0.5 * a, m, 1.0, span_ids=torch.arange(a.shape[1]).expand(a.shape) // 3),
    "prefix": lambda a, m: prefix_importance_weight(a, m, 0.5),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_padding_rows_gradient_and_precision(name: str) -> None:
    weigh = WEIGHTS[name]
    values, mask = ragged()
    whole = weigh(values, mask)
    assert whole.isfinite().all() and (whole >= 0).all()
    assert (whole[~mask] == 0).all()
    assert not weigh(values.clone().requires_grad_(), mask).requires_grad
    junk = torch.full((5, 4), math.nan, dtype=values.dtype)
    padded = weigh(torch.cat([values, junk], dim=1), torch.cat([mask, torch.zeros(5, 4, dtype=torch.bool)], dim=1))
    torch.testing.assert_close(padded[:, :11], whole)
    assert (padded[:, 11:] == 0).all()
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(weigh(values[order], mask[order]), whole[order])
    torch.testing.assert_close(weigh(values, mask.int()), whole)
    half = weigh(values.to(torch.bfloat16), mask)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, weigh(values.to(torch.bfloat16).float(), mask))
    assert torch.equal(weigh(values, torch.zeros_like(mask)), torch.zeros_like(values))


def test_refusals_of_weights_and_masks() -> None:
    a2, mask = ragged()
    for tau in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"`tau` must be > 0 and finite, got .* Set it to None to switch phi off"):
            stability_weight(a2, mask, tau)
    with pytest.raises(ValueError, match=r"`norm` must be one of sequence, batch, none, got 'token'"):
        stability_weight(a2, mask, 1.0, norm="token")
    with pytest.raises(ValueError, match=r'`denominator` must be a 0-dim tensor with norm="batch"'):
        stability_weight(a2, mask, 1.0, denominator=torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"`denominator` must be a 0-dim tensor"):
        stability_weight(a2, mask, 1.0, norm="batch", denominator=torch.ones(5))
    with pytest.raises(TypeError, match=r"`denominator` must be a torch.Tensor, got float"):
        stability_weight(a2, mask, 1.0, norm="batch", denominator=0.5)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"`mask` must have the shape of `teacher_advantages` \(5, 11\), got \(5, 10\)"
    ):
        stability_weight(a2, mask[:, :10], 1.0)
    with pytest.raises(ValueError, match=r"`tau` must be >= 0.0 and finite, got -1.0"):
        drift_gate(a2, a2, mask, tau=-1.0)
    with pytest.raises(ValueError, match=r"`block_size` must be >= 1 and finite, got 0"):
        drift_gate(a2, a2, mask, tau=1.0, block_size=0)
    with pytest.raises(ValueError, match=r"`gamma` must be >= 0.0 and finite, got nan"):
        prefix_importance_weight(a2, mask, math.nan)
    with pytest.raises(ValueError, match=r"`mean` must be one of signed, absolute, got 'median'"):
        drift_gate(a2, a2, mask, 1.0, mean="median")
    with pytest.raises(ValueError, match=r"`norm` must be one of sequence, none, got 'batch'"):
        drift_gate(a2, a2, mask, 1.0, norm="batch")
    with pytest.raises(TypeError, match=r"`span_ids` must have an integer dtype, got torch.float64"):
        drift_gate(a2, a2, mask, 1.0, span_ids=a2)
    with pytest.raises(
        ValueError, match=r"`span_ids` must have the shape of `behavior_logps` \(5, 11\), got \(5, 10\)"
    ):
        drift_gate(a2, a2, mask, 1.0, span_ids=mask[:, :10].long())
    with pytest.raises(TypeError, match=r"`completion_ids` must have an integer dtype, got torch.bool"):
        span_numbers(mask, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"`ending_ids` must have 1 dimension"):
        span_numbers(mask.long(), torch.tensor(1))
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `completion_ids`"):
        without_special_tokens(mask.long(), mask[:, :4], [1])
    with pytest.raises(ValueError, match=r"`scope` must be one of first, all, got 'last'"):
        without_special_tokens(mask.long(), mask, [1], "last")


# --- prefix weights against TRL's `experimental.iw_opd` --------------------------------------------------------------
GAMMA = 0.5


@pytest.mark.filterwarnings("ignore::UserWarning")  # that the trainer is experimental
def test_prefix_weights_and_gradient_are_those_of_trl() -> None:
    from trl.experimental.iw_opd import IWOPDTrainer

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 11, (5, 7), generator=generator)
    lengths = torch.tensor([7, 3, 1, 5, 0])
    mask = torch.arange(7) < lengths[:, None]
    teacher, rollout = (-3 * torch.rand(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    metrics: dict = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        temperature=1.0,
        iw_opd_gamma=GAMMA,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics=metrics,
    )
    labels = tokens.masked_fill(~mask, -100)
    theirs = IWOPDTrainer._compute_iw_opd_loss(trainer, logits, tokens, labels, teacher, rollout, mask.sum())
    (their_gradient,) = torch.autograd.grad(theirs, logits)

    a2 = reverse_kl_advantage(rollout, teacher)
    weights = prefix_importance_weight(a2, mask, GAMMA)
    logps = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    ours = -(weights * a2 * logps * mask).sum() / mask.sum()
    (our_gradient,) = torch.autograd.grad(ours, logits)

    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-12, atol=1e-15)
    counted = weights[mask]
    for name, value in {"min": counted.min(), "mean": counted.mean(), "max": counted.max()}.items():
        assert metrics["train"][f"iw_opd/{name}_weight"] == [pytest.approx(value.item(), abs=1e-12)]
    assert counted.max() - counted.min() > 0.2


# --- controls --------------------------------------------------------------------------------------------------------
def gate_inputs(seed: int = 0, rows: int = 6, columns: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8)
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    return gate, mask, torch.rand(rows, columns, generator=generator)


def slow_random_gate(gate: torch.Tensor, mask: torch.Tensor, numbers: torch.Tensor) -> list[list[int]]:
    places = [(i, t) for i in range(gate.shape[0]) for t in range(gate.shape[1]) if mask[i, t] and gate[i, t] != 0]
    wanted = sum(gate[place].item() > 0 for place in places)
    chosen = sorted(places, key=lambda place: numbers[place].item())[:wanted]
    return [
        [0 if (i, t) not in places else 1 if (i, t) in chosen else -1 for t in range(gate.shape[1])]
        for i in range(gate.shape[0])
    ]


def test_random_gate_by_hand() -> None:
    # Non-neutral and counted: (0,0) (0,2) (1,1) (1,2), two of them consensus: the two smallest numbers, .1 and .3.
    gate = torch.tensor([[1, 0, -1, 1], [0, 1, -1, -1]], dtype=torch.int8)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    numbers = torch.tensor([[0.9, 0.0, 0.1, 0.0], [0.0, 0.5, 0.3, 0.2]])
    assert random_gate(gate, mask, numbers).tolist() == [[-1, 0, 1, 0], [0, -1, 1, 0]]


@pytest.mark.parametrize("seed", range(8))
def test_random_gate_against_loop(seed: int) -> None:
    gate, mask, numbers = gate_inputs(seed)
    dealt = random_gate(gate, mask, numbers)
    assert dealt.dtype == torch.int8
    assert dealt.tolist() == slow_random_gate(gate, mask, numbers)
    for value in (-1, 0, 1):
        assert ((dealt == value) & mask).sum() == ((gate == value) & mask).sum(), "another share"
    assert not torch.equal(dealt, torch.where(mask, gate, 0))


def test_random_gate_under_padding_row_order_and_repetition() -> None:
    gate, mask, numbers = gate_inputs()
    dealt = random_gate(gate, mask, numbers)
    assert torch.equal(random_gate(gate, mask.int(), numbers), dealt)
    junk = torch.ones(6, 3, dtype=torch.int8)
    wider = random_gate(
        torch.cat([gate, junk], 1), torch.cat([mask, junk == 0], 1), torch.cat([numbers, torch.zeros(6, 3)], 1)
    )
    assert torch.equal(wider[:, :9], dealt) and not wider[:, 9:].any()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(random_gate(gate[order], mask[order], numbers[order]), dealt[order])


def test_a_token_is_consensus_as_often_as_the_share_says_whatever_the_verifier_thinks_of_it() -> None:
    a1, a2 = torch.tensor([1.0, -1.0]), torch.tensor([[1.0, -1.0, 1.0, 1.0], [1.0, -1.0, -1.0, 0.0]])
    gate = sign_consistency_gate(a1, a2)
    assert gate.tolist() == [[1, -1, 1, 1], [-1, 1, 1, 0]]  # 5 of 7
    generator, mask = torch.Generator().manual_seed(1), torch.ones(2, 4)
    draws = torch.stack([random_gate(gate, mask, torch.rand(2, 4, generator=generator)) for _ in range(3000)])
    share = (draws > 0).float().mean(0)
    assert share[1, 3] == 0
    assert torch.allclose(share[gate != 0], torch.tensor(5 / 7), atol=0.04)  # 5 standard deviations


def test_empty_and_one_sided_gates_stay_as_they_are() -> None:
    gate, mask, numbers = gate_inputs()
    for same in (torch.zeros_like(gate), gate.abs(), -gate.abs()):
        assert torch.equal(random_gate(same, mask, numbers), torch.where(mask, same, 0))
    assert not random_gate(gate, torch.zeros_like(mask), numbers).any()


def test_fixed_on_rows() -> None:
    values = torch.tensor([[1.0, 2.0], [math.nan, 3.0], [4.0, 5.0]], requires_grad=True)
    fixed = fixed_on_rows(values, torch.tensor([0, 1, 0]), -0.5)
    assert fixed.tolist() == [[1.0, 2.0], [-0.5, -0.5], [4.0, 5.0]]
    assert not fixed.requires_grad
    assert fixed_on_rows(values.double(), torch.tensor([False] * 3), -1.0).dtype == torch.float64


def test_ties_go_to_the_earlier_token() -> None:
    gate, mask, numbers = gate_inputs()
    in_order = torch.arange(54.0).view(6, 9)
    assert torch.equal(random_gate(gate, mask, torch.zeros_like(numbers)), random_gate(gate, mask, in_order))


def test_refusals_of_the_controls() -> None:
    gate, mask, numbers = gate_inputs()
    with pytest.raises(ValueError, match=r"`gate` must have the shape of `numbers` \(6, 9\), got \(6, 8\)"):
        random_gate(gate[:, :8], mask, numbers)
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `numbers`"):
        random_gate(gate, mask[:5], numbers)
    with pytest.raises(TypeError, match=r"`numbers` must have a floating dtype"):
        random_gate(gate, mask, gate)
    with pytest.raises(ValueError, match=r"`rows` must have the shape of `the rows of values` \(6,\), got \(5,\)"):
        fixed_on_rows(numbers, mask[:5, 0], -1.0)
    with pytest.raises(ValueError, match=r"`value` must be finite, got nan"):
        fixed_on_rows(numbers, mask[:, 0], math.nan)
