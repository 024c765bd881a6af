"""A teacher in half precision computes what autocast has a student with float32 weights compute."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, NOT_BUILT, tiny_architecture
from peft import LoraConfig, get_peft_model
from tiny import ANCHOR, logged, tiny_model, tiny_tokenizer, tiny_trainer
from transformers import AutoModelForCausalLM

from sg_opd_trl.models.residual import keep_float32_between_layers, weights_dtype
from sg_opd_trl.teachers import LocalTeacher

IDS = torch.randint(2, 26, (3, 40), generator=torch.Generator().manual_seed(0))
SETTINGS = {"teacher_sampling_enable": False, "max_steps": 1, "bf16": True, "use_cpu": True, "learning_rate": 0.0}


def saved(model: Any, folder: Path) -> Path:
    """With weights that bfloat16 has, so that nothing but the computation can differ."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float())
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def log_probs(model: Any) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=IDS).logits.float().log_softmax(-1)[:, :-1]
    return logits.gather(-1, IDS[:, 1:, None])


def both(model_type: str, folder: Path) -> tuple[Any, Any]:
    saved(tiny_architecture(model_type), folder)
    return tuple(
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16)
    )


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gpt2", "phi", "olmo2", "biogpt"])
def test_dense_models_agree_in_every_bit(model_type: str, tmp_path: Path) -> None:
    """GPT-2 and Phi have layer norms, which take no half beside float32; BioGPT scales inside its embedding."""
    student, teacher = both(model_type, tmp_path)
    assert not torch.equal(log_probs(teacher), log_probs(student))
    keep_float32_between_layers(teacher, True)
    assert torch.equal(log_probs(teacher), log_probs(student))
    assert teacher.get_input_embeddings().weight.dtype == torch.bfloat16


def test_experts_agree_better(tmp_path: Path) -> None:
    """Their weights are no layers that autocast knows."""
    student, teacher = both("mixtral", tmp_path)
    before = (log_probs(teacher) - log_probs(student)).abs().mean()
    keep_float32_between_layers(teacher, True)
    assert (log_probs(teacher) - log_probs(student)).abs().mean() < before / 2


#: Which do not run in half precision on a CPU, and those that are parts of another model.
NOT_TRIED = ("dbrx", "xmod", "reformer", "emu3", "mllama")


@pytest.mark.full
@pytest.mark.parametrize("model_type", [each for each in ARCHITECTURES if each not in {*NOT_BUILT, *NOT_TRIED}])
def test_no_architecture_agrees_worse(model_type: str, tmp_path: Path) -> None:
    student, teacher = both(model_type, tmp_path)
    expected = log_probs(student)
    before = (log_probs(teacher) - expected).abs().mean()
    keep_float32_between_layers(teacher, True)
    assert (log_probs(teacher) - expected).abs().mean() <= before


def test_it_can_be_taken_back(tmp_path: Path) -> None:
    _, teacher = both("gpt2", tmp_path)
    weights, before = {name: each.clone() for name, each in teacher.named_parameters()}, log_probs(teacher)
    for wanted in (True, True, False):
        keep_float32_between_layers(teacher, wanted)
    assert torch.equal(log_probs(teacher), before)
    assert all(each.dtype == weights[name].dtype for name, each in teacher.named_parameters())
    assert all(torch.equal(each, weights[name]) for name, each in teacher.named_parameters())


def test_a_model_in_float32_is_left_alone() -> None:
    model = tiny_model(0)
    keep_float32_between_layers(model, True)
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("role", ["teacher", "reference"])
def test_a_run_under_autocast_with_a_teacher_in_bfloat16(
    role: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The student as its own teacher has nothing to say, not even rounding."""
    folder = str(saved(tiny_model(0), tmp_path / "student"))
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = {f"{role}_model_init_kwargs": {"dtype": "bfloat16"}, f"{role}_model_name_or_path": folder}
    other = {} if role == "teacher" else {"teacher_model": tiny_model(1)}
    settings = SETTINGS | own | {"lambda_high": 1.25}
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path / "run", settings=settings, model=student, **({"teacher_model": None} | other))
        model = trainer.teacher.model if role == "teacher" else trainer.reference.model
        assert model.dtype == torch.bfloat16
        assert torch.equal(log_probs(model), log_probs(trainer.model))
        trainer.train()
    assert "is in bfloat16 and the student in" not in caplog.text
    if role == "teacher":
        assert logged(trainer, "teacher/abs_advantage_max") == [0.0]


def test_such_a_teacher_writes_rollouts(tmp_path: Path) -> None:
    folder = str(saved(tiny_model(1), tmp_path / "teacher"))
    settings = (
        SETTINGS | ANCHOR | {"teacher_sampling_enable": True, "teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    )
    trainer = tiny_trainer(tmp_path / "run", settings=settings, teacher_model=folder)
    trainer.train()
    assert trainer.teacher.tokens_generated > 0
    assert trainer.teacher.model.get_input_embeddings()._forward_hooks


def test_a_merged_adapter_is_as_a_model_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = str(saved(tiny_model(1), tmp_path / "base"))
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path / "adapter")
    settings = SETTINGS | {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path / "run", settings=settings, teacher_model=str(tmp_path / "adapter"))
    assert trainer.teacher.model.dtype == torch.bfloat16
    assert trainer.teacher.model.get_input_embeddings()._forward_hooks
    assert "for equal weights their log-probs differ" not in caplog.text


def test_embeddings_that_are_put_together_from_several() -> None:
    class Summed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleList(torch.nn.Embedding(26, 4) for _ in range(2))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.parts[0](ids) + self.parts[1](ids)

    model = tiny_model(0).bfloat16()
    model.set_input_embeddings(Summed().bfloat16())
    assert weights_dtype(model) == torch.bfloat16
    keep_float32_between_layers(model, True)
    assert model.get_input_embeddings()(IDS).dtype == torch.float32


@pytest.mark.parametrize("given", ["object", "no autocast"])
def test_where_the_precisions_differ_it_is_told(given: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(saved(tiny_model(1), tmp_path / "teacher"))
    teacher: Any = folder
    settings = SETTINGS | {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    if given == "object":
        teacher = LocalTeacher(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
        settings = SETTINGS
    else:
        settings |= {"bf16": False}
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path / "run", settings=settings, teacher_model=teacher)
    assert "is in bfloat16 and the student in float32: for equal weights their log-probs differ" in caplog.text


def test_a_student_in_bfloat16_has_a_teacher_like_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(saved(tiny_model(0), tmp_path / "student"))
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path / "run", settings=SETTINGS, model=student, teacher_model=folder)
    assert torch.equal(log_probs(trainer.teacher.model), log_probs(trainer.model))
    assert not trainer.teacher.model.get_input_embeddings()._forward_hooks
    assert "for equal weights their log-probs differ" not in caplog.text
