"""Teachers whose weights wait in host memory: one on the device at a time, same scores, the same bits afterwards."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import (
    ANCHOR,
    changed_weights,
    copied_weights,
    inject_rollouts,
    save_pair,
    script_generation,
    tiny_config,
    tiny_data,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
)
from torch import nn

from sg_opd_trl import AdapterTeacher, LocalTeacher, SGOPDConfigError
from sg_opd_trl.inspection.run import on_device_at_once
from sg_opd_trl.teachers import build, local, offload
from sg_opd_trl.teachers.offload import HostWeights
from teachers.test_parity import save_adapter

CPU = torch.device("cpu")
OFFLOAD = {"teacher_offload": True}
ANCHORED = ANCHOR | {"teacher_sampling_enable": True, "teacher_sampling_ratio": 0.5}


def places(model: nn.Module) -> list[int]:
    return [weight.data_ptr() for weight in model.parameters()]


def write(prompt: list[int], row: int) -> list[int]:
    return [6 + (sum(prompt) + row * k) % 19 for k in range(row % 4 + 1)] + [1]


# --- the weights -----------------------------------------------------------------------------------------------------
def test_a_use_has_a_copy_and_leaves_the_weights_as_they_were() -> None:
    model = tiny_model(1)
    model.lm_head.weight = model.model.embed_tokens.weight
    before, tokens = copied_weights(model), torch.tensor([[3, 5, 6]])
    logits = model(tokens).logits
    waiting = HostWeights(model, CPU)
    host = places(model)
    with waiting.on_device():
        assert not set(host) & set(places(model))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert changed_weights(model, before) == []
        assert torch.equal(model(tokens).logits, logits)
        with waiting.on_device():
            inner = places(model)
        assert places(model) == inner, "the end of a nested use took the weights away"
    assert places(model) == host
    assert changed_weights(model, before) == []


def test_a_use_that_fails_leaves_them_too() -> None:
    model = tiny_model(1)
    waiting, before = HostWeights(model, CPU), copied_weights(model)
    host = places(model)
    with pytest.raises(RuntimeError, match="out of memory"), waiting.on_device():
        raise RuntimeError("out of memory")
    assert places(model) == host
    assert changed_weights(model, before) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: host and device are one")
def test_the_device_is_free_between_uses() -> None:
    model = tiny_model(1, hidden_size=256)
    waiting = HostWeights(model, torch.device("cuda"))
    before, size = torch.cuda.memory_allocated(), sum(4 * weight.numel() for weight in model.parameters())
    with waiting.on_device():
        assert torch.cuda.memory_allocated() - before >= size
        assert {weight.device.type for weight in model.parameters()} == {"cuda"}
    assert torch.cuda.memory_allocated() == before
    assert all(weight.is_pinned() for weight in model.parameters())


# --- a run -----------------------------------------------------------------------------------------------------------
def run(folder: Path, settings: dict) -> Any:
    data = tiny_data().add_column("teacher_id", ["even", "odd"] * 8)
    teachers = {"even": script_generation(tiny_model(1)), "odd": script_generation(tiny_model(3))}
    trainer = tiny_trainer(
        folder,
        settings={"distillation_mode": "topk_logits", "distillation_topk": 4} | ANCHORED | settings,
        train_dataset=data,
        teacher_model=teachers,
    )
    inject_rollouts(trainer, write)
    return trainer


def test_several_teachers_take_turns_and_teach_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(tmp_path / "plain", {})
    plain.train()
    offloaded = run(tmp_path / "offloaded", OFFLOAD)
    teachers = {one.role: one for one in offloaded.teacher.distinct}
    weights = {role: copied_weights(one.model) for role, one in teachers.items()}
    host = {role: places(one.model) for role, one in teachers.items()}
    order: list[tuple[str, frozenset]] = []

    def there(role: str) -> bool:
        return not set(host[role]) & set(places(teachers[role].model))

    def watched(name: str) -> None:
        real = getattr(LocalTeacher, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            order.append((f"{self.role} {name}", frozenset(role for role in teachers if there(role))))
            return real(self, *args, **kwargs)

        monkeypatch.setattr(LocalTeacher, name, call)

    watched("_forward")
    watched("_generate_batch")
    offloaded.train()
    assert {name for name, _ in order} == {
        f"teacher {x} {y}" for x in ("even", "odd") for y in ("_forward", "_generate_batch")
    }
    for name, those in order:
        assert those == {name.rpartition(" ")[0]}, "another teacher was on the device, or this one was not"
    assert not any(there(role) for role in teachers)
    for role, one in teachers.items():
        assert changed_weights(one.model, weights[role]) == []
    assert changed_weights(offloaded.model, copied_weights(plain.model)) == []


def test_it_is_loaded_into_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []
    real = local.create_model_from_path

    def recorded(path: str, **options: Any) -> Any:
        asked.append(options)
        return real(path, **options)

    monkeypatch.setattr(local, "create_model_from_path", recorded)
    trainer = tiny_trainer(tmp_path / "run", settings=OFFLOAD, teacher_model=save_pair(tmp_path / "teacher", 1))
    assert asked[0]["device_map"] is None
    assert trainer.teacher.host_weights is not None
    assert {weight.device.type for weight in trainer.teacher.model.parameters()} == {"cpu"}


def test_a_machine_without_a_gpu_says_that_nothing_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path, settings=OFFLOAD)
    assert caplog.text.count("`teacher_offload` saves nothing on this machine: its device is the host.") == 1


# --- where it has no meaning -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation_mode": "full_logits"}, "is not supported with distillation_mode='full_logits'"),
        ({"teacher_model_init_kwargs": {"device_map": "auto"}}, "is not supported with device_map='auto'"),
    ],
)
def test_settings_that_do_not_go_with_it(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(SGOPDConfigError, match=f"`teacher_offload=True` {message}"):
        tiny_config(tmp_path, **(OFFLOAD | settings))


def quantized(model: Any) -> Any:
    model.is_quantized = True
    return model


def spread(model: Any) -> Any:
    model.hf_device_map = {"model.embed_tokens": "cpu", "lm_head": "disk"}
    return model


@pytest.mark.parametrize(("change", "reason"), [(quantized, "a quantized model"), (spread, "`device_map` has spread")])
def test_weights_that_no_move_reaches(tmp_path: Path, change: Any, reason: str) -> None:
    with pytest.raises(SGOPDConfigError, match=f"`teacher_offload` must be False with the teacher .*{reason}"):
        tiny_trainer(tmp_path, settings=OFFLOAD, teacher_model=change(tiny_model(1)))


def test_an_adapter_on_the_students_base_and_an_object_of_another_class(tmp_path: Path) -> None:
    from peft import LoraConfig

    adapter = AdapterTeacher(save_adapter(tmp_path / "adapter"))
    lora = LoraConfig(target_modules=["q_proj"], r=2)
    with pytest.raises(SGOPDConfigError, match=r"must go with a teacher that has weights of its own.*AdapterTeacher"):
        tiny_trainer(tmp_path / "run", settings=OFFLOAD, teacher_model=adapter, peft_config=lora)
    other = SimpleNamespace(identity={}, vocab_size=26)
    with pytest.raises(SGOPDConfigError, match=r"must go with a teacher that has weights of its own.*SimpleNamespace"):
        offload.check_offloaded({"teacher": other}, None)


def test_beside_them_a_teacher_of_its_own_is_moved(tmp_path: Path) -> None:
    mine = LocalTeacher(tiny_model(1))
    mine.host_weights = HostWeights(mine.model, CPU)
    offload.check_offloaded({"teacher a": SimpleNamespace(), "teacher b": mine}, None)


def test_a_teacher_that_is_the_reference_too(tmp_path: Path) -> None:
    model = tiny_model(1)
    with pytest.raises(SGOPDConfigError, match="must be False where the teacher is the reference too"):
        tiny_trainer(tmp_path, settings=OFFLOAD, teacher_model=model, reference_model=model)


def test_models_that_are_placed_by_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "places_models_itself", lambda accelerator: True)
    monkeypatch.setattr(build, "_build_one", lambda *_: pytest.fail("a teacher was loaded first"))
    with pytest.raises(SGOPDConfigError, match="`teacher_offload` must be False with FSDP or DeepSpeed"):
        tiny_trainer(tmp_path, settings=OFFLOAD, teacher_processing_class=tiny_tokenizer())


def test_the_estimate_of_memory_counts_the_largest_that_waits(tmp_path: Path) -> None:
    small, large = LocalTeacher(tiny_model(1)), LocalTeacher(tiny_model(1, hidden_size=64))
    stays = LocalTeacher(tiny_model(2))
    for one in (small, large):
        one.host_weights = HostWeights(one.model, CPU)
    assert on_device_at_once([large, stays, small]) == [stays, large]
