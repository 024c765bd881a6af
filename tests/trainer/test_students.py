"""Students with adapters whose first state is the reference, and what the anchor counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import logged, tiny_model, tiny_trainer

from sg_opd_trl.core import reverse_kl_advantage

OFF = {"teacher_sampling_enable": False}


ANCHOR = {"teacher_sampling_phase1_end_frac": 1.0, "teacher_sampling_phase2_end_frac": 1.0}


def never_right(completions: list, **_: Any) -> list[float]:
    return [0.0] * len(completions)


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
