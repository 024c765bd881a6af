"""An adapter's student without its adapters is the reference only where that is the initial student, for good."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_pair, tiny_model, tiny_tokenizer, tiny_trainer
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sg_opd_trl import SGOPDConfigError
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.teachers import AdapterTeacher

peft = pytest.importorskip("peft")
SETTINGS = {"teacher_sampling_enable": False, "lambda_high": 1.5, "learning_rate": 0.05}
LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4, "task_type": "CAUSAL_LM"}
BATCH = TokenBatch.from_lists([[5, 6], [7, 8, 9]], [[4, 5, 6], [10, 11]], 0, torch.device("cpu"))
EVERY_ROW = torch.ones(2, dtype=torch.bool)


def student() -> Any:
    """Qwen2 has biases to train."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=26, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def of_reference(trainer: Any) -> torch.Tensor:
    return trainer.reference.score(BATCH, EVERY_ROW, 999).clone()


def of_student(trainer: Any) -> torch.Tensor:
    was_training = trainer.model.training
    trainer.model.eval()
    with torch.no_grad():
        logps = trainer.run_policy(trainer.model, *BATCH.joined(), 3).logps * BATCH.completion_mask
    trainer.model.train(was_training)
    return logps


def assert_close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "pissa": lambda: peft.LoraConfig(**LORA, init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(**LORA, init_lora_weights="olora"),
    "random": lambda: peft.LoraConfig(**LORA, init_lora_weights=False),
    "saved modules": lambda: peft.LoraConfig(**LORA, modules_to_save=["embed_tokens", "norm"]),
    "tokens": lambda: peft.LoraConfig(**LORA, trainable_token_indices=[4, 5, 6]),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_is_the_initial_student_and_stays_it(tmp_path: Path, name: str) -> None:
    torch.manual_seed(3)
    trainer = tiny_trainer(tmp_path, model=student(), settings=SETTINGS, peft_config=CONFIGS[name]())
    initial = of_student(trainer)
    assert_close(of_reference(trainer), initial)
    trainer.train()
    assert_close(of_reference(trainer), initial)
    assert float((of_student(trainer) - initial).abs().max()) > 1e-3
    # A copy is kept where it is needed, and stays out of what is saved.
    copied = name in ("pissa", "olora", "random", "prompt")
    assert trainer.reference.adapter_name == ("ref" if copied else None)
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "ref").exists()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("settings", [{}, {"lambda_high": 1.0, "beta": 0.1}])
def test_biases_that_are_trained_are_refused_by_name(tmp_path: Path, bias: str, settings: dict) -> None:
    config = peft.LoraConfig(**LORA, bias=bias)
    with pytest.raises(SGOPDConfigError, match=r"got '.*q_proj\.base_layer\.bias'.*bias='none'.*`reference_model`"):
        tiny_trainer(tmp_path, model=student(), settings=SETTINGS | settings, peft_config=config)


def test_without_a_reference_they_are_trained(tmp_path: Path) -> None:
    settings = SETTINGS | {"lambda_high": 1.0}
    tiny_trainer(tmp_path, model=student(), settings=settings, peft_config=peft.LoraConfig(**LORA, bias="all")).train()


def test_the_way_out_is_a_reference_of_its_own(tmp_path: Path) -> None:
    folder = str(tmp_path / "student")
    student().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = peft.LoraConfig(**LORA, bias="all")
    trainer = tiny_trainer(
        tmp_path / "run", model=student(), settings=SETTINGS, peft_config=config, reference_model=folder
    )
    initial = of_reference(trainer)
    assert_close(initial, of_student(trainer))
    trainer.train()
    assert torch.equal(of_reference(trainer), initial)


def test_a_layer_that_the_caller_has_thawed_is_refused_by_name(tmp_path: Path) -> None:
    model = peft.get_peft_model(student(), peft.LoraConfig(**LORA))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(SGOPDConfigError, match=r"got 'base_model\.model\.model\.norm\.weight'"):
        tiny_trainer(tmp_path, model=model, settings=SETTINGS)


def test_a_copy_of_an_adapter_leaves_the_base_alone(tmp_path: Path) -> None:
    """PEFT would begin a second adapter of this kind by taking another part out of the base's weights."""
    model = peft.get_peft_model(student(), peft.LoraConfig(**LORA, init_lora_weights="pissa"))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if "base_layer" in name}
    trainer = tiny_trainer(tmp_path, model=model, settings=SETTINGS)
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert_close(of_reference(trainer), of_student(trainer))


# --- a teacher on the student's base ---------------------------------------------------------------------------------
def adapter_of(folder: Path, **config: Any) -> tuple[str, str]:
    """A trained adapter and its base."""
    base = save_pair(folder / "base", 0)
    torch.manual_seed(5)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**LORA, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    return base, str(folder / "adapter")


@pytest.mark.parametrize(("of_teacher", "of_student"), [({}, {"init_lora_weights": "pissa"}), ({"bias": "all"}, {})])
def test_a_base_that_is_changed_is_not_shared(tmp_path: Path, of_teacher: dict, of_student: dict) -> None:
    base, adapter = adapter_of(tmp_path, **of_teacher)
    arguments = {
        "model": base,
        "settings": {"teacher_sampling_enable": False},
        "peft_config": peft.LoraConfig(**LORA, **of_student),
        "teacher_processing_class": None,
        "processing_class": None,
    }
    trainer = tiny_trainer(tmp_path / "run", teacher_model=adapter, **arguments)
    # A base of its own, and the scores of the adapter as it was trained.
    assert not isinstance(trainer.teacher, AdapterTeacher)
    whole = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    expected = tiny_trainer(
        tmp_path / "plain", model=tiny_model(3), teacher_model=whole, settings=arguments["settings"]
    )
    assert_close(trainer.teacher.score(BATCH, EVERY_ROW, 999), expected.teacher.score(BATCH, EVERY_ROW, 999))
    with pytest.raises(SGOPDConfigError, match=r"must share a frozen base.*`init_lora_weights` or `bias`"):
        tiny_trainer(tmp_path / "run", teacher_model=AdapterTeacher(adapter), **arguments)
