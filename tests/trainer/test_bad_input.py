"""Bad input at construction: each a clear error of our own class, before anything is trained."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny import save_pair, tiny_data, tiny_model, tiny_tokenizer, tiny_trainer
from transformers import Qwen3Config, Qwen3ForSequenceClassification
from trl import GRPOConfig

from sg_opd_trl import DataError, SGOPDConfigError, TeacherAnchorCallback, TeacherError

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


def test_teacher_that_is_the_student(tmp_path: Path) -> None:
    student = tiny_model(0)
    with pytest.raises(SGOPDConfigError, match=r"`teacher_model` must be another object than `model`.*copy\.deepcopy"):
        tiny_trainer(tmp_path, model=student, teacher_model=student)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_teacher_that_shares_the_students_weights(tmp_path: Path) -> None:
    """LoRA is put into the base model in place: as a teacher it would carry the student's adapter and be frozen."""
    peft = pytest.importorskip("peft")
    base = tiny_model(0)
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(SGOPDConfigError, match="`teacher_model` must be another object than `model`"):
        tiny_trainer(tmp_path, model=base, teacher_model=base, peft_config=lora)


def test_reference_that_is_the_student(tmp_path: Path) -> None:
    student = tiny_model(0)
    with pytest.raises(SGOPDConfigError, match="`reference_model` must be another object than `model`"):
        tiny_trainer(tmp_path, model=student, reference_model=student)


def test_teacher_folder_with_another_tokenizer(tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "teacher", 1)
    tiny_tokenizer("1023456789+=abcdefgh ").save_pretrained(folder)
    with pytest.raises(TeacherError, match=r"got 2 differences.*'0': 5 and 6"):
        tiny_trainer(tmp_path, teacher_model=folder, teacher_processing_class=None)


def test_reference_folder_with_another_tokenizer(tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "reference", 1)
    tiny_tokenizer("1023456789+=abcdefgh ").save_pretrained(folder)
    with pytest.raises(TeacherError, match="The reference's tokenizer"):
        tiny_trainer(tmp_path, reference_model=folder)


def test_arguments_of_another_class(tmp_path: Path) -> None:
    from sg_opd_trl import SGOPDTrainer

    plain = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(SGOPDConfigError, match=r"`args` must be an SGOPDConfig, got GRPOConfig\..*Build SGOPDConfig"):
        SGOPDTrainer(tiny_model(0), needs_gold, plain, train_dataset=tiny_data(), teacher_model=tiny_model(1))


def test_the_same_teacher_named_twice_is_fine(tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "teacher", 1)
    trainer = tiny_trainer(
        tmp_path,
        settings={"teacher_model_name_or_path": folder},
        teacher_model=folder,
        teacher_processing_class=None,
    )
    assert trainer.teacher.identity["name"] == folder


def test_a_larger_embedding_is_fine_with_the_same_tokenizer(tmp_path: Path) -> None:
    """Checkpoints of one family pad their embeddings differently: 26 ids in use, 32 rows."""
    trainer = tiny_trainer(tmp_path, teacher_model=tiny_model(1, vocab_size=32))
    trainer.train()
    assert trainer.state.global_step == 2


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
