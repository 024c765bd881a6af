from collections.abc import Callable
from typing import Any

import pytest

from sg_opd_trl.tasks import arithmetic, chains
from sg_opd_trl.tasks.models import build_tokenizer
from sg_opd_trl.tasks.problems import Task, is_correct
from sg_opd_trl.tasks.settings import DataSettings

TASKS = pytest.mark.parametrize("task", [arithmetic.TASK, chains.TASK], ids=lambda task: task.name)
SMALL = DataSettings(num_train=30, num_validation=5, num_test=10, num_tune=8)


def test_is_correct_looks_at_the_last_boxed_number() -> None:
    assert is_correct(r"5+5 \boxed{9} \boxed{10}", "10")
    assert not is_correct(r"\boxed{10} \boxed{9}", "10")
    assert not is_correct("10", "10")
    assert not is_correct(r"\boxed{10", "10")
    assert not is_correct(r"\boxed{010}", "10")


@TASKS
@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"num_tune": 3}, ("train", "validation", "test")),
        ({"num_train": 7}, ("validation", "test")),
        ({"num_validation": 2}, ("test",)),
    ],
)
def test_a_splits_size_leaves_those_drawn_before_it(task: Task[Any], change: dict[str, int], same: tuple[str]) -> None:
    before, after = task.draw_splits(SMALL), task.draw_splits(DataSettings(**{**vars(SMALL), **change}))
    assert all(getattr(before, name) == getattr(after, name) for name in same)
    assert task.draw_splits(SMALL) == before
    assert task.draw_splits(DataSettings(**{**vars(SMALL), "seed": 1})).tune != before.tune


@TASKS
def test_the_tuning_problems_avoid_all_others(task: Task[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = task.draw_splits(SMALL)
    # A generator that first offers what has been taken: every one of them must be passed over.
    used = [*drawn.train, *drawn.validation, *drawn.test]
    offered = iter([*used, *drawn.tune])
    real: Callable[..., Any] = task.draw_problem
    draws = {"count": 0}

    def offer(generator: Any) -> Any:
        draws["count"] += 1
        return real(generator) if draws["count"] <= len(used) else next(offered)

    monkeypatch.setattr(task, "draw_problem", offer)
    again = task.draw_splits(SMALL)
    assert again.train == drawn.train
    assert again.tune == drawn.tune
    assert next(offered, None) is None


@TASKS
def test_all_questions_of_a_task_have_one_length(task: Task[Any]) -> None:
    tokenizer, splits = build_tokenizer(), task.draw_splits(SMALL)
    lengths = {len(tokenizer(problem.question)["input_ids"]) for problem in (*splits.train, *splits.test)}
    assert len(lengths) == 1
