"""Several teachers: every row goes to its own, every teacher is asked, and what a run needs is checked beforehand."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import ANCHOR, save_pair, tiny_config, tiny_data, tiny_model, tiny_tokenizer, tiny_trainer
from torch import Tensor

from sg_opd_trl import DataError, LocalTeacher, RoutedTeacher, SGOPDConfigError, TeacherError
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.teachers import Sampling
from sg_opd_trl.teachers.base import HiddenScores
from sg_opd_trl.teachers.routed import TeachersOfRows

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
        ["`remove_unused_columns=True`", "`teacher_id`", "Leave the setting out"],
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
