"""LoRA: only adapters are trained, and the reference is the student itself with its first adapter state."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ANCHOR, changed_weights, copied_weights, tiny_model, tiny_trainer
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from sg_opd_trl import SGOPDConfigError
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.teachers.reference import REFERENCE_ADAPTER, AdapterReference, adapter_switched

peft = pytest.importorskip("peft")

SETTINGS = ANCHOR | {"max_steps": 2, "learning_rate": 1e-2}
BATCH = TokenBatch.from_lists([[3, 5, 6], [3, 7]], [[8, 9, 1], [10, 11]], 0, torch.device("cpu"))
ROWS = torch.tensor([True, True])


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**({"target_modules": ["q_proj", "v_proj"], "r": 4, "task_type": "CAUSAL_LM"} | settings))


def adapted(seed: int = 0, **settings: Any) -> Any:
    """A student whose adapter already does something."""
    model = peft.get_peft_model(tiny_model(seed), lora(**settings))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model


def log_probs(model: Any, batch: TokenBatch = BATCH) -> torch.Tensor:
    """Independent of the fused head: float64 log-softmax of the plain logits, `(B, T)`, 0 on padding."""
    was_training = model.training
    model.eval()
    ids, mask = batch.joined()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits.double()
    model.train(was_training)
    width = batch.completion_ids.size(1)
    chosen = logits[:, -width - 1 : -1].log_softmax(-1).gather(-1, batch.completion_ids.unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(batch.completion_mask == 0, 0.0)


def flags(model: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def causal_models() -> int:
    """Models alive; what a trainer froze out of the garbage collector's sight is brought back first."""
    gc.unfreeze()
    gc.collect()
    return sum(issubclass(type(found), Qwen3ForCausalLM) for found in gc.get_objects())


def test_only_new_adapters_are_trained_and_the_base_is_the_reference(tmp_path: Path) -> None:
    before_any = causal_models()
    trainer = tiny_trainer(tmp_path, settings=SETTINGS, peft_config=lora())
    # Student and teacher: no copy of the student for the reference.
    assert causal_models() == before_any + 2
    assert isinstance(trainer.reference, AdapterReference)
    assert trainer.reference.adapter_name is None
    assert trainer.ref_model is None
    before = copied_weights(trainer.model)
    trainer.train()
    changed = changed_weights(trainer.model, before)
    assert changed
    assert all("lora_" in name for name in changed)
    assert len(changed) == sum(flags(trainer.model).values())
    expected = log_probs(tiny_model(0))
    scores = trainer.reference.score(BATCH, ROWS, 100)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6)
    assert (log_probs(trainer.model) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trained_adapter_is_its_own_reference(tmp_path: Path, checkpointing: bool) -> None:
    student = adapted()
    initial = log_probs(student)
    settings = SETTINGS | {"max_steps": 3, "gradient_checkpointing": checkpointing}
    trainer = tiny_trainer(tmp_path, settings=settings, model=student)
    assert trainer.reference.adapter_name == REFERENCE_ADAPTER
    trainer.train()
    scores = trainer.reference.score(BATCH, ROWS, 100)
    torch.testing.assert_close(scores.double(), initial, rtol=0, atol=1e-6)
    assert (log_probs(trainer.model) - initial).abs().max() > 1e-3
    assert (log_probs(tiny_model(0)) - initial).abs().max() > 1e-2


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_copy_is_frozen_and_never_saved(tmp_path: Path, beta: float) -> None:
    settings = SETTINGS | {"beta": beta, "save_strategy": "steps", "save_steps": 2}
    trainer = tiny_trainer(tmp_path, settings=settings, model=adapted())
    copies = {name: p for name, p in trainer.model.named_parameters() if f".{REFERENCE_ADAPTER}." in name}
    before = copied_weights(trainer.model)
    trainer.train()
    # q and v of two layers, A and B each
    assert len(copies) == 8
    assert not set(copies) & set(changed_weights(trainer.model, before))
    optimized = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert optimized
    assert not optimized & {id(parameter) for parameter in copies.values()}
    assert not any(parameter.requires_grad for parameter in copies.values())
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        assert (folder / "adapter_model.safetensors").is_file()
        assert [path for path in folder.rglob("*") if path.name == REFERENCE_ADAPTER] == []
        loaded = peft.PeftModel.from_pretrained(tiny_model(0), str(folder))
        assert list(loaded.peft_config) == ["default"]
        torch.testing.assert_close(log_probs(loaded), log_probs(trainer.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("new", [True, False])
def test_with_beta_the_reference_of_trl_is_the_same_state(tmp_path: Path, new: bool) -> None:
    """TRL's own log-probs of the initial student serve the extrapolation too: no second scoring."""
    arguments = {"peft_config": lora()} if new else {"model": adapted()}
    initial = tiny_model(0) if new else adapted()
    trainer = tiny_trainer(tmp_path, settings=SETTINGS | {"beta": 0.1}, **arguments)
    assert trainer.reference is None
    seen: list[tuple[TokenBatch, torch.Tensor]] = []
    score = trainer.score_with_reference

    def recording(batch: TokenBatch, rows: torch.Tensor, inputs: dict) -> torch.Tensor:
        seen.append((batch, score(batch, rows, inputs)))
        return seen[-1][1]

    trainer.score_with_reference = recording
    trainer.train()
    assert len(seen) == 2
    for batch, scores in seen:
        scores = scores.double().masked_fill(batch.completion_mask == 0, 0.0)
        torch.testing.assert_close(scores, log_probs(initial, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("new", [True, False])
def test_scoring_leaves_adapter_and_flags_as_they_were(tmp_path: Path, new: bool) -> None:
    arguments = {"peft_config": lora(lora_dropout=0.5)} if new else {"model": adapted(lora_dropout=0.5)}
    trainer = tiny_trainer(tmp_path, settings=SETTINGS, **arguments)
    trainer.model.train()
    # One adapter weight that its owner froze: activating an adapter makes all of its weights trainable.
    next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad).requires_grad_(False)
    before, active = flags(trainer.model), trainer.model.active_adapter
    first, second = (trainer.reference.score(BATCH, ROWS, 100) for _ in range(2))
    assert torch.equal(first, second), "dropout must be off while the reference scores"
    assert flags(trainer.model) == before
    assert any(before.values())
    assert trainer.model.active_adapter == active == "default"
    assert trainer.model.training
    student = log_probs(trainer.model)
    torch.testing.assert_close(student, log_probs(tiny_model(0) if new else adapted()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [None, REFERENCE_ADAPTER])
def test_an_error_while_switched_leaves_adapter_and_flags_as_they_were(name: str | None) -> None:
    model = adapted()
    model.add_adapter(REFERENCE_ADAPTER, model.peft_config["default"])
    before = flags(model)
    with pytest.raises(KeyError), adapter_switched(model, name):
        # Inside too: FSDP2 looks in the first forward of all at what is trained.
        assert flags(model) == before
        assert model.active_adapter == (name or "default")
        raise KeyError("scoring failed")
    assert flags(model) == before
    assert model.active_adapter == "default"


def test_an_adapter_already_named_like_the_copy(tmp_path: Path) -> None:
    student = peft.get_peft_model(tiny_model(0), lora(), adapter_name=REFERENCE_ADAPTER)
    with pytest.raises(SGOPDConfigError, match=r"`model` must carry one active adapter.*'ref'.*Rename or merge"):
        tiny_trainer(tmp_path, model=student)


def test_an_inactive_adapter_named_like_the_copy_is_not_overwritten(tmp_path: Path) -> None:
    student = adapted()
    student.add_adapter(REFERENCE_ADAPTER, lora(r=2))
    with pytest.raises(SGOPDConfigError, match=r"'ref'"):
        tiny_trainer(tmp_path, model=student)


def test_a_trained_adapter_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    settings = SETTINGS | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = tiny_trainer(tmp_path, settings=settings, model=adapted())
    straight.train()
    resumed = tiny_trainer(tmp_path / "again", settings=settings, model=adapted())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert changed_weights(resumed.model, copied_weights(straight.model)) == []


def test_an_explicit_reference_makes_no_copy_of_the_adapter(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=SETTINGS, model=adapted(), reference_model=tiny_model(2))
    assert list(trainer.model.peft_config) == ["default"]
    scores = trainer.reference.score(BATCH, ROWS, 100)
    torch.testing.assert_close(scores.double(), log_probs(tiny_model(2)), rtol=0, atol=1e-6)


def test_without_adapters_the_reference_is_a_copy_of_the_initial_student(tmp_path: Path) -> None:
    before_any = causal_models()
    trainer = tiny_trainer(tmp_path, settings=SETTINGS)
    assert causal_models() == before_any + 3
    trainer.train()
    scores = trainer.reference.score(BATCH, ROWS, 100)
    torch.testing.assert_close(scores.double(), log_probs(tiny_model(0)), rtol=0, atol=1e-6)
    assert (log_probs(trainer.model) - log_probs(tiny_model(0))).abs().max() > 1e-3


def test_a_student_given_by_path_is_its_own_reference(tmp_path: Path) -> None:
    from tiny import save_pair

    folder = save_pair(tmp_path / "student", 0)
    trainer = tiny_trainer(tmp_path / "run", settings=SETTINGS, model=folder, processing_class=None)
    trainer.train()
    scores = trainer.reference.score(BATCH, ROWS, 100)
    expected = log_probs(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-6)
    assert (log_probs(trainer.model) - expected).abs().max() > 1e-3
