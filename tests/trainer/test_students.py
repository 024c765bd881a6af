"""Students, teachers and references that are refused or treated with care, and what the anchor counts."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import logged, save_pair, tiny_model, tiny_tokenizer, tiny_trainer
from transformers import GPT2Config, GPT2LMHeadModel

from sg_opd_trl import SGOPDConfigError
from sg_opd_trl.core import reverse_kl_advantage

OFF = {"teacher_sampling_enable": False}
ANCHOR = {"teacher_sampling_phase1_end_frac": 1.0, "teacher_sampling_phase2_end_frac": 1.0}


def never_right(completions: list, **_: Any) -> list[float]:
    return [0.0] * len(completions)


def test_learned_absolute_positions_are_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=26, n_positions=64, n_embd=32, n_layer=1, n_head=2, pad_token_id=0, eos_token_id=1)
    with pytest.raises(SGOPDConfigError, match=r"vector per position, got 'transformer\.wpe' in GPT2LMHeadModel"):
        tiny_trainer(tmp_path, model=GPT2LMHeadModel(config))


def test_adapters_loaded_into_a_plain_model_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student = tiny_model(0)
    student.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(SGOPDConfigError, match=r"must be a PeftModel .*PeftModel\.from_pretrained"):
        tiny_trainer(tmp_path, model=student, settings={"lambda_high": 1.0} | OFF)


def test_an_adapter_named_like_a_module(tmp_path: Path) -> None:
    """The copy is made by adapter, not by replacing text in parameter names."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    student = peft.get_peft_model(tiny_model(0), config, adapter_name="model")
    tiny_trainer(tmp_path, model=student, settings=OFF)
    layer = student.base_model.model.model.layers[0].self_attn.q_proj
    for part in (layer.lora_A, layer.lora_B):
        assert torch.equal(part["ref"].weight, part["model"].weight)
        assert not part["ref"].weight.requires_grad
        assert part["model"].weight.requires_grad


@pytest.mark.parametrize("role", ["teacher", "reference"])
@pytest.mark.parametrize(("option", "value"), [("revision", "main"), ("init_kwargs", {"dtype": "float32"})])
def test_loading_options_without_loading_are_refused(tmp_path: Path, role: str, option: str, value: Any) -> None:
    settings = OFF | {f"{role}_model_{option}": value}
    with pytest.raises(SGOPDConfigError, match=f"`{role}_model_{option}` must go with a path"):
        tiny_trainer(tmp_path, settings=settings, **{f"{role}_model": tiny_model(2)})


def test_a_revision_of_the_initial_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SGOPDConfigError, match="`reference_model_revision` must go with a reference of its own"):
        tiny_trainer(tmp_path, settings=OFF | {"reference_model_revision": "main"})


def test_loading_options_of_the_default_reference(tmp_path: Path) -> None:
    student = save_pair(tmp_path / "student", 0)
    settings = OFF | {"reference_model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = tiny_trainer(tmp_path / "run", model=student, settings=settings)
    assert trainer.reference.model.dtype == torch.bfloat16
    assert trainer.model.dtype == torch.float32


def test_dropout_of_the_adapter_stays_out_of_trls_reference(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    student = peft.get_peft_model(tiny_model(0), config)
    trainer = tiny_trainer(tmp_path, model=student, settings=OFF | {"beta": 0.1})
    assert trainer.reuses_trl_reference
    trainer.model.train()
    ids = torch.arange(5, 17).reshape(2, 6)
    twice = [trainer.score_for_trl(trainer.model, ids, torch.ones_like(ids), 3) for _ in range(2)]
    assert torch.equal(*twice)
    assert trainer.model.training
    assert reverse_kl_advantage(*twice).abs().max() == 0


def test_anchor_tokens_are_those_that_enter_the_loss(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=ANCHOR, reward_funcs=never_right)
    trainer.train()
    assert logged(trainer, "anchor/rollouts") == [1.0, 1.0]
    assert logged(trainer, "anchor/tokens") == [0.0, 0.0]


@pytest.mark.parametrize(("save_steps", "warned"), [(1, True), (2, False)])
def test_checkpoints_inside_a_generation_batch_are_warned_about(
    tmp_path: Path, save_steps: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings = OFF | {"steps_per_generation": 2, "save_strategy": "steps", "save_steps": save_steps}
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl"):
        tiny_trainer(tmp_path, settings=settings)
    assert ("inside a generation batch" in caplog.text) is warned


def test_a_reference_given_as_a_model_is_told_what_can_be_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl"):
        tiny_trainer(tmp_path, settings=OFF, reference_model=tiny_model(2), processing_class=tiny_tokenizer())
    assert "Pass the model's path to have it checked" in caplog.text
