"""The gradient of an optimizer step in every `distillation_mode`, against a float64 oracle and TRL's own loss."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Step, Weights, mode_oracle
from peft import LoraConfig
from tiny import StepRecorder, logged, relative_difference, script_generation, tiny_model, tiny_trainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from sg_opd_trl.core import modes_without_distribution, modes_without_forward_kl
from sg_opd_trl.models import head as heads
from trainer.test_gradient_oracle import ANCHOR, LIMIT, MODES, TEACHER, train

KINDS = ("topk_logits", "full_logits", "asymmetric")
MATCHING = ("topk_logits", "full_logits")
SIZE = {"distillation_topk": 4}


def compare(args: Any, gradient: Weights, step: Step) -> Counter:
    expected, counts = mode_oracle(args, step)
    difference = relative_difference(gradient, expected)
    assert difference < LIMIT, f"relative difference {difference:.2e}"
    return counts


def check(folder: Path, kind: str, settings: dict, **arguments: Any) -> Counter:
    anchored = "teacher_sampling_ratio" in settings
    settings = {"distillation_mode": kind} | SIZE | settings
    args, (gradient,), (step,) = train(folder, settings, **arguments)
    return compare(args, gradient, step._replace(alpha=0.7 if anchored else 0.0))


@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
@pytest.mark.parametrize("route", [name for name in MODES if name not in modes_without_distribution()])
@pytest.mark.parametrize("kind", MATCHING)
def test_every_route(tmp_path: Path, kind: str, route: str, anchored: bool) -> None:
    settings = MODES[route] | {"neutral_mode": "conflict" if anchored else "base"} | (ANCHOR if anchored else {})
    counts = check(tmp_path, kind, settings)
    assert min(counts[name] for name in ("consensus", "conflict", "neutral")) >= 5
    assert sum(name.startswith("lambda") for name in counts) >= 2


@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
@pytest.mark.parametrize("route", [name for name in MODES if name not in modes_without_forward_kl()])
def test_asymmetric_keeps_the_routes_of_the_policy_gradient(tmp_path: Path, route: str, anchored: bool) -> None:
    counts = check(tmp_path, "asymmetric", MODES[route] | (ANCHOR if anchored else {}))
    assert min(counts["policy gradient"], counts["forward KL"]) >= 10


SETTINGS: dict[str, dict] = {
    "gate_off": {"sign_gated_extrapolation": False},
    "gate_off_extrapolated": {"sign_gated_extrapolation": False, "lambda_base": 1.25},
    # Renormalised over one token there is nothing to match: the anchor alone is left of `topk_logits`.
    "one_token_of_support": ANCHOR | {"distillation_topk": 1},
    "whole_vocabulary_as_support": {"distillation_topk": 26},
    "temperature": {"temperature": 0.7},
    "prefix_weights": {"iw_opd_gamma": 0.5},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "accumulated": {"loss_type": "dapo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
    "accumulated_rows": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
    "checkpointing": ANCHOR | {"gradient_checkpointing": True},
    "budget_of_one_row": {"max_tokens_per_scoring_batch": 1},
    "padded_to_a_multiple": ANCHOR | {"pad_to_multiple_of": 8},
    "no_clipping": {"delta": None, "epsilon": 0.0},
    "head_in_float32": {"cast_lm_head_to_fp32": True},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_settings(tmp_path: Path, kind: str, name: str) -> None:
    settings = SETTINGS[name]
    reference = None if name == "gate_off" else tiny_model(2)
    counts = check(tmp_path, kind, settings, reference_model=reference)
    assert counts.total() >= 60


@pytest.mark.parametrize("threshold", [-0.02, 0.0, 0.02])
def test_the_threshold_and_the_scale(tmp_path: Path, threshold: float) -> None:
    settings = {"asymmetric_threshold": threshold, "asymmetric_forward_kl_scale": 2.5}
    counts = check(tmp_path, "asymmetric", settings)
    assert min(counts["policy gradient"], counts["forward KL"]) >= 5


def test_the_ends_of_the_threshold(tmp_path: Path) -> None:
    assert check(tmp_path, "asymmetric", {"asymmetric_threshold": 1.0})["policy gradient"] == 0
    assert check(tmp_path, "asymmetric", {"asymmetric_threshold": -1.0})["forward KL"] == 0


@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_inner_update(tmp_path: Path, kind: str, anchored: bool) -> None:
    """The gate stays that of the rollouts, the distributions are those of the moment, without a ratio."""
    settings = {"num_iterations": 2, "learning_rate": 0.05, "distillation_mode": kind} | SIZE
    settings |= ANCHOR if anchored else {}
    args, gradients, (first, second) = train(tmp_path, settings, steps=2)
    alpha = 0.7 if anchored else 0.0
    second = second._replace(behaviour=first.student)
    for gradient, step in zip(gradients, (first, second), strict=True):
        compare(args, gradient, step._replace(alpha=alpha))
    stale, _ = mode_oracle(args, second._replace(behaviour=second.student, alpha=alpha))
    assert relative_difference(stale, gradients[1]) > 0.01, "the first update changed nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_small_tiles_change_nothing(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "TILE_ELEMENTS", 5 * 26)
    check(tmp_path, kind, ANCHOR)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_and_packed_rows(tmp_path: Path, kind: str) -> None:
    """Eager attention keeps the rows of a batch padded, SDPA on the CPU packs them."""

    def gradient(attention: str) -> Weights:
        student = script_generation(tiny_model(0))
        student.set_attn_implementation(attention)
        return train(tmp_path, ANCHOR | SIZE | {"distillation_mode": kind}, model=student)[1][0]

    assert relative_difference(gradient("eager"), gradient("sdpa")) < LIMIT


def test_full_logits_at_lambda_one_is_trls_reverse_kl(tmp_path: Path) -> None:
    """The loss of `trl.DistillationTrainer` at beta = 1, on the same rollouts."""
    settings = {
        "distillation_mode": "full_logits", "sign_gated_extrapolation": False, "stability_tau": None,
        "loss_type": "dapo", "temperature": 0.8,
    }  # fmt: skip
    _, (gradient,), (step,) = train(tmp_path, settings, reference_model=None)
    student, teacher = tiny_model(0), tiny_model(TEACHER)
    student.load_state_dict(step.student)
    rows = [row.prompt + row.completion for row in step.rollouts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.zeros(len(rows), width - 1, dtype=torch.long)
    for place, row in zip(mask, step.rollouts, strict=True):
        first = len(row.prompt) - 1  # the position that predicts the completion's first token
        place[first : first + len(row.completion)] = 1
    states = [model.model(ids).last_hidden_state[:, :-1] for model in (student, teacher)]
    heads_ = [model.lm_head.weight for model in (student, teacher)]
    loss, _, tokens = _chunked_divergence_loss(*states, *heads_, mask, beta=1.0, temperature=0.8)
    loss.backward()
    assert int(tokens) == sum(len(row.completion) for row in step.rollouts)
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert relative_difference(gradient, expected) < LIMIT


# --- students of other kinds -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_lora_has_the_gradient_of_its_merged_weights(tmp_path: Path, kind: str) -> None:
    """All weights trained through the chain rule: dL/dA = scaling * B^T dL/dW, for an adapter on every layer."""
    from peft import get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    student = get_peft_model(tiny_model(0), config)
    merged = script_generation(copy.deepcopy(student).merge_and_unload().requires_grad_())
    script_generation(student)
    settings = {"distillation_mode": kind} | SIZE
    full = train(tmp_path, settings, model=merged)[1][0]
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    low = train(tmp_path, settings, model=student)[1][0]
    assert low
    for name, gradient in low.items():
        layer = name.split(".lora_")[0]
        a, b = (before[f"{layer}.lora_{side}.default.weight"] for side in "AB")
        dense = full[layer.removeprefix("base_model.model.") + ".weight"]
        scaling = config.lora_alpha / config.r
        expected = scaling * (b.t() @ dense if "lora_A" in name else dense @ a.t())
        assert relative_difference({name: gradient}, {name: expected}) < LIMIT


@pytest.mark.parametrize("kind", KINDS)
def test_tied_embeddings(tmp_path: Path, kind: str) -> None:
    """The head's gradient and the embedding's go to one parameter."""
    recorder = StepRecorder()
    student = tiny_model(0)
    student.lm_head.weight = student.model.embed_tokens.weight
    settings = {"distillation_mode": kind, "teacher_sampling_enable": False, "learning_rate": 1e-3} | SIZE
    trainer = tiny_trainer(tmp_path, settings=settings, model=script_generation(student), callbacks=[recorder])
    trainer.train()
    assert torch.isfinite(recorder.steps[0]["model.embed_tokens.weight"]).all()
    assert logged(trainer, "teacher/matching_loss")[0] != 0
