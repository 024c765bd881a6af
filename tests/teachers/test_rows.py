"""Rows with a prompt for the teacher alone: rendered as the student's are, read by the teacher and by nobody else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import ANCHOR, inject_rollouts, inject_teacher_rollouts, save_pair, tiny_data, tiny_tokenizer, tiny_trainer

from sg_opd_trl import DataError, SGOPDConfigError, TeacherError
from sg_opd_trl.data import prepare_dataset
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.teachers.routed import teacher_batch, teacher_prompt_ids

CPU = torch.device("cpu")
EXAMPLES = [{"prompt": "12"}, {"prompt": "3", "teacher_prompt": "a3"}, {"prompt": "4", "teacher_prompt": None}]


def tokenize(prompts: list[str]) -> list[list[int]]:
    return tiny_tokenizer()(text=prompts)["input_ids"]


def test_rows_without_one_read_the_students_prompt() -> None:
    own = tokenize([example["prompt"] for example in EXAMPLES])
    vocab = tiny_tokenizer().get_vocab()
    assert teacher_prompt_ids(EXAMPLES, own, tokenize) == [own[0], [vocab["a"], vocab["3"]], own[2]]


def test_the_batch_keeps_its_completions() -> None:
    own = tokenize([example["prompt"] for example in EXAMPLES])
    batch = TokenBatch.from_lists(own, [[5, 1], [6], [7, 8, 9]], 0, CPU, multiple=4)
    read = teacher_batch(batch, EXAMPLES, tokenize)
    assert torch.equal(read.completion_ids, batch.completion_ids)
    assert torch.equal(read.completion_mask, batch.completion_mask)
    assert read.prompt_mask.sum(1).tolist() == [2, 2, 1]
    assert read.prompt_ids.size(1) == 4
    assert [ids[mask == 1].tolist() for ids, mask in zip(read.prompt_ids, read.prompt_mask, strict=True)] == [
        own[0], tokenize(["a3"])[0], own[2]
    ]  # fmt: skip
    assert teacher_batch(batch, EXAMPLES[:1] * 3, tokenize) is batch


# --- data sets -------------------------------------------------------------------------------------------------------
def rows(prompts: list, chat: bool = True) -> Dataset:
    return tiny_data(len(prompts), chat=chat).add_column("teacher_prompt", prompts)


CHAT = [{"role": "user", "content": "a1"}]


@pytest.mark.parametrize(
    ("dataset", "fragments"),
    [
        (rows(["a1"] * 16), ["must be a chat that is not empty", "or null", "got 'a1' in row 0 of `train_dataset`"]),
        (rows([CHAT] * 16, chat=False), ["must be a string that is not empty", "in row 0"]),
        (rows(["a1", None, " "] + ["a1"] * 13, chat=False), ["got ' ' in row 2"]),
        (rows([CHAT, None, []] + [CHAT] * 13), ["got [] in row 2"]),
    ],
    ids=["a string beside chats", "a chat beside strings", "blank", "empty chat"],
)
def test_refused_prompts(tmp_path: Path, dataset: Dataset, fragments: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        tiny_trainer(tmp_path, train_dataset=dataset)
    for fragment in ["`teacher_prompt`", *fragments]:
        assert fragment in str(caught.value)


def test_refused_settings(tmp_path: Path) -> None:
    with pytest.raises(SGOPDConfigError, match=r"`remove_unused_columns=True` is not supported.*`teacher_prompt`"):
        tiny_trainer(tmp_path, settings={"remove_unused_columns": True}, train_dataset=rows([CHAT] * 16))


def test_the_teacher_may_be_the_student_with_more_context(tmp_path: Path) -> None:
    """Without the context its first scores are the student's own, with it they are not."""
    folder = save_pair(tmp_path / "student", 0)
    found = []
    for dataset in (tiny_data(), rows([CHAT] * 16)):
        trainer = tiny_trainer(
            tmp_path,
            settings={"max_steps": 1, "teacher_sampling_enable": False},
            model=folder,
            teacher_model=folder,
            teacher_processing_class=None,
            train_dataset=dataset,
        )
        inject_rollouts(trainer, lambda prompt, row: [5 + row, 7, 9])
        trainer.train()
        found.append(trainer.state.log_history[0]["teacher/abs_advantage_mean"])
    assert found[0] < 1e-5 < 0.1 < found[1]


def test_the_anchor_trains_on_the_students_prompt(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path, settings=ANCHOR | {"max_steps": 1}, train_dataset=rows([CHAT] * 16), reward_funcs=always_right
    )
    inject_rollouts(trainer, lambda prompt, row: [5 + row, 7, 9])
    asked: list[list[int]] = []
    inject_teacher_rollouts(trainer, lambda prompt: asked.append(prompt) or [6, 8, 1])  # type: ignore[func-returns-value]
    trained: list[TokenBatch] = []
    anchor_loss = trainer.anchor_loss
    trainer.anchor_loss = lambda logps, batch, total: trained.append(batch) or anchor_loss(logps, batch, total)
    trainer.train()
    assert asked == trainer.tokenize_prompts([CHAT])
    (batch,) = trained
    prompts = [ids[mask == 1].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    assert prompts[0] in trainer.tokenize_prompts(list(tiny_data()["prompt"]))
    assert prompts[0] not in asked


def always_right(completion_ids: list, **_: Any) -> list[float]:
    return [1.0] * len(completion_ids)


def test_a_template_is_compared_on_the_prompts_that_the_teacher_reads(tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace(
        "{{ message['content'] }}", "{{ message['content'] | replace('a', 'b') }}"
    )
    tiny_trainer(tmp_path, teacher_processing_class=other)
    with pytest.raises(TeacherError, match="The teacher's chat template must render"):
        tiny_trainer(tmp_path, teacher_processing_class=other, train_dataset=rows([CHAT] * 16))


def test_prepared_as_the_prompt_is() -> None:
    raw = Dataset.from_dict(
        {
            "question": ["1+1", "2+2"],
            "answer": [2, 4],
            "teacher_prompt": ["hint: " + "x" * 3000, None],
            "teacher_id": ["math", "code"],
        }
    )
    made = prepare_dataset(
        raw, question_column="question", answer_column="answer", instruction="Box it.", system_prompt="Be brief."
    )
    assert made["teacher_id"][:] == ["math", "code"]
    system = {"role": "system", "content": "Be brief."}
    assert made[0]["prompt"] == [system, {"role": "user", "content": "1+1\nBox it."}]
    assert made[0]["teacher_prompt"] == [system, {"role": "user", "content": "hint: " + "x" * 3000 + "\nBox it."}]
    assert made[1]["teacher_prompt"] is None
    assert made["solution"][:] == ["2", "4"]
