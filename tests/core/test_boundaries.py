"""What the core promises about imports, its public names and waiting for the device."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import PATIENCE
from torch import Tensor

from sg_opd_trl import core
from sg_opd_trl.core._checks import checked, positive

ROOT = Path(__file__).resolve().parents[2]


def test_core_imports_torch_and_none_of_the_stack() -> None:
    script = (
        "import json, sys, sg_opd_trl.core\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    loaded = set(json.loads(done.stdout))
    assert {"torch", "sg_opd_trl"} <= loaded
    assert not loaded & {"trl", "transformers", "accelerate", "datasets", "peft", "math_verify"}


def test_public_names_exist_and_are_complete() -> None:
    assert core.__all__ == sorted(core.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    public = {name for name in vars(core) if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(core, name), type(sys))}
    assert public - modules == set(core.__all__)


def test_nothing_reads_a_value_back() -> None:
    """On the meta device there are no values: any `.item()`, `bool(tensor)` or boolean indexing raises."""
    logps = torch.zeros(4, 6, device="meta")
    a1 = torch.zeros(4, device="meta")
    a2 = core.reverse_kl_advantage(logps, logps)
    gate = core.sign_consistency_gate(a1, a2, 0.1)
    routed = [
        core.route_advantages(logps, logps, logps, a1, lambda_high=1.8, disagree_mode=mode, neutral_mode=neutral)
        for mode in core.DISAGREE_MODES
        for neutral in core.NEUTRAL_MODES
    ]
    phi = [core.stability_weight(a2, logps, 5.0, norm=norm) for norm in ("sequence", "batch", "none")]
    drift = core.drift_gate(logps, logps, logps, tau=1.0, block_size=4)
    ids = torch.zeros(4, 6, device="meta", dtype=torch.long)
    spans = core.span_numbers(ids, ids[0])
    by_line = core.drift_gate(logps, logps, logps, tau=1.0, span_ids=spans, mean="absolute", norm="none")
    kept = core.without_special_tokens(ids, logps, [1, 2])
    dealt = core.random_gate(gate, logps, logps)
    fixed = core.fixed_on_rows(logps, a1, -1.0)
    others = [spans, by_line, kept, dealt, fixed]
    prefix = core.prefix_importance_weight(a2, logps, 0.5)
    weights = [core.anchor_token_weights(logps, logps, kind) for kind in core.ANCHOR_WEIGHTS]
    for reduction in core.ANCHOR_REDUCTIONS:
        total = core.anchor_denominator(logps, a1, reduction)
        assert core.anchor_cross_entropy(logps, logps, a1, logps, reduction=reduction, total=total).shape == ()
    assert core.verifier_group_advantages(a1, 2).shape == (4,)
    assert all(tensor.shape == (4, 6) for tensor in [gate, drift, prefix, *others, *routed, *phi, *weights])
    statistics = core.token_statistics(
        gate=gate, advantages=a2, teacher_advantages=a2, stability_weights=a2, mask=logps, right=a1, wrong=a1,
        taught=a1, prefix_weights=a2, drift_gates=a2,
    )  # fmt: skip
    assert statistics.totals.device.type == "meta"


def test_a_forgotten_declaration_fails_at_import() -> None:
    def equation(logps: Tensor, mask: Tensor | None, *weights: Tensor, tau: float | None = None) -> Tensor:
        """An equation."""
        return logps

    with pytest.raises(TypeError, match=r"does not declare the tensor\(s\) mask, weights"):
        checked(logps="float B T")(equation)
    with pytest.raises(TypeError, match="has no parameter lopgs"):
        checked(lopgs="float B T", mask="any B T", weights="any B T")(equation)
    with pytest.raises(
        TypeError, match="`weights` is declared like `mask`, which is not declared before it or may be"
    ):
        checked(logps="float B T", mask="any B T", weights="float B T like mask")(equation)
    whole = checked(
        logps="float B T", mask="any B T", weights="float B T", tau=positive(reason="It is a temperature.")
    )(equation)
    assert inspect.signature(whole) == inspect.signature(equation)
    assert whole.__doc__ == "An equation."


def test_what_a_declaration_checks() -> None:
    @checked(logps="float B T", mask="any B T", rows="int B like mask", either="float B|B T", weights="float B T")
    def equation(
        logps: Tensor, mask: Tensor, *weights: Tensor, rows: Tensor | None = None, either: Tensor | None = None
    ) -> Tensor:
        return logps

    x = torch.zeros(2, 3)
    assert equation(x, x) is equation(x, x.bool(), x, x, rows=torch.zeros(2).long(), either=x[:, 0]) is x
    with pytest.raises(ValueError, match=r"`weights` must have the shape of `logps` \(2, 3\), got \(2, 2\)"):
        equation(x, x, x, x[:, :2])
    with pytest.raises(ValueError, match=r"`rows` must have the shape of `the rows of mask` \(2,\), got \(2, 3\)"):
        equation(x, x, rows=x.long())
    with pytest.raises(TypeError, match="`rows` must have an integer dtype"):
        equation(x, x, rows=x[:, 0])
    with pytest.raises(ValueError, match=r"`either` must have the shape of `logps \(one per row or per token\)`"):
        equation(x, x, either=torch.zeros(3))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'logps'"):
        equation(mask=x)
