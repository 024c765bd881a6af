"""Prompts and completions that do not fit into the positions of a model of the run: refused, or told."""

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from models.architectures import tiny_architecture
from tiny import ANCHOR, tiny_data, tiny_model, tiny_trainer

from sg_opd_trl.errors import SGOPDConfigError

PLAIN = {"teacher_sampling_enable": False}


def gpt2(seed: int, positions: int) -> Any:
    return tiny_architecture("gpt2", seed=seed, vocab_size=26, n_positions=positions)


def rotary(seed: int, positions: int, **rope: Any) -> Any:
    model = tiny_model(seed)
    model.config.max_position_embeddings = positions
    if rope:
        model.config.rope_parameters = {"rope_theta": 1e4} | rope
    return model


def data(*lengths: int, **columns: list) -> Dataset:
    prompts = ["1" * length for length in lengths]
    return Dataset.from_dict({"prompt": prompts, "solution": ["1"] * len(lengths)} | columns)


# Prompts of up to 30 tokens and completions of 6: 36 positions are enough, 35 are not.
@pytest.mark.parametrize("role", ["student", "teacher", "reference"])
def test_a_model_with_too_small_a_table_is_refused(tmp_path: Path, role: str) -> None:
    def build(positions: int) -> Any:
        argument = {"student": "model"}.get(role, f"{role}_model")
        models = {"model": tiny_model(0), "teacher_model": tiny_model(1), "reference_model": tiny_model(2)}
        return tiny_trainer(
            tmp_path,
            settings=PLAIN | {"lambda_base": 1.5},
            train_dataset=data(3, 30, 7, 4),
            **(models | {argument: gpt2(3, positions)}),
        )

    with pytest.raises(
        SGOPDConfigError,
        match=rf"^`max_completion_length` must leave room .* 35 positions of the {role} \(GPT2LMHeadModel\).*"
        r"first 8 prompts \(30 tokens\) and a full completion \(6\) take 36",
    ):
        build(35)
    build(36)


def test_a_model_whose_positions_go_on_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(teacher: Any) -> list[str]:
        caplog.clear()
        tiny_trainer(tmp_path, settings=PLAIN, train_dataset=data(3, 30, 7, 4), teacher_model=teacher)
        return [r.getMessage() for r in caplog.records if r.name == "sg_opd_trl.context_room"]

    with caplog.at_level(logging.WARNING):
        assert said(rotary(1, 36)) == []
        assert said(rotary(1, 18, rope_type="linear", factor=2.0)) == []
        (message,) = said(rotary(1, 35))
    assert message.startswith("The teacher (Qwen3ForCausalLM) is made for rows of up to 35 tokens: the longest")


def test_the_teacher_is_measured_by_what_it_reads_itself(tmp_path: Path) -> None:
    rows = data(3, 4, 3, 4, teacher_prompt=["1" * 32, None, None, None])
    build = {"settings": PLAIN, "train_dataset": rows}
    with pytest.raises(SGOPDConfigError, match=r"37 positions of the teacher .*32 tokens"):
        tiny_trainer(tmp_path, teacher_model=gpt2(1, 37), **build)
    tiny_trainer(tmp_path, teacher_model=gpt2(1, 38), **build)
    # The student reads nothing but its own prompt.
    tiny_trainer(tmp_path, model=gpt2(0, 30), **build)


def test_each_of_several_teachers_by_its_own_rows(tmp_path: Path) -> None:
    rows = data(3, 40, 3, 40, teacher_id=["short", "long", "short", "long"])
    teachers = {"short": gpt2(1, 30), "long": gpt2(2, 46)}
    tiny_trainer(tmp_path, settings=PLAIN, train_dataset=rows, teacher_model=teachers)
    with pytest.raises(SGOPDConfigError, match=r"45 positions of the teacher"):
        tiny_trainer(tmp_path, settings=PLAIN, train_dataset=rows, teacher_model=teachers | {"long": gpt2(2, 45)})


def test_rollouts_of_the_anchor_may_be_longer(tmp_path: Path) -> None:
    settings = ANCHOR | {"teacher_max_completion_length": 9}
    with pytest.raises(SGOPDConfigError, match=r"38 positions of the student .*completion \(9\) take 39"):
        tiny_trainer(tmp_path, settings=settings, model=gpt2(0, 38), train_dataset=data(3, 30, 7, 4))


def test_a_prompt_longer_than_all_first_ones_ends_in_a_message(tmp_path: Path) -> None:
    rows = data(*[3] * 8, *[34] * 8)
    trainer = tiny_trainer(tmp_path, settings=PLAIN | {"max_steps": 16}, model=gpt2(0, 36), train_dataset=rows)
    with pytest.raises(SGOPDConfigError, match=r"36 positions that the student .*34 tokens.*`max_prompt_tokens`"):
        trainer.train()


def test_the_default_data_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_trainer(tmp_path, train_dataset=tiny_data())
    assert not [r for r in caplog.records if r.name == "sg_opd_trl.context_room"]
