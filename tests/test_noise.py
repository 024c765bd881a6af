"""The rounding noise of a2, and the dead zone that is chosen from it."""

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import GradientRecorder, logged, save_pair, tiny_data, tiny_model, tiny_trainer
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from two_ranks import launch

from sg_opd_trl import SGOPDConfigError, SGOPDTrainer, trl_seam
from sg_opd_trl.noise import Noise, measure, noise_of

OFF = {"teacher_sampling_enable": False}
#: Padded rows in training, packed ones where a frozen model scores them.
CHECKPOINTING = {"bf16": True, "gradient_checkpointing": True}
TOO_SMALL = "is below the rounding noise of this run"


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts padded on the left in half precision too, where a row rounds otherwise than packed."""
    monkeypatch.setattr(trl_seam, "padding_behind", lambda *arguments: False)


def own_teacher(seed: int = 0, **config: Any) -> dict[str, Any]:
    """A student, and a teacher with the same weights."""
    return {"model": tiny_model(seed, **config), "teacher_model": tiny_model(seed, **config)}


def trainer_of(folder: Path, settings: dict, **arguments: Any) -> Any:
    arguments = own_teacher() | arguments
    settings = {"max_steps": 1, "max_completion_length": 16, "per_device_train_batch_size": 32} | settings
    return tiny_trainer(folder, settings=OFF | settings, **arguments)


def gated_share(trainer: Any) -> float:
    """Tokens of the first step that are not neutral, of those whose verifier has a sign."""
    a1, gate = trainer.seen
    return float(((gate != 0) & trainer.counted)[a1 != 0].sum() / trainer.counted[a1 != 0].sum())


class Watching(SGOPDTrainer):
    """Keeps what the gate of the first micro-batch was asked, and what it said."""

    def policy_forward(self, model: Any, batch: dict) -> Any:
        """As it is; the gate and its mask are kept."""
        output = super().policy_forward(model, batch)
        if not hasattr(self, "seen"):
            self.seen = batch["verifier_advantages"], batch["signals"].gate
            self.counted = batch["completion_mask"] != 0
        return output


@pytest.mark.usefixtures("noisy")
def test_what_is_measured_is_what_the_gate_meets_where_teacher_and_student_are_the_same(tmp_path: Path) -> None:
    """The oracle is the run itself: its teacher has the student's weights, so that every gated token is noise."""
    trainer = trainer_of(tmp_path, CHECKPOINTING, trainer_class=Watching)
    before = []
    trainer.gate_noise._compare = lambda dead_zone: before.append(measure(trainer, dead_zone))
    trainer.train()
    share = gated_share(trainer)
    assert share > 0.3
    assert before[0].gated == pytest.approx(share, abs=0.15)
    # The chosen dead zone leaves about one token in twenty.
    chosen = trainer_of(tmp_path, CHECKPOINTING | {"gate_dead_zone": "auto"}, trainer_class=Watching)
    chosen.train()
    assert gated_share(chosen) < 0.15
    assert logged(chosen, "gate/dead_zone") == [chosen.gate_noise.dead_zone]
    assert chosen.gate_noise.dead_zone == pytest.approx(before[0].quantile)


def test_in_bfloat16_the_gate_reads_hardly_any_noise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its teacher has the student's weights, and rows of unequal length are padded in training and packed outside."""
    trainer = trainer_of(tmp_path, CHECKPOINTING | {"max_completion_length": 32}, trainer_class=Watching)
    trainer.train()
    assert measure(trainer, 1e-4).gated < 0.05
    assert gated_share(trainer) < 0.05
    assert TOO_SMALL not in caplog.text


@pytest.mark.usefixtures("noisy")
def test_a_number_below_the_noise_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, CHECKPOINTING)
    trainer.train()
    (told,) = [record.getMessage() for record in caplog.records if TOO_SMALL in record.getMessage()]
    assert "`gate_dead_zone`=0.0001 is below" in told
    gated, below = re.search(r"exactly, (\d+)% of the tokens .* \(95% stay below (\S+)\)", told).groups()
    assert int(gated) > 30
    assert 1e-4 < float(below) < 1
    assert 'Set gate_dead_zone="auto" or a number' in told
    trainer.train()
    assert caplog.text.count(TOO_SMALL) == 1


@pytest.mark.usefixtures("noisy")
@pytest.mark.parametrize(
    "settings",
    [
        {"gate_dead_zone": 0.5},
        {"gate_dead_zone": "auto", "preflight": False},
        {"sign_gated_extrapolation": False},
        {"preflight": False},
    ],
    ids=["wide enough", "chosen", "no gate", "no preflight"],
)
def test_nothing_is_told_without_reason(tmp_path: Path, settings: dict, caplog: pytest.LogCaptureFixture) -> None:
    trainer_of(tmp_path, CHECKPOINTING | settings).train()
    assert TOO_SMALL not in caplog.text


@pytest.mark.usefixtures("noisy")
def test_a_gate_of_ones_own_is_not_told_of_a_setting_that_it_does_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class OwnGate(SGOPDTrainer):
        def compute_gate(self, verifier_advantages: Any, teacher_advantages: Any) -> Any:
            return torch.zeros_like(teacher_advantages, dtype=torch.int8)

    trainer_of(tmp_path, CHECKPOINTING, trainer_class=OwnGate).train()
    assert TOO_SMALL not in caplog.text


SIZES = {
    "vocab_size": 26, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
ORDINARY = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8)),
    "wide qwen3": lambda: tiny_model(0, hidden_size=128, layers=4, std=1.5),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ORDINARY)
def test_the_default_is_above_the_noise_of_float32(
    tmp_path: Path, name: str, checkpointing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = ORDINARY[name]()
    trainer = trainer_of(
        tmp_path, {"gradient_checkpointing": checkpointing}, model=model, teacher_model=copy.deepcopy(model)
    )
    trainer.gate_noise.on_train_begin(trainer.args, trainer.state, trainer.control)
    noise = noise_of(trainer)
    assert noise.numel() > 20
    assert float(noise.max()) < 5e-5
    assert TOO_SMALL not in caplog.text


def test_in_float32_the_chosen_one_is_the_default(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, {"gate_dead_zone": "auto"})
    trainer.train()
    assert trainer.gate_noise.dead_zone == 1e-4


@pytest.mark.parametrize("settings", [{}, CHECKPOINTING], ids=["float32", "bf16 and checkpointing"])
def test_the_run_is_the_same_bit_for_bit_with_and_without_the_measurement(tmp_path: Path, settings: dict) -> None:
    """Sampled rollouts, dropout and two steps: the random state shows in all of them."""
    settings = settings | {"max_steps": 2, "per_device_train_batch_size": 8}
    runs = []
    for measured in (True, False):
        recorder = GradientRecorder()
        trainer = trainer_of(
            tmp_path,
            settings | {"preflight": measured, "disable_dropout": False},
            model=tiny_model(0, attention_dropout=0.1),
            teacher_model=tiny_model(1),
            callbacks=[recorder],
        )
        trainer.train()
        runs.append((recorder.steps, {name: p.detach() for name, p in trainer.model.named_parameters()}))
    for left, right in [*zip(runs[0][0], runs[1][0], strict=True), (runs[0][1], runs[1][1])]:
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_weights_gradients_mode_and_checkpointing_are_left_as_they_were(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, CHECKPOINTING)
    model = trainer.model
    model.gradient_checkpointing_enable()
    for training in (True, False):
        model.train(training)
        before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
        measure(trainer, 1e-4)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(torch.random.get_rng_state(), state)
        assert (model.training, model.is_gradient_checkpointing) == (training, True)


@pytest.mark.usefixtures("noisy")
def test_a_resumed_run_takes_the_dead_zone_from_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CHECKPOINTING | {"gate_dead_zone": "auto", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    path = save_pair(tmp_path / "student", 0)
    arguments = {"model": path, "teacher_model": save_pair(tmp_path / "teacher", 1), "teacher_processing_class": None}
    first = trainer_of(tmp_path / "run", settings, **arguments)
    first.train()
    state = tmp_path / "run" / "checkpoint-1" / "sg_opd_state.json"
    facts = json.loads(state.read_text(encoding="utf-8"))
    assert facts["gate_dead_zone"] == first.gate_noise.dead_zone > 1e-4
    resumed = trainer_of(tmp_path / "run", settings, **arguments)
    monkeypatch.setattr("sg_opd_trl.noise.measure", lambda *_: Noise(quantile=0.5, gated=1.0))
    with caplog.at_level(logging.INFO, logger="sg_opd_trl.noise"):
        resumed.train(resume_from_checkpoint=str(state.parent))
    assert resumed.dead_zone == facts["gate_dead_zone"]
    assert "as chosen when the run began" in caplog.text


def test_a_checkpoint_without_one_has_it_measured(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    arguments = {
        "model": save_pair(tmp_path / "student", 0),
        "teacher_model": save_pair(tmp_path / "teacher", 1),
        "teacher_processing_class": None,
    }
    trainer_of(tmp_path / "run", settings, **arguments).train()
    automatic = {"gate_dead_zone": "auto", "allow_changed": ["gate_dead_zone"]}
    resumed = trainer_of(tmp_path / "run", settings | automatic, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert resumed.gate_noise.dead_zone == 1e-4


@pytest.mark.usefixtures("noisy")
def test_an_evaluation_before_the_training_has_a_dead_zone(tmp_path: Path) -> None:
    settings = CHECKPOINTING | {"gate_dead_zone": "auto", "eval_with_teacher": True, "per_device_eval_batch_size": 8}
    trainer = trainer_of(tmp_path, settings, eval_dataset=tiny_data(4))
    trainer.evaluate()
    evaluated = trainer.gate_noise.dead_zone
    assert evaluated > 1e-3, "the student's rows are padded in training, though none has taken place"
    assert not trainer.model.is_gradient_checkpointing
    trainer.train()
    assert trainer.gate_noise.dead_zone == evaluated


def test_prompts_that_nobody_knows_are_made_up(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, {})
    trainer.environment_factories = [object]
    assert noise_of(trainer).numel() > 0


def test_long_prompts_are_shortened_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sg_opd_trl.noise._PROMPT_TOKENS", 4)
    trainer = trainer_of(tmp_path, {})
    seen = []
    scored = trainer.score_with_student
    trainer.score_with_student = lambda batch, rows: (seen.append(batch), scored(batch, rows))[1]
    noise_of(trainer)
    lengths = seen[0].prompt_mask.sum(dim=1)
    assert int(lengths.max()) == 4
    assert int(lengths.min()) < 4


def test_auto_with_a_teacher_server_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    settings = OFF | {"gate_dead_zone": "auto", "teacher_model_server_url": "http://localhost:1"}
    with pytest.raises(SGOPDConfigError, match=r"`gate_dead_zone='auto'` is not supported with a teacher server.*Set"):
        tiny_trainer(tmp_path, settings=settings, teacher_model=None)


@pytest.mark.slow
def test_two_ranks_agree_on_the_larger_noise(tmp_path: Path) -> None:
    done = launch(str(Path(__file__).with_name("noise_two_ranks_script.py")), str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    own, chosen = json.loads((tmp_path / "results.json").read_text())
    assert own[0] != own[1]
    assert chosen == [max(own)] * 2
