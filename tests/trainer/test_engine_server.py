"""The student's rollouts from a vLLM server (`vllm_mode: server`), by TRL's client and a stand-in of the server."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny import copied_weights, logged, save_pair, tiny_config, tiny_model, tiny_trainer
from transformers import AutoModelForCausalLM

from sg_opd_trl.errors import SGOPDConfigError
from trainer.engine_server import Engine, serving
from trainer.test_quantized import needs_bitsandbytes, quantization

SETTINGS = {"use_vllm": True, "vllm_mode": "server", "max_steps": 3, "learning_rate": 5e-3}
LORA = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)


def train(engine: Engine, folder: Path, settings: dict | None = None, **arguments: Any) -> Any:
    trainer = tiny_trainer(
        folder, settings=SETTINGS | {"vllm_server_base_url": engine.url} | (settings or {}), **arguments
    )
    trainer.train()
    return trainer


def test_without_a_gpu_it_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SGOPDConfigError, match="`vllm_mode` must be 'colocate' on this machine, got 'server'"):
        tiny_config(tmp_path, **SETTINGS)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"num_iterations": 2}, {"temperature": 0.7}],
    ids=["plain", "accumulated", "two updates", "temperature"],
)
def test_rollouts_are_the_current_students(tmp_path: Path, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with other weights than the student writes as the student, of every step."""
    with serving(tiny_model(7), monkeypatch) as engine:
        trainer = train(engine, tmp_path, settings)
        trainer.vllm_generation.sync_weights()
    student = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    assert all(torch.equal(weight, engine.model.state_dict()[name]) for name, weight in student.items())
    # What the server said of its tokens is what the student says: it was no step behind, and rows are in their places.
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-5
    assert len(logged(trainer, "loss")) == 3
    assert max(logged(trainer, "teacher/abs_advantage_mean")) > 0.1
    assert engine.called.index("/update_weights") < engine.called.index("/v1/completions")


def test_a_server_that_is_a_step_behind_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: weights that are announced and not loaded."""
    with serving(tiny_model(0), monkeypatch) as engine:
        engine.load = lambda announced: engine.sent.get(timeout=30)  # type: ignore[method-assign]
        trainer = train(engine, tmp_path)
    differences = logged(trainer, "sampling/sampling_logp_difference/max")
    assert differences[0] < 1e-5 < 1e-3 < differences[-1]


def test_adapters_are_sent_merged_and_leave_their_base_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, where a weight that an adapter was added to and taken from is off by a rounding."""
    student, plain = tiny_model(0).to(torch.bfloat16), tiny_model(7).to(torch.bfloat16)
    before = copied_weights(student)
    with serving(plain, monkeypatch) as engine:
        trainer = train(engine, tmp_path, model=student, peft_config=LORA)
    adapted = trainer.accelerator.unwrap_model(trainer.model)
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for name, weight in adapted.named_parameters()
        if "lora_" not in name
    }
    assert base.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in base.items())
    sent = engine.model.state_dict()
    assert any(not torch.equal(sent[name], weight) for name, weight in before.items())
    # So the saved adapter is the student on the base as it was.
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(tiny_model(0).to(torch.bfloat16), tmp_path / "saved")
    ids = torch.arange(2, 20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, adapted.eval()(ids).logits)


@needs_bitsandbytes
def test_packed_weights_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = AutoModelForCausalLM.from_pretrained(
        save_pair(tmp_path / "student", 0), quantization_config=quantization(), device_map={"": "cpu"}
    )
    with (
        serving(tiny_model(7), monkeypatch) as engine,
        pytest.raises(SGOPDConfigError, match="`use_vllm` must be False with a student in four or eight bits"),
    ):
        train(engine, tmp_path / "run", model=student, peft_config=LORA)


def test_a_transfer_that_fails_takes_the_adapters_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_model(0)
    before = copied_weights(student)
    with serving(tiny_model(7), monkeypatch) as engine:
        trainer = tiny_trainer(
            tmp_path,
            settings=SETTINGS | {"vllm_server_base_url": engine.url},
            model=student,
            peft_config=LORA,
        )
        weights = trainer.vllm_generation._iter_named_params()
        next(weights)
        weights.close()
    named = {name.replace(".base_layer", ""): weight for name, weight in trainer.model.named_parameters()}
    assert all(torch.equal(named[f"base_model.model.{name}"], weight) for name, weight in before.items())
    assert not any(getattr(module, "merged", False) for module in trainer.model.modules())
