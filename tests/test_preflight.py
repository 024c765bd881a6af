"""What is refused or warned about before the first step: each a clear error of our own class."""

import copy
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from models.architectures import tiny_architecture
from peft import LoraConfig
from tiny import tiny_config, tiny_data, tiny_model, tiny_tokenizer, tiny_trainer
from transformers import Qwen3Config, Qwen3ForSequenceClassification
from trl import GRPOConfig

from sg_opd_trl import DataError, SGOPDConfigError, TeacherAnchorCallback, TeacherError, config
from sg_opd_trl.cli.parsing import build_settings, read_command_line
from sg_opd_trl.preflight import check_prompt_room, check_rollout_engine, warn_of_a_gate_without_drift

OFF = {"teacher_sampling_enable": False}


PLAIN = OFF | {"sign_gated_extrapolation": False}


def tokenizer_with(**changes: Any) -> Any:
    tokenizer = tiny_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def reward_model() -> Qwen3ForSequenceClassification:
    config = Qwen3Config(
        vocab_size=26, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForSequenceClassification(config)


def chats(messages: list[dict]) -> Dataset:
    return Dataset.from_dict({"prompt": [messages] * 4, "solution": ["2"] * 4})


def needs_gold(completions: list, gold: list, **_: Any) -> list[float]:
    return [0.0 for _ in completions]


def roll(prompts: list, trainer: Any) -> dict:
    raise AssertionError("nothing may be generated at construction")


def tool(text: str) -> str:
    """Echo.

    Args:
        text: what to say.
    """
    return text


# what is wrong -> (settings, arguments, error, what the message says)
CASES: dict[str, tuple[dict, dict, type[Exception], list[str]]] = {
    "no prompt column": (
        {},
        {"train_dataset": tiny_data().rename_column("prompt", "question")},
        DataError,
        ["`train_dataset`", "'prompt'", "'question'", "rename_column"],
    ),
    "no column for the verifier": (
        {},
        {"reward_funcs": needs_gold},
        DataError,
        ["`train_dataset`", "'gold'", "'solution'", "missing"],
    ),
    "no chat template": (
        {},
        {"processing_class": tokenizer_with(chat_template=None)},
        DataError,
        ["`processing_class`", "chat template", "Set `processing_class.chat_template`"],
    ),
    "empty data set": (
        {},
        {"train_dataset": Dataset.from_dict({"prompt": [], "solution": []})},
        DataError,
        ["`train_dataset` must have rows", "Check"],
    ),
    "too few rows": (
        {},
        {"train_dataset": tiny_data(1)},
        DataError,
        ["at least 2 rows, got 1", "Lower `generation_batch_size`"],
    ),
    "empty prompt": (
        {},
        {"train_dataset": Dataset.from_dict({"prompt": ["1+1=", " "], "solution": ["2", "2"]})},
        DataError,
        ["`prompt` must not be empty", "row 1", "Drop them"],
    ),
    "a prompt that ends with an answer": (
        {},
        {"train_dataset": chats([{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "It is"}])},
        DataError,
        ["`prompt` must not end with an assistant's message", "row 0 of `train_dataset`", "move its text"],
    ),
    "an image in a prompt": (
        {},
        {"train_dataset": chats([{"role": "user", "content": [{"type": "image", "text": None}]}])},
        DataError,
        ["`prompt` must hold text alone", "'image'", "Drop such rows"],
    ),
    "empty text parts": (
        {},
        {"train_dataset": chats([{"role": "user", "content": [{"type": "text", "text": ""}]}])},
        DataError,
        ["`prompt` must not be empty", "row 0"],
    ),
    "a column of images": (
        {},
        {"train_dataset": tiny_data().add_column("image", [None, "a picture"] * 8)},
        DataError,
        ["'image' must be empty with a text-only student", "remove_columns('image')"],
    ),
    "columns removed": (
        {"remove_unused_columns": True},
        {},
        SGOPDConfigError,
        ["`remove_unused_columns` must be False", "`solution`", "Leave it out"],
    ),
    "stop strings": (
        {"generation_kwargs": {"stop_strings": ["7"]}},
        {},
        SGOPDConfigError,
        ["`generation_kwargs` must not set 'stop_strings'", "Set eos_token_id"],
    ),
    "empty evaluation set": (
        {},
        {"eval_dataset": Dataset.from_dict({"prompt": [], "solution": []})},
        DataError,
        ["`eval_dataset`", "got none"],
    ),
    "no teacher": (
        {},
        {"teacher_model": None, "teacher_processing_class": None},
        SGOPDConfigError,
        ["teacher must be given, got None", "`teacher_model_name_or_path`", "trl.GRPOTrainer"],
    ),
    "two teachers": (
        {"teacher_model_name_or_path": "some/teacher"},
        {},
        SGOPDConfigError,
        ["`teacher_model`", "'some/teacher'", "Leave one of them out"],
    ),
    "a KL penalty to a student that cannot be loaded again": (
        {"beta": 0.1},
        {},
        SGOPDConfigError,
        ["`beta=0.1`", "without", "Pass `model` as a path, or set beta=0"],
    ),
    "two references": (
        {"reference_model_name_or_path": "some/reference"},
        {"reference_model": tiny_model(2)},
        SGOPDConfigError,
        ["`reference_model`", "'some/reference'", "Leave one of them out"],
    ),
    "reference without a use": (
        {"lambda_high": 1.0},
        {"reference_model": tiny_model(2)},
        SGOPDConfigError,
        ["every lambda equal to 1", "never be run", "lambda_high"],
    ),
    "anchor callback against the setting": (
        OFF,
        {"callbacks": [TeacherAnchorCallback()]},
        SGOPDConfigError,
        ["`callbacks`", "teacher_sampling_enable=False", "set teacher_sampling_enable=True"],
    ),
    "anchor callback class against the setting": (
        OFF,
        {"callbacks": [TeacherAnchorCallback]},
        SGOPDConfigError,
        ["`callbacks`", "teacher_sampling_enable=False"],
    ),
    "tools with teacher rollouts": (
        {},
        {"tools": [tool]},
        SGOPDConfigError,
        ["`teacher_sampling_enable=True`", "`tools`", "Set teacher_sampling_enable=False"],
    ),
    "rollout function with teacher rollouts": (
        {},
        {"rollout_func": roll},
        SGOPDConfigError,
        ["`teacher_sampling_enable=True`", "`rollout_func`", "Set teacher_sampling_enable=False"],
    ),
    "environment with teacher rollouts": (
        {},
        {"environment_factory": object},
        SGOPDConfigError,
        ["`teacher_sampling_enable=True`", "`environment_factory`"],
    ),
    "reserved prompts of a stream": (
        {},
        {"train_dataset": tiny_data().to_iterable_dataset()},
        SGOPDConfigError,
        ["`teacher_sampling_prompts='reserve'`", "iterable", "teacher_sampling_prompts='share'"],
    ),
    "unknown verifier": (
        {"verifier_reward_func": "math_reward"},
        {},
        SGOPDConfigError,
        ["`verifier_reward_func`", "['parity_verifier']", "'math_reward'", "Set it to one of them"],
    ),
    "reward model as verifier": (
        {},
        {"reward_funcs": reward_model(), "reward_processing_classes": tiny_tokenizer()},
        SGOPDConfigError,
        ["`verifier_reward_func`", "reward model", "no right and wrong", "sign_gated_extrapolation=False"],
    ),
    "swapped token ids": (
        {},
        {"teacher_processing_class": tiny_tokenizer("1023456789+=abcdefgh ")},
        TeacherError,
        ["teacher's tokenizer", "got 2 differences", "'0': 5 and 6", "'1': 6 and 5", "student's family"],
    ),
    "other end token": (
        {},
        {"teacher_processing_class": tokenizer_with(eos_token="a")},
        TeacherError,
        ["end token", "'a'", "'<eos>'", "Use two models of one kind"],
    ),
    "teacher without all ids": (
        {},
        {"teacher_model": tiny_model(1, vocab_size=25), "teacher_processing_class": None},
        TeacherError,
        ["all 26 ids", "vocabulary of 25", "student's family"],
    ),
    "reference without all ids": (
        {},
        {"reference_model": tiny_model(2, vocab_size=25)},
        TeacherError,
        ["reference must have all 26 ids", "vocabulary of 25"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_at_construction(case: str, tmp_path: Path) -> None:
    settings, arguments, error, said = CASES[case]
    with pytest.raises(error) as caught:
        tiny_trainer(tmp_path, settings=settings, **arguments)
    assert type(caught.value) is error
    missing = [words for words in said if words not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def test_arguments_of_another_class(tmp_path: Path) -> None:
    from sg_opd_trl import SGOPDTrainer

    plain = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(SGOPDConfigError, match=r"`args` must be an SGOPDConfig, got GRPOConfig\..*Build SGOPDConfig"):
        SGOPDTrainer(tiny_model(0), needs_gold, plain, train_dataset=tiny_data(), teacher_model=tiny_model(1))


def test_a_reward_model_may_stand_beside_the_verifier(tmp_path: Path) -> None:
    from tiny import parity_verifier

    trainer = tiny_trainer(
        tmp_path,
        settings={"verifier_reward_func": "parity_verifier", "max_steps": 1},
        reward_funcs=[reward_model(), parity_verifier],
        reward_processing_classes=[tiny_tokenizer(), None],
    )
    trainer.train()
    assert trainer.verifier.index == 1


def test_nothing_needs_a_binary_verifier_without_gate_and_anchor(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path,
        settings=PLAIN | {"max_steps": 1},
        reward_funcs=reward_model(),
        reward_processing_classes=copy.deepcopy(tiny_tokenizer()),
    )
    trainer.train()
    assert not any(re.match("gate/", name) for entry in trainer.state.log_history for name in entry)


# --- the student, and what a run will do -----------------------------------------------------------------------------
def test_adapters_loaded_into_a_plain_model_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student = tiny_model(0)
    student.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(SGOPDConfigError, match=r"must be a PeftModel .*PeftModel\.from_pretrained"):
        tiny_trainer(tmp_path, model=student, settings={"lambda_high": 1.0} | OFF)


@pytest.mark.parametrize(
    ("settings", "dropout", "warned"),
    [
        ({}, 0.25, True),
        ({}, 0.0, False),
        ({"disable_dropout": True}, 0.25, False),
        ({"sign_gated_extrapolation": False}, 0.25, True),
        ({"sign_gated_extrapolation": False}, 0.0, False),
    ],
    ids=str,
)
def test_dropout_is_warned_about(
    tmp_path: Path, settings: dict, dropout: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Attention has no module for it: it is found as a number."""
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl"):
        tiny_trainer(tmp_path, settings=OFF | settings, model=tiny_model(0, attention_dropout=dropout))
    assert ("The student has dropout of up to 0.25" in caplog.text) is warned
    assert ("the sign the gate looks at" in caplog.text) is (warned and settings == {})


def test_disable_dropout_reaches_attention_and_layers(tmp_path: Path) -> None:
    """TRL switches off modules of torch alone."""
    student = tiny_architecture("opt", attention_dropout=0.5, dropout=0.5, layerdrop=0.5)
    trainer = tiny_trainer(tmp_path, settings=OFF | {"disable_dropout": True}, model=student)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        evaluated, trained = (trainer.model.train(mode)(input_ids=ids).logits for mode in (False, True))
    assert torch.equal(evaluated, trained)


@pytest.mark.parametrize(
    ("architecture", "settings", "told"),
    [
        ("mixtral", {"router_jitter_noise": 0.3}, "MixtralForCausalLM) gives other log-probs in training"),
        ("mixtral", {}, None),
        # Of a head that a language model has not.
        ("gpt_neox", {"classifier_dropout": 0.1}, None),
    ],
)
def test_what_is_random_in_training_is_told(
    tmp_path: Path, architecture: str, settings: dict, told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    student = tiny_architecture(architecture, **settings)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl.preflight"):
        tiny_trainer(tmp_path, settings=OFF, model=student)
    said = [r.getMessage() for r in caplog.records if r.name == "sg_opd_trl.preflight"]
    assert len(said) == (told is not None) and all(str(told) in text for text in said)


UPDATES = [
    ({}, True),
    ({"num_iterations": 2}, False),
    ({"gradient_accumulation_steps": 2}, True),
    ({"gradient_accumulation_steps": 2, "num_iterations": 2}, False),
    ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, False),
    ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, True),
    ({"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2}, True),
]


@pytest.mark.parametrize(("settings", "idle"), UPDATES, ids=str)
def test_a_drift_gate_that_can_do_nothing_is_warned_about(
    tmp_path: Path, settings: dict, idle: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sg_opd_trl"):
        warn_of_a_gate_without_drift(tiny_config(tmp_path, drift_gate_tau=1.0, **settings))
    assert any("`drift_gate_tau=1.0` does nothing" in record.getMessage() for record in caplog.records) == idle
    caplog.clear()
    warn_of_a_gate_without_drift(tiny_config(tmp_path, **settings))
    assert not caplog.records


def test_a_run_warns_of_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sg_opd_trl"):
        tiny_trainer(tmp_path, settings=OFF | {"drift_gate_tau": 1.0})
    assert caplog.text.count("does nothing with num_iterations=1") == 1


# --- the engine that writes the student's rollouts -------------------------------------------------------------------
COLOCATED = {"use_vllm": True, "vllm_mode": "colocate"}


def test_a_context_without_room_for_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(SGOPDConfigError, match=r"`vllm_max_model_length` must be at least 7, got 6.*Raise it"):
        tiny_config(tmp_path, **COLOCATED, vllm_max_model_length=6)
    # Without vLLM nobody reads it.
    tiny_config(tmp_path, vllm_max_model_length=6)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one no weights reach a server."""
    monkeypatch.setattr(config, "can_send_weights", lambda config: True)


def test_the_context_of_a_server_is_its_own(gpu: None, tmp_path: Path) -> None:
    tiny_config(tmp_path, use_vllm=True, vllm_mode="server", vllm_max_model_length=6)


@pytest.mark.parametrize("engine", [COLOCATED, {}], ids=["vllm", "without"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"vllm_importance_sampling_mode": "token"},
            r"sampling_mode` must be one of 'token_truncate', .* got 'token'",
        ),
        ({"vllm_importance_sampling_clip_max": 0.5}, r"sampling_clip_max` must be a number in \[1, inf\), got 0.5"),
        ({"vllm_importance_sampling_clip_max": float("nan")}, r"clip_max` must be a number in \[1, inf\), got nan"),
        ({"vllm_importance_sampling_clip_min": -0.1}, r"sampling_clip_min` must be a number in \[0, 1\], got -0.1"),
        ({"vllm_importance_sampling_clip_min": 1.5}, r"must be a number in \[0, 1\], got 1.5.*Set it to None"),
    ],
)
def test_importance_settings_out_of_range(
    tmp_path: Path, engine: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(SGOPDConfigError, match=said):
        tiny_config(tmp_path, **engine, **settings)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_accepted(tmp_path: Path, mode: str) -> None:
    bounds = {"vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": 1.0}
    tiny_config(tmp_path, **COLOCATED, **bounds, vllm_importance_sampling_mode=mode, vllm_max_model_length=7)


def test_prompts_and_completions_fit_exactly_or_not_at_all(gpu: None, tmp_path: Path) -> None:
    args = tiny_config(tmp_path, **COLOCATED, vllm_max_model_length=16)
    check_prompt_room(args, 10, "prompts")
    with pytest.raises(SGOPDConfigError, match=r"at least 17, got 16: prompts and `max_completion_length` take"):
        check_prompt_room(args, 11, "prompts")
    check_prompt_room(args, None, "prompts")
    args.vllm_mode = "server"
    check_prompt_room(args, 11, "prompts")


def test_prompts_of_the_data_set(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()

    def tokenize(prompts: list) -> list[list[int]]:
        return [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]

    data = tiny_data()
    longest = max(map(len, tokenize(data["prompt"][:8])))
    trainer = SimpleNamespace(train_dataset=data, tokenize_prompts=tokenize, environment_factories=None)
    trainer.args = tiny_config(tmp_path, **COLOCATED, vllm_max_model_length=longest + 6)
    check_rollout_engine(trainer)
    trainer.args.vllm_max_model_length -= 1
    with pytest.raises(SGOPDConfigError, match=rf"at least {longest + 6}, got {longest + 5}: the longest of"):
        check_rollout_engine(trainer)


def test_a_recipe_whose_longest_prompts_do_not_fit() -> None:
    words = ["--config", "recipes/arithmetic/opd.yaml", "--use_vllm", "true", "--vllm_mode", "colocate"]
    words += ["--max_prompt_tokens", "100", "--vllm_max_model_length"]
    build_settings(read_command_line([*words, "148"]))
    with pytest.raises(SGOPDConfigError, match=r"at least 148, got 147: `max_prompt_tokens` and"):
        build_settings(read_command_line([*words, "147"]))


def test_a_student_whose_weights_are_trained_in_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SGOPDConfigError, match=r"`dtype` must not be float16 .* model\.embed_tokens\.weight"):
        tiny_trainer(tmp_path, model=tiny_model(0).half())


def test_a_frozen_base_in_float16_is_none_of_its_business(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, model=tiny_model(0).half(), peft_config=LoraConfig(task_type="CAUSAL_LM"))
    assert {each.dtype for each in trainer.model.parameters() if each.requires_grad} == {torch.float32}
