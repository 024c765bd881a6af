"""What is under way at a teacher server while the student works, and what is not begun early."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import (
    inject_rollouts,
    logged,
    parity_verifier,
    tiny_data,
    tiny_trainer,
)

from sg_opd_trl import ServerTeacher, SGOPDTrainer, TeacherAnchorCallback
from sg_opd_trl.models import generate as decoding
from sg_opd_trl.prefetch import scores_every_rollout
from teachers.fake_server import FakeServer
from teachers.http_cases import under_way, wait_until
from teachers.overlap_cases import (
    ROLLOUTS,
    ROWS,
    AtTheFirstGradient,
    Finished,
    Gate,
    Written,
    scoring,
    writing,
)


@pytest.fixture(autouse=True)
def nothing_is_under_way_any_more(server: FakeServer) -> Iterator[None]:
    yield
    wait_until(lambda: not under_way() and not server.at_a_time)


def test_the_teacher_writes_for_the_next_step_while_the_student_works(tmp_path: Path, server: FakeServer) -> None:
    gate = Gate(server)
    # They have come before the student's rollouts are judged, and are answered after its gradient only.
    verifier = Written(lambda: wait_until(lambda: len(writing(server)) >= 2 * ROLLOUTS))
    run = Finished(
        tmp_path, server, ServerTeacher, verifier=verifier, callbacks=[AtTheFirstGradient(gate.opened.set)]
    ).train()
    assert gate.in_time == [True] * ROLLOUTS
    assert len(run.recorder.steps) == 2


def test_scores_find_a_place_among_rollouts_that_take_long(tmp_path: Path, server: FakeServer) -> None:
    gate = Gate(server)
    Finished(
        *(tmp_path, server, ServerTeacher),
        limits={"timeout": 120.0, "concurrency": 2},
        callbacks=[AtTheFirstGradient(gate.opened.set)],
    ).train()
    assert gate.in_time and all(gate.in_time)
    assert server.most_at_a_time <= 2


def test_a_row_is_scored_while_others_are_written(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, known = decoding._LiveRows.everything, []

    def last(rows: Any) -> Any:
        wait_until(lambda: len(scoring(server)) > 0)
        known.append(len(scoring(server)))
        return finish(rows)

    monkeypatch.setattr(decoding._LiveRows, "everything", last)
    # And those that became too long, before anybody judges them.
    verifier = Written(lambda: wait_until(lambda: len(scoring(server)) == ROWS))
    settings = {"max_steps": 1, "max_completion_length": 24}
    Finished(tmp_path, server, ServerTeacher, verifier=verifier, settings=settings).train()
    assert known[-1] >= 1
    assert len(scoring(server)) == ROWS


def test_rollouts_from_elsewhere_are_scored_while_they_are_judged(tmp_path: Path, server: FakeServer) -> None:
    """vLLM, or the loop of `generate`."""
    verifier = Written(lambda: wait_until(lambda: len(scoring(server)) == ROWS))

    def write(trainer: Any) -> None:
        inject_rollouts(trainer, lambda prompt, row: [5 + row, 7, 9][: 1 + row % 3])

    Finished(tmp_path, server, ServerTeacher, verifier=verifier, prepare=write, settings={"max_steps": 1}).train()
    assert len(scoring(server)) == ROWS


class PartlyScored(SGOPDTrainer):
    def score_with_teacher(self, batch: Any, rows: Any, inputs: dict) -> Any:
        return super().score_with_teacher(batch, rows & (torch.arange(len(rows)) < 3), inputs)


def partly_scored(folder: Path, **given: Any) -> Any:
    return tiny_trainer(folder, trainer_class=PartlyScored, **given)


@pytest.mark.parametrize(
    ("settings", "build", "asked"),
    [({"wrong_rollout_advantage": 0.0}, tiny_trainer, None), ({}, partly_scored, 3)],
    ids=["by verdict", "a subclass decides"],
)
def test_no_score_is_asked_ahead_that_may_not_be_used(
    tmp_path: Path, server: FakeServer, settings: dict, build: Any, asked: int | None
) -> None:
    known: list[int] = []
    verifier = Written(lambda: known.append(len(scoring(server))))
    given = {"verifier": verifier, "build": build, "settings": settings | {"max_steps": 1}}
    Finished(tmp_path, server, ServerTeacher, **given).train()
    assert known == [0]
    assert 0 < len(scoring(server)) == (asked or sum(parity_verifier([], verifier.calls[-1])))


@pytest.mark.parametrize(("with_teacher", "asked"), [(False, 0), (True, 8)])
def test_in_evaluation(tmp_path: Path, server: FakeServer, with_teacher: bool, asked: int) -> None:
    arrived = Written(lambda: wait_until(lambda: len(scoring(server)) == asked))
    settings = {"eval_with_teacher": with_teacher, "per_device_eval_batch_size": 8, "num_generations_eval": 4}
    run = Finished(
        *(tmp_path, server, ServerTeacher),
        verifier=arrived,
        settings=settings,
        eval_dataset=tiny_data().select([0, 1]),
    )
    run.trainer.evaluate()
    assert len(arrived.calls) == 1
    assert len(scoring(server)) == asked


def test_where_a_rollout_may_go_on_after_it_has_ended_nothing_is_scored_ahead() -> None:
    usual = {"mode": "train", "tools": [], "rollout_func": None, "environment_factories": None}
    usual |= {"teacher": ServerTeacher("http://a"), "token_weights": SimpleNamespace(all_taught=True)}
    for changes, expected in [
        ({}, True),
        ({"tools": [len]}, False),
        ({"rollout_func": len}, False),
        ({"environment_factories": {None: len}}, False),
        ({"mode": "eval"}, False),
        ({"token_weights": SimpleNamespace(all_taught=False)}, False),
        ({"teacher": object()}, False),
    ]:
        trainer: Any = SimpleNamespace(args=SimpleNamespace(eval_with_teacher=False), **(usual | changes))
        assert scores_every_rollout(trainer) is expected, changes


def test_prompts_of_the_students_batch_are_not_known_ahead(tmp_path: Path, server: FakeServer) -> None:
    known: list[int] = []
    verifier = Written(lambda: known.append(len(writing(server))))
    Finished(
        *(tmp_path, server, ServerTeacher), verifier=verifier, settings={"teacher_sampling_prompts": "share"}
    ).train()
    assert known == [0, ROLLOUTS]


def test_nothing_is_written_for_a_step_without_an_anchor(tmp_path: Path, server: FakeServer) -> None:
    phases = {"teacher_sampling_phase1_end_frac": 0.34, "teacher_sampling_phase2_end_frac": 0.34, "max_steps": 3}
    run = Finished(tmp_path, server, ServerTeacher, settings=phases).train()
    assert logged(run.trainer, "anchor/alpha") == [0.2, 0.0, 0.0]
    assert len(writing(server)) == ROLLOUTS


class Constant(TeacherAnchorCallback):
    def alpha(self, *_: Any) -> float:
        return 0.2


def test_nothing_is_written_for_a_step_after_the_last(tmp_path: Path, server: FakeServer) -> None:
    Finished(tmp_path, server, ServerTeacher, callbacks=[Constant()]).train()
    assert len(writing(server)) == 2 * ROLLOUTS
