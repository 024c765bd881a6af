"""Prompts in other people's forms: what the student reads is what was asked."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny import tiny_data, tiny_tokenizer, tiny_trainer

from sg_opd_trl import DataError
from sg_opd_trl.data import filter_long_prompts, flat_prompt, prepare_dataset, without_images
from sg_opd_trl.evaluation_sampling import encode_prompt

OFF = {"teacher_sampling_enable": False, "max_steps": 1}


def strict_tokenizer() -> Any:
    """Qwen3's rule: a content that is no string counts as empty."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{% if m.content is string %}{{ m.content }}{% endif %}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    return tokenizer


def text(*parts: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": part} for part in parts]}]


def plain(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


def test_text_parts_are_joined() -> None:
    assert flat_prompt(text("1+", "1=")) == plain("1+1=")
    assert flat_prompt(plain("1+1=")) == plain("1+1=")
    assert flat_prompt("1+1=") == "1+1="
    with pytest.raises(DataError, match=r"must hold text alone, got a part of type 'image'"):
        flat_prompt([{"role": "user", "content": [{"type": "image", "image": object()}]}])


@pytest.mark.parametrize("teacher_prompt", [False, True])
def test_students_and_teachers_read_the_parts(tmp_path: Path, teacher_prompt: bool) -> None:
    questions = [f"{number}+1=" for number in range(10, 26)]
    columns: dict[str, list] = {"prompt": [text(q[:2], q[2:]) for q in questions], "solution": ["0"] * 16}
    if teacher_prompt:
        columns["teacher_prompt"] = [text("a", q) for q in questions]
    read: list[str] = []

    trainer = tiny_trainer(
        tmp_path,
        processing_class=strict_tokenizer(),
        teacher_processing_class=strict_tokenizer(),
        train_dataset=Dataset.from_dict(columns),
        settings=OFF,
    )
    own = trainer.teacher.score

    def score(batch: Any, *args: Any) -> Any:
        kept = zip(batch.prompt_ids, batch.prompt_mask, strict=True)
        read.extend(trainer.tokenizer.decode(ids[mask != 0]) for ids, mask in kept)
        return own(batch, *args)

    trainer.teacher.score = score
    trainer.train()
    before = "a" if teacher_prompt else ""
    assert set(read) == {f"user{before}{q}<eos>assistant" for q in questions[:2]}
    wanted = trainer.tokenize_prompts([plain(q) for q in questions])
    assert trainer.tokenize_prompts(columns["prompt"]) == wanted
    assert [encode_prompt(trainer.tokenizer, prompt, {}) for prompt in columns["prompt"]] == wanted


def test_an_instruction_stands_on_a_line_of_its_own_after_parts_too() -> None:
    rows = Dataset.from_dict({"prompt": [text("1+1=")], "solution": ["2"]})
    prepared = prepare_dataset(rows, instruction="Be short.")
    assert flat_prompt(prepared[0]["prompt"]) == plain("1+1=\nBe short.")


def test_long_prompts_are_measured_with_their_parts() -> None:
    rows = Dataset.from_dict({"prompt": [text("1+1="), text("1+1+1+1+1=")], "solution": ["2", "5"]})
    kept = filter_long_prompts(rows, strict_tokenizer(), 8)
    assert [row["solution"] for row in kept] == ["2"]


# --- columns of images -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "empty"), [("image", None), ("images", []), ("images", None)])
def test_a_left_over_column_without_images_changes_nothing(tmp_path: Path, name: str, empty: Any) -> None:
    weights = []
    for data in (tiny_data(), tiny_data().add_column(name, [empty] * 16)):
        trainer = tiny_trainer(tmp_path, train_dataset=data, settings=OFF)
        trainer.train()
        weights.append([parameter.sum().item() for parameter in trainer.model.parameters()])
    assert weights[0] == weights[1]


def test_an_image_behind_the_checked_rows_is_refused() -> None:
    assert without_images({"prompt": "a", "image": None, "images": []}) == {"prompt": "a"}
    with pytest.raises(DataError, match=r"'images' must be empty .*got a row with list.*remove_columns"):
        without_images({"prompt": "a", "images": ["a picture"]})
