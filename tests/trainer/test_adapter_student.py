"""A student given as the folder of an adapter, what a LoRA run saves: it goes on from there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_pair, tiny_tokenizer, tiny_trainer
from transformers import AutoModelForCausalLM

from sg_opd_trl import SGOPDConfigError

peft = pytest.importorskip("peft")
OFF = {"teacher_sampling_enable": False, "max_steps": 1}
LORA = {"target_modules": ["q_proj", "v_proj"], "r": 2, "task_type": "CAUSAL_LM"}


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    """An adapter that has learnt something."""
    base = AutoModelForCausalLM.from_pretrained(save_pair(tmp_path / "base", 0))
    torch.manual_seed(5)
    model = peft.get_peft_model(base, peft.LoraConfig(**LORA, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return type(model.get_base_model()).forward(model.get_base_model(), torch.tensor([[3, 9, 12, 4]])).logits


def test_it_is_trained_from_where_it_stopped(tmp_path: Path, adapter: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wanted = peft.PeftModel.from_pretrained(base, adapter)
    trainer = tiny_trainer(tmp_path / "run", model=adapter, processing_class=tiny_tokenizer(), settings=OFF)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert before
    assert all(".default." in name for name in before)
    torch.testing.assert_close(logits(trainer.model), logits(wanted), rtol=0, atol=0)
    trainer.train()
    moved = [name for name, p in trainer.model.named_parameters() if p.requires_grad and (p != before[name]).any()]
    assert moved
    trainer.save_model(str(tmp_path / "saved"))
    again = tiny_trainer(tmp_path / "run", model=str(tmp_path / "saved"), processing_class=None, settings=OFF)
    torch.testing.assert_close(logits(again.model), logits(trainer.model), rtol=0, atol=0)
    assert again.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_the_reference_is_the_adapter_as_it_was_loaded(tmp_path: Path, adapter: str) -> None:
    trainer = tiny_trainer(tmp_path / "run", model=adapter, settings=OFF | {"learning_rate": 0.1, "lambda_high": 1.5})
    found = []
    own = trainer.reference.score

    def score(batch: Any, rows: torch.Tensor, max_tokens: int) -> torch.Tensor:
        found.append(own(batch, torch.ones_like(rows), max_tokens).clone())
        expected = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)
        for row, (prompt, mask) in enumerate(zip(batch.prompt_ids, batch.prompt_mask, strict=True)):
            kept = batch.completion_ids[row][batch.completion_mask[row] != 0]
            ids = torch.cat([prompt[mask != 0], kept])
            logps = expected(ids.unsqueeze(0)).logits.log_softmax(-1)[0, -len(kept) - 1 : -1]
            wanted = logps.gather(1, kept.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(found[-1][row, : len(kept)], wanted.detach(), rtol=1e-4, atol=1e-4)
        return found[-1]

    trainer.reference.score = score
    trainer.args.max_steps = 2
    trainer.train()
    assert len(found) == 2


def test_the_tokenizer_of_the_base_serves_an_adapter_without_one(tmp_path: Path, adapter: str) -> None:
    trainer = tiny_trainer(tmp_path / "run", model=adapter, processing_class=None, settings=OFF)
    assert trainer.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_a_second_adapter_is_refused(tmp_path: Path, adapter: str) -> None:
    with pytest.raises(
        SGOPDConfigError, match=r"`peft_config` must be left out where `model` is an adapter.*use_peft"
    ):
        tiny_trainer(tmp_path / "run", model=adapter, peft_config=peft.LoraConfig(**LORA), settings=OFF)


def test_an_adapter_without_a_base_is_refused(tmp_path: Path, adapter: str) -> None:
    config = peft.PeftConfig.from_pretrained(adapter)
    config.base_model_name_or_path = None
    config.save_pretrained(adapter)
    with pytest.raises(SGOPDConfigError, match="`model` must name its base where it is an adapter, got none"):
        tiny_trainer(tmp_path / "run", model=adapter, settings=OFF)
