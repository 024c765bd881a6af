"""An adapter on the student's own base as teacher: shared weights, frozen, never saved, refused where it cannot be."""

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ANCHOR, changed_weights, copied_weights, save_pair, tiny_model, tiny_tokenizer, tiny_trainer
from transformers import Qwen3ForCausalLM

from sg_opd_trl import AdapterTeacher, LocalTeacher, SGOPDConfigError, TeacherError
from teachers.test_parity import BATCH, GREEDY, PROMPTS, ROWS, TOLERANCE, lora, merged, oracle, save_adapter

peft = pytest.importorskip("peft")

SETTINGS = ANCHOR | {"max_steps": 2, "learning_rate": 1e-2}


def causal_models() -> int:
    gc.unfreeze()
    gc.collect()
    return sum(issubclass(type(found), Qwen3ForCausalLM) for found in gc.get_objects())


def flags(model: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.fixture
def base(tmp_path: Path) -> str:
    return save_pair(tmp_path / "base", 0)


@pytest.fixture
def adapter(tmp_path: Path, base: str) -> str:
    return save_adapter(tmp_path / "adapter", base=base)


def by_path(tmp_path: Path, base: str, teacher: Any, **arguments: Any) -> Any:
    settings = SETTINGS | arguments.pop("settings", {})
    given = {"model": base, "teacher_model": teacher, "teacher_processing_class": None, "peft_config": lora(r=2)}
    return tiny_trainer(tmp_path / "run", settings=settings, **(given | arguments))


def expected_scores(adapter: str) -> torch.Tensor:
    return oracle(merged(adapter))


# --- a run -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_with_a_shared_base(
    tmp_path: Path, base: str, adapter: str, checkpointing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Student, teacher and reference are one model; only the student's adapter moves and is saved."""
    before_any = causal_models()
    saving = {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": checkpointing}
    with caplog.at_level(logging.INFO, logger="sg_opd_trl"):
        trainer = by_path(tmp_path, base, adapter, settings=saving)
    assert "shares the student's weights" in caplog.text
    assert "taken on trust" not in caplog.text
    assert isinstance(trainer.teacher, AdapterTeacher)
    assert trainer.reference.adapter_name is None
    assert causal_models() == before_any + 1
    first = trainer.teacher.score(BATCH, ROWS, 100)
    torch.testing.assert_close(first.double(), expected_scores(adapter), rtol=0, atol=TOLERANCE)

    before = copied_weights(trainer.model)
    trainer.train()
    changed = changed_weights(trainer.model, before)
    assert changed
    assert all(".default." in name for name in changed)
    optimized = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    named = dict(trainer.model.named_parameters())
    assert {name for name in named if id(named[name]) in optimized} == {name for name in named if ".default." in name}
    assert torch.equal(trainer.teacher.score(BATCH, ROWS, 100), first), "the teacher moved"

    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "final"):
        assert (folder / "adapter_model.safetensors").is_file()
        assert not [path for path in folder.rglob("*") if path.name.startswith("teacher")]
        loaded = peft.PeftModel.from_pretrained(tiny_model(0), str(folder))
        assert list(loaded.peft_config) == ["default"]
    facts = trainer.checkpoint_state()["teacher"]
    assert facts["name"] == adapter
    assert facts["fingerprint"] is not None


def test_student_teacher_and_reference_are_told_apart(tmp_path: Path, base: str, adapter: str) -> None:
    """A student with a trained adapter: three adapters on one base, each with its own scores."""
    student = peft.PeftModel.from_pretrained(
        Qwen3ForCausalLM.from_pretrained(base),
        save_adapter(tmp_path / "student", seed=7, base=base),
        is_trainable=True,
    )
    trainer = by_path(tmp_path, base, AdapterTeacher(adapter), model=student, peft_config=None)
    trainer.train()
    teacher = trainer.teacher.score(BATCH, ROWS, 100).double()
    reference = trainer.reference.score(BATCH, ROWS, 100).double()
    torch.testing.assert_close(teacher, expected_scores(adapter), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(reference, expected_scores(str(tmp_path / "student")), rtol=0, atol=TOLERANCE)
    trainer.save_model(str(tmp_path / "final"))
    assert {path.name for path in (tmp_path / "final").iterdir() if path.is_dir()} == set()


def test_the_gradient_is_that_of_the_same_teacher_as_a_model_of_its_own(
    tmp_path: Path, base: str, adapter: str
) -> None:
    from tiny import GradientRecorder, inject_rollouts, inject_teacher_rollouts, relative_difference

    gradients = []
    for teacher in (AdapterTeacher(adapter), merged(adapter)):
        recorder = GradientRecorder()
        torch.manual_seed(0)
        trainer = by_path(
            tmp_path,
            base,
            teacher,
            callbacks=[recorder],
            settings={"max_steps": 1, "max_grad_norm": 1e9},
            teacher_processing_class=tiny_tokenizer(),
        )
        inject_rollouts(trainer, lambda prompt, row: [5 + row, 7, 9][: 1 + row % 3])
        inject_teacher_rollouts(trainer, lambda prompt: [6, 8, 1])
        trainer.train()
        gradients.append(recorder.steps[0])
    assert relative_difference(*gradients) < 1e-5


# --- scoring and generating leave the student as it is ---------------------------------------------------------------
def test_the_student_is_left_as_it_was(tmp_path: Path, base: str) -> None:
    adapter = save_adapter(tmp_path / "adapter", base=base, lora_dropout=0.5)
    trainer = by_path(tmp_path, base, adapter, peft_config=lora(r=2, lora_dropout=0.5))
    model = trainer.model
    model.train()
    next(parameter for parameter in model.parameters() if parameter.requires_grad).requires_grad_(False)
    own_config = model.get_base_model().generation_config
    before, active = flags(model), model.active_adapter
    first, second = (trainer.teacher.score(BATCH, ROWS, 100) for _ in range(2))
    assert torch.equal(first, second), "dropout must be off while the teacher scores"
    assert trainer.teacher.generate(PROMPTS, GREEDY, 1, 100) == trainer.teacher.generate(PROMPTS, GREEDY, 2, 100)
    assert (flags(model), model.active_adapter, model.training) == (before, active, True)
    assert model.get_base_model().generation_config is own_config
    assert not first.requires_grad
    with pytest.raises(TeacherError, match="does not exist in the teacher"):
        odd = BATCH.select(torch.tensor([0]))
        odd.completion_ids[0, 0] = 99
        trainer.teacher.score(odd, ROWS[:1], 100)
    assert (flags(model), model.active_adapter, model.training) == (before, active, True)


def test_a_second_trainer_on_the_same_student_replaces_the_adapter(tmp_path: Path, base: str, adapter: str) -> None:
    """A notebook cell that is run again."""
    student = peft.get_peft_model(Qwen3ForCausalLM.from_pretrained(base), lora(r=2))
    other = save_adapter(tmp_path / "other", seed=9, base=base)
    for teacher in (adapter, adapter, other):
        trainer = by_path(tmp_path, base, teacher, model=student, peft_config=None)
        scores = trainer.teacher.score(BATCH, ROWS, 100).double()
        torch.testing.assert_close(scores, expected_scores(teacher), rtol=0, atol=TOLERANCE)
    assert set(student.peft_config) == {"default", "ref", "teacher", "teacher_2"}
    student.save_pretrained(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()] == []


def test_fingerprints_of_adapters(tmp_path: Path, base: str, adapter: str) -> None:
    other = save_adapter(tmp_path / "other", seed=9, base=base)
    prints = [
        by_path(tmp_path, base, teacher).teacher.identity["fingerprint"] for teacher in (adapter, adapter, other)
    ]
    assert prints[0] == prints[1] != prints[2]


# --- which adapters share the base -----------------------------------------------------------------------------------
def test_an_adapter_on_another_base_is_loaded_with_it(tmp_path: Path, base: str) -> None:
    another = save_pair(tmp_path / "another", 0)
    path = save_adapter(tmp_path / "adapter", base=another)
    trainer = by_path(tmp_path, base, path)
    assert type(trainer.teacher) is LocalTeacher
    assert trainer.teacher.identity["name"] == path
    scores = trainer.teacher.score(BATCH, ROWS, 100).double()
    torch.testing.assert_close(scores, expected_scores(path), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "arguments",
    [{"peft_config": None}, {"settings": {"teacher_model_init_kwargs": {"attn_implementation": "eager"}}}],
    ids=["no adapter", "loading options"],
)
def test_an_adapter_that_cannot_share_is_loaded_with_its_base(
    tmp_path: Path, base: str, adapter: str, arguments: dict
) -> None:
    """A student whose own weights are trained, and options for a model of its own."""
    trainer = by_path(tmp_path, base, adapter, **arguments)
    assert type(trainer.teacher) is LocalTeacher
    assert (trainer.teacher.model.config._attn_implementation == "eager") is ("settings" in arguments)
    scores = trainer.teacher.score(BATCH, ROWS, 100).double()
    torch.testing.assert_close(scores, expected_scores(adapter), rtol=0, atol=TOLERANCE)


def test_refused_without_a_frozen_base(tmp_path: Path, base: str, adapter: str) -> None:
    with pytest.raises(SGOPDConfigError, match=r"must share a frozen base.*own weights are trained.*`peft_config`"):
        by_path(tmp_path, base, AdapterTeacher(adapter), peft_config=None)
    with pytest.raises(SGOPDConfigError, match=r"a student that trains '.*norm.*' of its base"):
        student = peft.get_peft_model(Qwen3ForCausalLM.from_pretrained(base), lora())
        next(p for name, p in student.named_parameters() if "norm" in name).requires_grad_(True)
        by_path(tmp_path, base, AdapterTeacher(adapter), model=student, peft_config=None)


def test_refused_on_another_base(tmp_path: Path, base: str) -> None:
    path = save_adapter(tmp_path / "adapter", base="some/other-model")
    with pytest.raises(SGOPDConfigError, match=r"an adapter of 'some/other-model' and a student on .*trust_base=True"):
        by_path(tmp_path, base, AdapterTeacher(path))
    trusted = by_path(tmp_path, base, AdapterTeacher(path, trust_base=True))
    scores = trusted.teacher.score(BATCH, ROWS, 100).double()
    torch.testing.assert_close(scores, expected_scores(path), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layers", [3, 1], ids=["more layers", "fewer"])
def test_an_adapter_of_another_shape(tmp_path: Path, base: str, layers: int) -> None:
    """PEFT would pass over the weights that find no place, and leave at zero those that are missing."""
    model = peft.get_peft_model(tiny_model(0, layers=layers), lora())
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter")
    students = Qwen3ForCausalLM.from_pretrained(base)
    student = peft.get_peft_model(students, lora(r=2))
    with pytest.raises(TeacherError, match=r"does not fit its base: \d+ weights without a counterpart"):
        by_path(tmp_path, base, str(tmp_path / "adapter"), model=student, peft_config=None)
    assert "teacher" not in student.peft_config


def test_a_head_that_is_adapted(tmp_path: Path, base: str) -> None:
    path = save_adapter(tmp_path / "adapter", base=base, target_modules=["q_proj", "lm_head"])
    with pytest.raises(TeacherError, match="it adapts the output head"):
        by_path(tmp_path, base, AdapterTeacher(path))


def test_a_learned_prompt(tmp_path: Path, base: str) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, base_model_name_or_path=base)
    peft.get_peft_model(tiny_model(0), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SGOPDConfigError, match=r"must change weights, got PROMPT_TUNING.*Give a LoRA adapter"):
        by_path(tmp_path, base, str(tmp_path / "adapter"))


def test_a_tokenizer_beside_the_adapter_is_checked(tmp_path: Path, base: str, adapter: str) -> None:
    tiny_tokenizer("1023456789+=abcdefgh ").save_pretrained(adapter)
    for teacher in (adapter, AdapterTeacher(adapter)):
        with pytest.raises(TeacherError, match="got 2 differences"):
            by_path(tmp_path, base, teacher)
