"""Several teachers, each asked for its own rows, and rows with a prompt for the teacher alone."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import (
    ANCHOR,
    inject_rollouts,
    inject_teacher_rollouts,
    save_pair,
    tiny_config,
    tiny_data,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
)
from torch import Tensor

from sg_opd_trl import DataError, LocalTeacher, RoutedTeacher, SGOPDConfigError, TeacherError
from sg_opd_trl.data import prepare_dataset
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.teachers import Sampling
from sg_opd_trl.teachers.base import HiddenScores
from sg_opd_trl.teachers.routed import TeachersOfRows, teacher_batch, teacher_prompt_ids

ONE_STEP = ANCHOR | {"max_steps": 1}


SAMPLING = Sampling(max_new_tokens=4, eos_token_ids=(1,), pad_token_id=0)


BATCH = TokenBatch.from_lists([[3, 4], [5], [6]], [[7, 8], [9], [10, 11]], 0, torch.device("cpu"))


class Scripted:
    """A teacher that answers with its own number and remembers what it was asked."""

    def __init__(self, number: int, width: int = 2, heads: int = 1) -> None:
        self.number, self.width, self.heads = number, width, heads
        self.identity = {"name": f"teacher {number}", "fingerprint": f"{number}"}
        self.vocab_size = 20 + number
        self.distillation_modes = frozenset({"sampled_token", f"mode {number}"})
        self.tokens_scored, self.tokens_generated = 10 * number, 100 * number
        self.asked: list[list[bool]] = []
        self.prompts: list[tuple[list[list[int]], int]] = []
        self.released = 0

    def score(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Tensor:
        self.asked.append(rows.tolist())
        return torch.full((len(batch), 2), -float(self.number))

    def score_hidden(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> HiddenScores:
        states = torch.full((len(batch), 2, self.width), float(self.number))
        return HiddenScores(
            self.score(batch, rows, max_tokens), states, torch.full((len(batch),), self.heads - 1, dtype=torch.long)
        )

    def output_heads(self) -> list[str]:
        return [f"head {self.number}.{i}" for i in range(self.heads)]

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int, max_tokens: int) -> list[list[int]]:
        self.prompts.append((prompts, seed))
        return [[self.number, *ids] for ids in prompts]

    def stop_generating(self) -> None:
        self.released += 1


def routed(*teachers: Any) -> RoutedTeacher:
    return RoutedTeacher({f"t{number}": teacher for number, teacher in enumerate(teachers)})


# --- rows to teachers ------------------------------------------------------------------------------------------------
def test_every_teacher_is_asked_for_its_own_rows() -> None:
    teachers = Scripted(1), Scripted(2), Scripted(3)
    scores = routed(*teachers).for_rows(["t2", "t0", "t2"]).score(BATCH, torch.tensor([True, True, False]), 100)
    assert scores[:, 0].tolist() == [-3.0, -1.0, -3.0]
    # The second has no row and is asked all the same: its shards may be on other ranks.
    assert [teacher.asked for teacher in teachers] == [[[False, True, False]], [[False] * 3], [[True, False, False]]]


def test_every_prompt_is_written_by_its_own_teacher() -> None:
    teachers = Scripted(1), Scripted(2), Scripted(3)
    written = routed(*teachers).for_rows(["t2", "t0", "t2"]).generate([[5], [6], [7]], SAMPLING, 4, 100)
    assert written == [[3, 5], [1, 6], [3, 7]]
    assert [[prompts for prompts, _ in teacher.prompts] for teacher in teachers] == [[[[6]]], [[]], [[[5], [7]]]]
    assert len({seed for teacher in teachers for _, seed in teacher.prompts}) == 3


def test_hidden_states_of_several_widths() -> None:
    teachers = Scripted(1, width=3, heads=2), Scripted(2, width=1), Scripted(3, width=2)
    several = routed(*teachers)
    found = several.for_rows(["t1", "t0", "t2"]).score_hidden(BATCH, torch.tensor([True] * 3), 100)
    assert found.hidden_states[:, 0].tolist() == [[2, 0, 0], [1, 1, 1], [3, 3, 0]]
    heads = several.output_heads()
    assert [heads[i] for i in found.heads.tolist()] == ["head 2.0", "head 1.1", "head 3.0"]
    assert found.logps[:, 0].tolist() == [-2.0, -1.0, -3.0]


def test_names_that_share_a_teacher_ask_it_once() -> None:
    shared, other = Scripted(1), Scripted(2)
    teachers = routed(shared, other, shared)
    rows = teachers.for_rows(["t2", "t0", "t1"])
    assert rows.score(BATCH, torch.tensor([True] * 3), 100)[:, 0].tolist() == [-1.0, -1.0, -2.0]
    assert shared.asked == [[True, True, False]]
    assert (teachers.tokens_scored, teachers.tokens_generated) == (30, 300)
    teachers.stop_generating()
    assert (shared.released, other.released) == (1, 1)


def test_what_is_said_of_all_of_them() -> None:
    teachers = routed(Scripted(1), Scripted(2))
    assert teachers.vocab_size == 21
    assert teachers.distillation_modes == {"sampled_token"}
    assert teachers.identity["name"] == {"t0": "teacher 1", "t1": "teacher 2"}
    assert teachers.identity["teachers"]["t1"]["fingerprint"] == "2"
    prints = {routed(Scripted(1), Scripted(other)).identity["fingerprint"] for other in (2, 3)}
    assert len(prints) == 2
    unknown = Scripted(2)
    unknown.identity["fingerprint"] = None
    assert routed(Scripted(1), unknown).identity["fingerprint"] is None


@pytest.mark.parametrize("label", ["t9", None])
def test_a_row_is_never_given_to_another_teacher(label: Any) -> None:
    with pytest.raises(DataError, match=rf"one of the teachers \['t0', 't1'\], got '{label}'"):
        routed(Scripted(1), Scripted(2)).for_rows(["t0", label])


def test_numbers_name_teachers_too() -> None:
    assert RoutedTeacher({"0": Scripted(1), "1": Scripted(2)}).for_rows([1, 0]).owners == [1, 0]


# --- a run ----------------------------------------------------------------------------------------------------------
def labelled(labels: list) -> Dataset:
    return tiny_data().add_column("teacher_id", labels)


def two_models() -> dict[str, Any]:
    return {"math": tiny_model(1), "code": tiny_model(3)}


def test_paths_in_the_configuration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also as JSON, which is what a command line has; a path that two names share is loaded once."""
    first, second = save_pair(tmp_path / "one", 1), save_pair(tmp_path / "two", 3)
    teachers = {"math": first, "code": second, "logic": first}
    assert (
        tiny_config(tmp_path, teacher_model_name_or_path=json.dumps(teachers)).teacher_model_name_or_path == teachers
    )
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl"):
        trainer = tiny_trainer(
            tmp_path,
            settings=ONE_STEP | {"teacher_model_name_or_path": json.dumps(teachers)},
            teacher_model=None,
            teacher_processing_class=None,
            train_dataset=labelled(["math", "code"] * 8),
        )
    assert isinstance(trainer.teacher, RoutedTeacher)
    assert len(trainer.teacher.distinct) == 2
    assert trainer.teacher.teachers["math"] is trainer.teacher.teachers["logic"]
    assert "names the teachers ['logic']" in caplog.text
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "math" in card
    assert "one" in card
    assert str(tmp_path) not in card
    facts = json.loads(json.dumps(trainer.checkpoint_state()))
    assert facts["teacher"]["teachers"]["code"]["name"] == second
    trainer.check_checkpoint_state(facts)
    facts["teacher"]["teachers"]["code"]["fingerprint"] = "another"
    with pytest.raises(SGOPDConfigError, match="The teacher code must be the one of the checkpoint"):
        trainer.check_checkpoint_state(facts)
    del facts["teacher"]["teachers"]["code"]
    with pytest.raises(
        SGOPDConfigError, match=r"got \['teacher code', .*in place of \['teacher logic', 'teacher math"
    ):
        trainer.check_checkpoint_state(facts)


REFUSED: dict[str, tuple[dict, dict, type, list[str]]] = {
    "no column": (
        {},
        {"train_dataset": tiny_data()},
        DataError,
        ["`train_dataset` must have the column `teacher_id`", "one of ['code', 'math']", "Add it"],
    ),
    "unknown names": (
        {},
        {"train_dataset": labelled(["math", "code", "physics", None] * 4)},
        DataError,
        ["got 2 others", "'physics' (4 rows)", "'None' (4 rows)", "['code', 'math']", "never given to another"],
    ),
    "unknown names in a stream": (
        {"teacher_sampling_prompts": "share"},
        {"train_dataset": labelled(["math", "physics"] * 8).to_iterable_dataset()},
        DataError,
        ["'physics' (4 rows)"],
    ),
    "an evaluation that asks the teachers": (
        {"eval_with_teacher": True},
        {"train_dataset": labelled(["math", "code"] * 8), "eval_dataset": tiny_data()},
        DataError,
        ["`eval_dataset` must have the column `teacher_id`"],
    ),
    "columns removed": (
        {"remove_unused_columns": True},
        {"train_dataset": labelled(["math", "code"] * 8)},
        SGOPDConfigError,
        ["`remove_unused_columns` must be False", "every other column would be gone", "Leave it out"],
    ),
    "nobody": ({}, {"teacher_model": {}}, SGOPDConfigError, ["`teacher_model`", "got {}", "Set for example"]),
    "the student among them": (
        {},
        {"train_dataset": labelled(["math", "code"] * 8), "teacher_model": {"math": tiny_model(1), "code": "student"}},
        SGOPDConfigError,
        ["`teacher_model` must be another object than `model`"],
    ),
    "one with other tokens": (
        {},
        {
            "train_dataset": labelled(["math", "code"] * 8),
            "teacher_processing_class": {"math": tiny_tokenizer(), "code": tiny_tokenizer("1023456789+=abcdefgh ")},
        },
        TeacherError,
        ["The teacher code's tokenizer", "'0': 5 and 6"],
    ),
    "a tokenizer for nobody": (
        {},
        {"train_dataset": labelled(["math", "code"] * 8), "teacher_processing_class": {"maths": tiny_tokenizer()}},
        SGOPDConfigError,
        ["`teacher_processing_class`", "got ['maths']", "['code', 'math']"],
    ),
    "loading options without a path": (
        {"teacher_model_init_kwargs": {"dtype": "bfloat16"}},
        {"train_dataset": labelled(["math", "code"] * 8)},
        SGOPDConfigError,
        ["`teacher_model_init_kwargs` must go with a path"],
    ),
    "something else": (
        {},
        {"train_dataset": labelled(["math", "code"] * 8), "teacher_model": {"math": tiny_model(1), "code": 3}},
        SGOPDConfigError,
        ["The teacher code must be a path", "got int without", "'score'"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_construction(tmp_path: Path, name: str) -> None:
    settings, arguments, kind, fragments = REFUSED[name]
    given = {"teacher_model": two_models(), "model": tiny_model(0)} | arguments
    if given["teacher_model"].get("code") == "student":
        given["teacher_model"] = {"math": tiny_model(1), "code": given["model"]}
    with pytest.raises(kind) as caught:
        tiny_trainer(tmp_path, settings=ONE_STEP | settings, **given)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_teacher_of_ones_own_kind(tmp_path: Path) -> None:
    """Whatever has the methods of `Teacher` may teach, beside others or alone."""

    class Flat(LocalTeacher):
        def score(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Tensor:
            return torch.full(batch.completion_ids.shape, -3.0) * batch.completion_mask * rows.unsqueeze(1)

    trainer = tiny_trainer(
        tmp_path,
        settings={"max_steps": 1, "teacher_sampling_enable": False},
        teacher_model={"math": Flat(tiny_model(1)), "code": tiny_model(3)},
        train_dataset=labelled(["math", "code"] * 8),
    )
    seen: list[Tensor] = []
    trainer.on_slices = lambda slices: seen.append(slices[0]) or slices  # type: ignore[func-returns-value]
    trainer.train()
    (batch,) = seen
    flat = (batch["teacher_logps"] == -3.0).any(dim=1)  # type: ignore[call-overload]
    assert flat.sum() == 4


def test_an_empty_batch() -> None:
    teachers = Scripted(1), Scripted(2)
    assert TeachersOfRows(teachers, []).generate([], SAMPLING, 3, 100) == []  # type: ignore[arg-type]
    assert all(len(teacher.prompts) == 1 for teacher in teachers)


# --- a prompt for the teacher alone ----------------------------------------------------------------------------------
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
    with pytest.raises(SGOPDConfigError, match=r"`rollout_func` is not supported.*`teacher_prompt`"):
        tiny_trainer(
            tmp_path,
            settings={"teacher_sampling_enable": False},
            rollout_func=lambda prompts, trainer: {},
            train_dataset=rows([CHAT] * 16),
        )


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
