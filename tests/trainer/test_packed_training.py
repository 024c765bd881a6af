"""Whole steps without padding: the update, the metrics and the tokens that each model sees."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    ScriptedVerifier,
    StepRecorder,
    inject_rollouts,
    relative_difference,
    save_pair,
    script_generation,
    tiny_data,
    tiny_model,
    tiny_trainer,
)
from transformers import Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from varlen_attention import count_tokens, use_kernel

from sg_opd_trl import SGOPDTrainer, trl_seam
from sg_opd_trl.models import forward

VERDICTS = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0]
NO_ANCHOR = {"teacher_sampling_enable": False}
ANCHOR = {
    "teacher_sampling_enable": True,
    "teacher_sampling_ratio": 0.6,  # 3 teacher prompts for 2 student prompts
    "teacher_sampling_filter_correct": False,
    "teacher_sampling_phase1_end_frac": 1.0,
    "teacher_sampling_phase2_end_frac": 1.0,
    "teacher_sft_alpha_start": 0.7,
    "teacher_max_completion_length": 9,
}
HALVES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
COMPARED = ("loss", "entropy", "grad_norm", "kl", "clip_ratio", "gate/", "teacher/", "anchor/")


class Watched(SGOPDTrainer):
    """Keeps the masks of the micro-batches as the loss gets them."""

    def compute_loss(self, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> torch.Tensor:
        masks = inputs["prompt_mask"], inputs["completion_mask"]
        self.__dict__.setdefault("masks", []).append(tuple(mask.clone() for mask in masks))
        return super().compute_loss(model, inputs, *args, **kwargs)


def build(folder: Path, settings: dict, **arguments: Any) -> tuple[Any, StepRecorder]:
    recorder = StepRecorder()
    models = {"model": tiny_model(0), "teacher_model": tiny_model(1), "reference_model": tiny_model(2)}
    models |= {name: arguments.pop(name) for name in models if name in arguments}
    models |= {name: script_generation(models[name], 9) for name in ("teacher_model",)}
    script_generation(models["model"])
    base = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.3, "weight_decay": 0.0, "stability_tau": 0.3}
    base["preflight"] = False  # the forwards that are counted are those of training
    defaults = {"trainer_class": Watched, "reward_funcs": ScriptedVerifier(VERDICTS)}
    trainer = tiny_trainer(folder, settings=base | settings, callbacks=[recorder], **models, **(defaults | arguments))
    return trainer, recorder


def pack_everywhere(monkeypatch: pytest.MonkeyPatch, packed: bool = True, *, shared: bool = True) -> None:
    """Whatever padding there is, and under gradient checkpointing, prompts shared where they can be; or nowhere."""
    monkeypatch.setattr(trl_seam, "should_pack", lambda model, mask: packed)
    as_it_is = forward.prefixes_to_share
    monkeypatch.setattr(trl_seam, "prefixes_to_share", as_it_is if packed and shared else lambda *_: None)


def metrics(trainer: Any) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k.startswith(COMPARED)} for entry in trainer.state.log_history]


def assert_same_run(ours: tuple[Any, StepRecorder], theirs: tuple[Any, StepRecorder], limit: float = 1e-5) -> None:
    assert len(ours[1].steps) == len(theirs[1].steps) == ours[0].args.max_steps
    for packed, padded in zip(ours[1].steps, theirs[1].steps, strict=True):
        assert sum(float(value.square().sum()) for value in padded.values()) > 1e-4
        assert relative_difference(packed, padded) < limit
    for packed, padded in zip(metrics(ours[0]), metrics(theirs[0]), strict=True):
        assert packed == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in padded.items()}


SETTINGS: dict[str, dict] = {
    "one_batch": {},
    "accumulation": HALVES,
    "row_by_row": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "inner_updates": HALVES | {"num_iterations": 2, "max_steps": 4},
    "long_generation": HALVES | {"steps_per_generation": 4},
    "padded_to_a_multiple": HALVES | {"pad_to_multiple_of": 16},
    "cut_off_and_masked": HALVES | {"mask_truncated_completions": True},
    "cut_off_row_by_row": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "mask_truncated_completions": True,
    },
    "checkpointing": HALVES | {"gradient_checkpointing": True},
    "tokens_of_the_batch": HALVES | {"loss_type": "dapo", "stability_norm": "batch"},
    "entropy": {"entropy_coef": 0.1},
    "temperature": {"temperature": 0.7},
    "kl": {"beta": 0.3},
    "scored_row_by_row": {"max_tokens_per_scoring_batch": 1},
}


@pytest.mark.parametrize("anchor", [NO_ANCHOR, ANCHOR], ids=["", "anchor"])
@pytest.mark.parametrize("name", SETTINGS)
def test_packed_training_is_padded_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, anchor: dict
) -> None:
    def run() -> tuple[Any, StepRecorder, Any]:
        # A student from a folder: TRL's own reference is loaded from there.
        student = Qwen3ForCausalLM.from_pretrained(save_pair(tmp_path / "student", 0))
        trainer, recorder = build(tmp_path, anchor | SETTINGS[name], model=student)
        seen = count_tokens(trainer.model)
        trainer.train()
        return trainer, recorder, seen

    pack_everywhere(monkeypatch, packed=False)
    *padded, seen = run()
    assert seen.packed == []
    pack_everywhere(monkeypatch)
    *packed, seen = run()
    assert len(seen.packed) == len(seen.shapes) > 0
    assert all(rows == 1 for rows, _ in seen.shapes)
    assert_same_run(packed, padded)


def test_a_step_of_cut_off_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are left, and a gradient of zero for every weight."""
    pack_everywhere(monkeypatch, shared=False)
    trainer, recorder = build(tmp_path, NO_ANCHOR | HALVES | {"mask_truncated_completions": True, "max_steps": 1})
    inject_rollouts(trainer, lambda prompt, row: [5 + row] * 6)
    seen = count_tokens(trainer.model)
    trainer.train()
    assert not any(completion.any() for _, completion in trainer.masks)
    assert seen.packed == [int(prompt.sum()) for prompt, _ in trainer.masks]
    (gradient,) = recorder.steps
    assert gradient.keys() == dict(trainer.model.named_parameters()).keys()
    assert not any(value.any() for value in gradient.values())


@pytest.mark.parametrize("anchor", [NO_ANCHOR, ANCHOR], ids=["", "anchor"])
def test_models_see_tokens_and_no_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anchor: dict) -> None:
    pack_everywhere(monkeypatch, shared=False)
    trainer, _ = build(tmp_path, anchor | HALVES | {"num_iterations": 2, "max_steps": 2})
    student, teacher, reference = (
        count_tokens(m) for m in (trainer.model, trainer.teacher.model, trainer.reference.model)
    )
    taught: list[int] = []
    generate = trainer.teacher.generate

    def watched(prompts: list, *args: Any) -> list:
        completions = generate(prompts, *args)
        taught.extend(len(p + c) for p, c in zip(prompts, completions, strict=True))
        return completions

    trainer.teacher.generate = watched
    trainer.train()
    rollouts = [int(p.sum() + c.sum()) for p, c in trainer.masks]
    assert len(rollouts) == 2 * 2
    assert rollouts[:2] == rollouts[2:], "the second step repeats the rollouts of the first"
    once = sum(rollouts[:2])
    # The old policy scores each rollout once; each of the 2 x 2 micro-batches runs the policy once.
    scoring = len(student.packed) - 4
    assert sum(student.packed[:scoring]) == once
    assert sum(student.packed[scoring:]) == 2 * once + sum(taught)
    assert (len(taught) > 0) is (anchor is ANCHOR)
    assert sum(teacher.packed) == once
    assert 0 < sum(reference.packed) <= once
    for seen in (student, teacher, reference):
        assert seen.shapes == [(1, tokens) for tokens in seen.packed]
    padded = sum(p.numel() + c.numel() for p, c in trainer.masks[:2])
    assert padded > 1.1 * once, "there was hardly any padding to leave out"


def test_a_lora_student_and_its_own_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")

    def run() -> tuple[Any, StepRecorder]:
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")
        torch.manual_seed(3)
        run = build(tmp_path, ANCHOR | HALVES, reference_model=None, peft_config=lora)
        run[0].train()
        return run

    pack_everywhere(monkeypatch, packed=False)
    padded = run()
    pack_everywhere(monkeypatch)
    assert_same_run(run(), padded)


# --- the decision ----------------------------------------------------------------------------------------------------
def test_the_kernel_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student, teacher and reference attend through transformers' flash attention path: nothing is forced then."""
    with pytest.MonkeyPatch.context() as patch:
        pack_everywhere(patch, packed=False)
        # Micro-batches of the same rows: TRL's entropy is a mean over those.
        patch.setattr("sg_opd_trl.trainer.can_share", lambda *_: False)
        padded = build(tmp_path, ANCHOR | HALVES)
        padded[0].train()
    packed = build(tmp_path, ANCHOR | HALVES)
    models = [packed[0].model, packed[0].teacher.model, packed[0].reference.model]
    seen = [count_tokens(model) for model in models]
    kernel = use_kernel(monkeypatch, *models)
    packed[0].train()
    assert all(model.packed and len(model.packed) == len(model.shapes) for model in seen)
    layers = 2
    assert len(kernel.rows) == layers * sum(len(model.packed) for model in seen)
    assert max(len(rows) for rows in kernel.rows) > 4, "anchor rows ride along"
    assert_same_run(packed, padded)


def test_each_model_is_decided_by_its_own_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student_model = tiny_model(0)
    student_model.set_attn_implementation("eager")
    trainer, _ = build(tmp_path, NO_ANCHOR | {"max_steps": 1}, model=student_model)
    student, teacher = count_tokens(trainer.model), count_tokens(trainer.teacher.model)
    use_kernel(monkeypatch, trainer.teacher.model)
    trainer.train()
    assert student.packed == []
    assert len(teacher.packed) == len(teacher.shapes) > 0


def test_the_auxiliary_loss_of_experts_is_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_everywhere(monkeypatch)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=26, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, output_router_logits=True,
    )  # fmt: skip
    trainer, _ = build(tmp_path, NO_ANCHOR | {"max_steps": 1}, model=Qwen3MoeForCausalLM(config).float())
    assert trainer.aux_loss_enabled
    student, teacher = count_tokens(trainer.model), count_tokens(trainer.teacher.model)
    trainer.train()
    assert student.packed == []
    assert len(student.shapes) == 1
    assert len(teacher.packed) == len(teacher.shapes) > 0


@pytest.mark.parametrize("with_teacher", [False, True])
def test_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_teacher: bool) -> None:
    def run() -> tuple[Any, list[dict[str, float]]]:
        settings = NO_ANCHOR | {"eval_with_teacher": with_teacher, "per_device_eval_batch_size": 4}
        trainer, _ = build(tmp_path, settings, eval_dataset=tiny_data(3), reward_funcs=ScriptedVerifier([1.0] * 4))
        seen = count_tokens(trainer.model)
        trainer.evaluate()
        names = ("eval_loss", "eval_entropy", "eval_teacher/", "eval_gate/")
        kept = [{k: v for k, v in entry.items() if k.startswith(names)} for entry in trainer.state.log_history]
        return seen, kept

    pack_everywhere(monkeypatch, packed=False)
    seen, expected = run()
    assert seen.packed == []
    assert len(expected[-1]) >= 2
    pack_everywhere(monkeypatch)
    seen, values = run()
    assert len(seen.packed) == len(seen.shapes) > 0
    for ours, theirs in zip(values, expected, strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in theirs.items()}
