import math
from typing import Any

import pytest
import torch

from sg_opd_trl.core import MAXIMUM_NAMES, METRIC_NAMES, TokenStatistics, combine, finalize, token_statistics

GROUPS = ("", "/right", "/wrong")
TEACHER = ("kl_k1", "kl_k3", "abs_advantage_mean", "phi_mean")


def batch(rows: int = 6, columns: int = 8, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(columns) < torch.randint(1, columns + 1, (rows,), generator=generator)[:, None]
    verdict = torch.tensor([1, 0, -1, 1, 0, 1])[:rows]  # -1 abstains
    return {
        "gate": torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8),
        "advantages": torch.randn(rows, columns, generator=generator),
        "teacher_advantages": 2 * torch.randn(rows, columns, generator=generator),
        "stability_weights": torch.rand(rows, columns, generator=generator),
        "mask": mask,
        "right": verdict == 1,
        "wrong": verdict == 0,
        "taught": torch.tensor([1, 1, 1, 1, 0, 1])[:rows] == 1,
        "prefix_weights": 1 + torch.rand(rows, columns, generator=generator),
        "drift_gates": torch.rand(rows, columns, generator=generator),
    }


OPTIONAL = {"gate": None, "taught": None, "prefix_weights": None, "drift_gates": None}


def mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def slow_metrics(b: dict[str, Any]) -> dict[str, float]:
    metrics: dict[str, float | None] = {}
    for suffix, chosen in (("", torch.ones_like(b["right"])), ("/right", b["right"]), ("/wrong", b["wrong"])):
        counted = [
            (i, t) for i in range(len(chosen)) for t in range(b["mask"].shape[1]) if chosen[i] and b["mask"][i, t]
        ]
        tokens = [(i, t) for i, t in counted if b["taught"] is None or b["taught"][i]]
        if b["prefix_weights"] is not None:
            metrics["weights/prefix_mean" + suffix] = mean([b["prefix_weights"][key].item() for key in tokens])
        if b["drift_gates"] is not None:
            gates = [b["drift_gates"][key].item() for key in counted]
            metrics["weights/drift_mean" + suffix] = mean(gates)
            metrics["weights/drift_max" + suffix] = max(gates, default=None)
            metrics["weights/drift_min" + suffix] = min(gates, default=None)
        a2 = {key: b["teacher_advantages"][key].item() for key in tokens}
        metrics["teacher/kl_k1" + suffix] = mean([-a for a in a2.values()])
        metrics["teacher/kl_k3" + suffix] = mean([math.exp(c) - c - 1 for c in (min(a, 20.0) for a in a2.values())])
        metrics["teacher/abs_advantage_mean" + suffix] = mean([abs(a) for a in a2.values()])
        metrics["teacher/abs_advantage_max" + suffix] = max((abs(a) for a in a2.values()), default=None)
        metrics["teacher/phi_mean" + suffix] = mean([b["stability_weights"][key].item() for key in tokens])
        if b["gate"] is None:
            continue
        for name, sign in (("consensus", 1), ("conflict", -1), ("neutral", 0)):
            members = [key for key in tokens if b["gate"][key].item() == sign]
            metrics["gate/" + name + suffix] = len(members) / len(tokens) if tokens else None
            metrics[f"gate/advantage_{name}{suffix}"] = mean([b["advantages"][key].item() for key in members])
            if name == "consensus":
                flips = [float(b["advantages"][key].item() * a2[key] < 0) for key in members]
                metrics["gate/sign_flips" + suffix] = mean(flips)
    return {name: value for name, value in metrics.items() if value is not None}


def assert_metrics(actual: dict[str, torch.Tensor], expected: dict[str, float]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32 and actual[name].shape == ()
        assert actual[name].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_by_hand() -> None:
    # Row 0 right, row 1 wrong. Counted: (0,0) consensus, (0,1) neutral, (1,0) consensus with a flipped advantage.
    statistics = token_statistics(
        gate=torch.tensor([[1, 0], [1, -1]]),
        advantages=torch.tensor([[1.5, 0.25], [1.0, 9.0]]),
        teacher_advantages=torch.tensor([[1.0, 0.0], [-0.5, 9.0]]),
        stability_weights=torch.tensor([[1.25, 0.75], [1.0, 9.0]]),
        mask=torch.tensor([[1, 1], [1, 0]]),
        right=torch.tensor([True, False]),
        wrong=torch.tensor([False, True]),
    )
    metrics = finalize(*statistics)
    expected = {
        "gate/consensus": 2 / 3, "gate/consensus/right": 1 / 2, "gate/consensus/wrong": 1.0,
        "gate/conflict": 0.0, "gate/conflict/right": 0.0, "gate/conflict/wrong": 0.0,
        "gate/neutral": 1 / 3, "gate/neutral/right": 1 / 2, "gate/neutral/wrong": 0.0,
        "gate/sign_flips": 1 / 2, "gate/sign_flips/right": 0.0, "gate/sign_flips/wrong": 1.0,
        "gate/advantage_consensus": 1.25, "gate/advantage_consensus/right": 1.5, "gate/advantage_consensus/wrong": 1.0,
        "gate/advantage_neutral": 0.25, "gate/advantage_neutral/right": 0.25,
        "teacher/kl_k1": -0.5 / 3, "teacher/kl_k1/right": -0.5, "teacher/kl_k1/wrong": 0.5,
        # e - 2 = .718282, 0, e^-.5 - .5 = .106531
        "teacher/kl_k3": 0.824813 / 3, "teacher/kl_k3/right": 0.718282 / 2, "teacher/kl_k3/wrong": 0.106531,
        "teacher/abs_advantage_mean": 0.5, "teacher/abs_advantage_mean/right": 0.5,
        "teacher/abs_advantage_mean/wrong": 0.5,
        "teacher/abs_advantage_max": 1.0, "teacher/abs_advantage_max/right": 1.0,
        "teacher/abs_advantage_max/wrong": 0.5,
        "teacher/phi_mean": 1.0, "teacher/phi_mean/right": 1.0, "teacher/phi_mean/wrong": 1.0,
    }  # fmt: skip
    assert_metrics(metrics, expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gated", [True, False])
def test_against_loop(seed: int, gated: bool) -> None:
    b = batch(seed=seed)
    if not gated:
        b |= OPTIONAL
    metrics = finalize(*token_statistics(**b))
    assert_metrics(metrics, slow_metrics(b))
    for group in ("gate/", "weights/"):
        assert any(name.startswith(group) for name in metrics) == gated


def test_layout_is_fixed_whatever_the_gate() -> None:
    expected = {f"gate/{n}" for n in ("consensus", "conflict", "neutral", "sign_flips")}
    expected |= {f"gate/advantage_{n}" for n in ("consensus", "conflict", "neutral")}
    expected |= {f"teacher/{n}" for n in TEACHER} | {"weights/prefix_mean", "weights/drift_mean"}
    assert set(METRIC_NAMES) == {name + group for name in expected for group in GROUPS}
    assert len(METRIC_NAMES) == len(set(METRIC_NAMES)) == 39
    extremes = ("teacher/abs_advantage_max", "weights/drift_max", "weights/drift_min")
    assert tuple(name + group for name in extremes for group in GROUPS) == MAXIMUM_NAMES
    for changes in ({}, OPTIONAL):
        statistics = token_statistics(**batch() | changes)
        assert statistics.totals.shape == (78,) and statistics.totals.dtype == torch.float32
        assert statistics.maxima.shape == (9,) and statistics.maxima.dtype == torch.float32


def test_rows_without_a_teacher_are_in_the_drift_only() -> None:
    b = batch()
    b["taught"], b["teacher_advantages"] = torch.zeros(6), torch.full((6, 8), math.nan)
    assert {name.partition("/")[0] + "/" + name.split("/")[1] for name in finalize(*token_statistics(**b))} == {
        "weights/drift_mean", "weights/drift_max", "weights/drift_min"
    }  # fmt: skip


def test_combined_parts_equal_the_whole() -> None:
    b = batch()
    parts = [
        token_statistics(**{name: value[rows] for name, value in b.items()}) for rows in (slice(0, 2), slice(2, 6))
    ]
    whole = token_statistics(**b)
    merged = combine(parts)
    torch.testing.assert_close(merged.totals, whole.totals)
    assert torch.equal(merged.maxima, whole.maxima)
    # Not the mean of the parts' means: they have different numbers of tokens.
    means = [finalize(*part)["teacher/kl_k1"] for part in parts]
    assert abs((means[0] + means[1]) / 2 - finalize(*whole)["teacher/kl_k1"]) > 1e-4


def test_masked_positions_may_hold_anything() -> None:
    b = batch()
    whole = token_statistics(**b)
    for name in ("advantages", "teacher_advantages", "stability_weights", "prefix_weights", "drift_gates"):
        b[name] = torch.where(b["mask"], b[name], math.nan)
    torch.testing.assert_close(token_statistics(**b), whole)


def test_row_order_half_precision_and_gradient() -> None:
    b = batch()
    whole = token_statistics(**b)
    order = torch.tensor([5, 3, 1, 0, 2, 4])
    torch.testing.assert_close(token_statistics(**{name: value[order] for name, value in b.items()}), whole)
    half = {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in b.items()}
    again = {name: value.float() if value.is_floating_point() else value for name, value in half.items()}
    torch.testing.assert_close(token_statistics(**half), token_statistics(**again))
    b["advantages"].requires_grad_()
    b["stability_weights"].requires_grad_()
    assert not token_statistics(**b).totals.requires_grad


def test_counts_survive_autocast() -> None:
    # 1,001 tokens: bfloat16 would round the count to 1,000.
    shape = (1, 1001)
    ones = torch.ones(shape)
    b = {"gate": ones, "advantages": ones, "teacher_advantages": ones, "stability_weights": ones, "mask": ones,
         "right": torch.ones(1), "wrong": torch.zeros(1)}  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        totals = token_statistics(**b).totals
    pair = METRIC_NAMES.index("teacher/phi_mean") * 2
    assert totals[pair : pair + 2].tolist() == [1001.0, 1001.0]


def test_empty_groups_are_dropped() -> None:
    b = batch()
    nobody = torch.zeros_like(b["right"])
    metrics = finalize(*token_statistics(**b | {"right": nobody}))
    assert not any(name.endswith("/right") for name in metrics)
    assert "teacher/abs_advantage_max/wrong" in metrics
    empty = token_statistics(**b | {"mask": torch.zeros_like(b["mask"])})
    assert torch.equal(empty.totals, torch.zeros(78))
    assert empty.maxima.tolist() == [0.0] * 6 + [-1.0] * 3
    assert finalize(*empty) == {}


def test_a_consensus_advantage_of_zero_is_no_flip() -> None:
    b = batch()
    b["gate"], b["advantages"] = torch.ones(6, 8), torch.zeros(6, 8)
    assert finalize(*token_statistics(**b))["gate/sign_flips"].item() == 0.0


def test_maxima_are_optional() -> None:
    statistics = token_statistics(**batch())
    names = set(finalize(statistics.totals))
    assert names == set(finalize(*statistics)) - set(MAXIMUM_NAMES)


def test_k3_does_not_overflow() -> None:
    b = batch()
    b["teacher_advantages"] = torch.full((6, 8), 500.0)
    metrics = finalize(*token_statistics(**b))
    assert metrics["teacher/kl_k3"].item() == pytest.approx(math.exp(20) - 21, rel=1e-6)


def test_k3_keeps_small_ratios() -> None:
    # exp(x) - x - 1 = x^2 / 2 + ...: 5e-9 at 1e-4; exp(x) - 1 without expm1 would lose it in float32.
    b = batch()
    b["teacher_advantages"] = torch.full((6, 8), 1e-3)
    assert finalize(*token_statistics(**b))["teacher/kl_k3"].item() == pytest.approx(5.0017e-7, rel=1e-3)


def test_refusals() -> None:
    b = batch()
    with pytest.raises(ValueError, match=r"`gate` must have the shape of `teacher_advantages`"):
        token_statistics(**b | {"gate": b["gate"][:2]})
    with pytest.raises(ValueError, match=r"`right` must have the shape of `the rows of mask` \(6,\), got \(5,\)"):
        token_statistics(**b | {"right": b["right"][:5]})
    with pytest.raises(ValueError, match=r"`stability_weights` must have the shape of `teacher_advantages`"):
        token_statistics(**b | {"stability_weights": b["stability_weights"][:, :1]})
    with pytest.raises(ValueError, match=r"`drift_gates` must have the shape of `mask`"):
        token_statistics(**b | {"drift_gates": b["drift_gates"][:, :1]})
    with pytest.raises(ValueError, match=r"`taught` must have the shape of `the rows of mask`"):
        token_statistics(**b | {"taught": b["taught"][:5]})
    with pytest.raises(ValueError, match=r"`statistics` must hold at least one entry"):
        combine([])
    with pytest.raises(ValueError, match=r"`totals` must have the shape of .* \(78,\), got \(65,\)"):
        finalize(torch.zeros(65))
    with pytest.raises(ValueError, match=r"`maxima` must have the shape of"):
        finalize(torch.zeros(78), torch.zeros(2))
    assert isinstance(combine([token_statistics(**b)]), TokenStatistics)
