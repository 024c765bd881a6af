"""A student in four bits (QLoRA): what it trains, its base as reference and as teacher, and what is saved and loaded.

bitsandbytes computes on a CPU too.
"""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import ANCHOR, changed_weights, copied_weights, inject_rollouts, logged, save_pair, tiny_trainer
from torch import nn
from transformers import BitsAndBytesConfig

from sg_opd_trl import AdapterTeacher, SGOPDConfigError
from sg_opd_trl.teachers import BaseTeacher
from trainer.test_peft import BATCH, ROWS, causal_models, log_probs

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install sg-opd-trl[quantization]",
)
ANCHORED = ANCHOR | {"teacher_sampling_enable": True, "teacher_sampling_ratio": 0.5, "learning_rate": 1e-2}
FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT_BITS = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def quantization(**settings: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} | settings))


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    # The blocks of 64 weights that share a scale divide these layers.
    return {
        "model": save_pair(folder / "student", 0, hidden_size=64),
        "teacher_model": save_pair(folder / "teacher", 1),
    }


def student(pair: dict, folder: Path, settings: dict | None = None, **arguments: Any) -> Any:
    given = pair | {"peft_config": lora(), "quantization_config": quantization()} | arguments
    return tiny_trainer(folder, settings=ANCHORED | (settings or {}), **given)


def trained(trainer: Any) -> dict[str, nn.Parameter]:
    return {name: each for name, each in trainer.model.named_parameters() if each.requires_grad}


# --- what is trained -------------------------------------------------------------------------------------------------
@needs_bitsandbytes
def test_adapters_are_in_float32_and_move_at_a_small_learning_rate(tmp_path: Path, pair: dict) -> None:
    """In bfloat16, where TRL puts them, 97% of LoRA's A did not move in 20 steps at 1e-5."""
    trainer = student(pair, tmp_path, {"learning_rate": 1e-5, "max_steps": 3})
    before = copied_weights(trainer.model)
    assert {each.dtype for each in trained(trainer).values()} == {torch.float32}
    trainer.train()
    moved = set(changed_weights(trainer.model, before))
    assert moved == set(trained(trainer)), "something of the base moved, or an adapter did not"
    for name, each in trained(trainer).items():
        if "lora_A" in name:
            assert float((each != before[name]).float().mean()) > 0.9, name


@needs_bitsandbytes
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, pair: dict) -> None:
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    straight = student(pair, tmp_path / "straight", settings)
    straight.train()
    resumed = student(pair, tmp_path / "resumed", settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-1"))
    assert changed_weights(resumed.model, copied_weights(straight.model)) == []


@needs_bitsandbytes
def test_the_saved_adapter_goes_on_as_it_is(tmp_path: Path, pair: dict, caplog: pytest.LogCaptureFixture) -> None:
    first = student(pair, tmp_path / "first")
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved
    assert {values.dtype for values in saved.values()} == {torch.float32}
    with caplog.at_level(logging.WARNING):
        again = student(pair | {"model": str(tmp_path / "adapter")}, tmp_path / "again", peft_config=None)
    assert "`quantization_config` will be ignored" not in caplog.text
    weights = {name.replace(".default", ""): each for name, each in trained(again).items()}
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    # The reference is the adapter as it was, not as bfloat16 has it.
    logps = again.reference.score(BATCH, ROWS, 10_000)
    torch.testing.assert_close(logps.double(), log_probs(again.model), rtol=0, atol=5e-6)


# --- the base as reference and as teacher ----------------------------------------------------------------------------
@needs_bitsandbytes
def test_the_base_is_reference_and_teacher_without_a_copy(
    tmp_path: Path, pair: dict, caplog: pytest.LogCaptureFixture
) -> None:
    before_any = causal_models()
    with caplog.at_level(logging.WARNING):
        trainer = student(pair | {"teacher_model": pair["model"]}, tmp_path)
    assert causal_models() == before_any + 1
    assert isinstance(trainer.teacher, BaseTeacher)
    assert (
        "is the base of the student: it shares the student's weights, as they are loaded there, in fewer"
        in caplog.text
    )
    with torch.no_grad():
        for name, each in trained(trainer).items():
            each.normal_(std=0.5) if "lora_B" in name else None
    with trainer.model.disable_adapter():
        base = log_probs(trainer.model)
    assert not torch.allclose(base, log_probs(trainer.model), atol=1e-2)
    for model in (trainer.teacher, trainer.reference):
        torch.testing.assert_close(model.score(BATCH, ROWS, 10_000).double(), base, rtol=0, atol=5e-6)
    identity = trainer.teacher.identity
    trainer.train()
    trainer.teacher.bind(trainer)
    assert trainer.teacher.identity == identity, "training changed what tells the teacher"
    assert logged(trainer, "teacher/generated_tokens")[-1] > 0


def test_a_whole_base_is_shared_too_and_equals_the_same_model_loaded_again(tmp_path: Path, pair: dict) -> None:
    arguments = pair | {"teacher_model": pair["model"], "peft_config": lora()}

    def train(folder: str, settings: dict) -> Any:
        torch.manual_seed(0)  # adapters begin at random
        trainer = tiny_trainer(tmp_path / folder, settings=ANCHORED | settings, **arguments)
        inject_rollouts(trainer, lambda prompt, row: [6 + (sum(prompt) + row * k) % 19 for k in range(row % 4 + 1)])
        trainer.train()
        return trainer

    shared = train("shared", {})
    loaded = train("loaded", {"teacher_model_init_kwargs": {"dtype": "float32"}})
    assert isinstance(shared.teacher, BaseTeacher)
    assert not isinstance(loaded.teacher, AdapterTeacher)
    assert changed_weights(shared.model, copied_weights(loaded.model)) == []


def test_a_student_that_is_trained_in_full_lends_no_base(tmp_path: Path, pair: dict) -> None:
    with pytest.raises(
        SGOPDConfigError, match="BaseTeacher must be the frozen base of the student, got a student whose"
    ):
        tiny_trainer(tmp_path, **(pair | {"teacher_model": BaseTeacher()}))
    assert not isinstance(tiny_trainer(tmp_path, **(pair | {"teacher_model": pair["model"]})).teacher, BaseTeacher)


# --- a teacher in fewer bits -----------------------------------------------------------------------------------------
@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "kind"), [(FOUR_BITS, "Linear4bit"), (EIGHT_BITS, "Linear8bitLt")])
def test_a_teacher_in_fewer_bits_scores_as_it_does_plainly(tmp_path: Path, pair: dict, bits: dict, kind: str) -> None:
    settings = ANCHORED | {"teacher_model_init_kwargs": {"quantization_config": bits}}
    trainer = tiny_trainer(tmp_path, settings=settings, **pair)
    model = trainer.teacher.model
    assert {type(layer.mlp.up_proj).__name__ for layer in model.model.layers} == {kind}
    scores = trainer.teacher.score(BATCH, ROWS, 10_000)
    # Eight bits round by the largest number of a batch, so that rows beside it matter a little.
    torch.testing.assert_close(scores.double(), log_probs(model), rtol=0, atol=5e-6 if bits is FOUR_BITS else 1e-2)
    trainer.train()
    assert logged(trainer, "teacher/generated_tokens")[-1] > 0


@pytest.mark.parametrize("role", ["teacher", "reference"])
@pytest.mark.parametrize("name", ["load_in_4bit", "load_in_8bit"])
def test_the_old_words_for_it_are_refused(tmp_path: Path, pair: dict, role: str, name: str) -> None:
    settings = {f"{role}_model_init_kwargs": {name: True}}
    with pytest.raises(SGOPDConfigError, match=rf"`{role}_model_init_kwargs` must not hold {name}.*quant_method"):
        tiny_trainer(tmp_path, settings=settings, **pair)
