"""A run has one anchor, the caller's or the default, and goes on with it when it is resumed."""

from pathlib import Path
from typing import Any

import pytest
from tiny import ANCHOR, logged, tiny_trainer

from sg_opd_trl import SGOPDConfigError, TeacherAnchorCallback

OFF = {"teacher_sampling_enable": False}
SAVED = ANCHOR | {"save_strategy": "steps", "save_steps": 1}
LONGER = {"allow_changed": ["max_steps"]}


class Fixed(TeacherAnchorCallback):
    """An anchor of constant weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def alpha(self, args: Any, step: int, total_steps: int) -> float:
        return self.weight


class Default(Fixed):
    """The same with a default."""

    def __init__(self, weight: float = 0.05) -> None:
        super().__init__(weight)


def anchors(trainer: Any) -> list[Any]:
    return [one for one in trainer.callback_handler.callbacks if isinstance(one, TeacherAnchorCallback)]


def count_calls(trainer: Any) -> list[int]:
    """Prompts of every call of the teacher's `generate`, once the trainer has run."""
    calls, generate = [], trainer.teacher.generate

    def counted(prompts: list, *rest: Any, **options: Any) -> list:
        calls.append(len(prompts))
        return generate(prompts, *rest, **options)

    trainer.teacher.generate = counted
    return calls


@pytest.mark.parametrize("added", [False, True])
def test_a_subclass_takes_the_place_of_the_default(tmp_path: Path, added: bool) -> None:
    own = Fixed(0.05)
    trainer = tiny_trainer(tmp_path, settings=ANCHOR, callbacks=None if added else [own])
    if added:
        trainer.add_callback(own)
    assert anchors(trainer) == [own]
    calls = count_calls(trainer)
    trainer.train()
    assert calls == [1, 1]
    assert logged(trainer, "anchor/alpha") == [0.05, 0.05]
    assert logged(trainer, "anchor/rollouts") == [1, 1]


def test_a_class_takes_it_too(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=ANCHOR)
    trainer.add_callback(Default)
    assert [type(one) for one in anchors(trainer)] == [Default]


def test_two_are_refused_by_name(tmp_path: Path) -> None:
    message = r"must have one TeacherAnchorCallback, got \['Fixed', 'Default'\].*remove_callback"
    with pytest.raises(SGOPDConfigError, match=message):
        tiny_trainer(tmp_path, settings=ANCHOR, callbacks=[Fixed(0.1), Default])
    trainer = tiny_trainer(tmp_path, settings=ANCHOR, callbacks=[Fixed(0.1)])
    with pytest.raises(SGOPDConfigError, match=message):
        trainer.add_callback(Default())
    # Around the trainer's own methods.
    trainer.callback_handler.add_callback(Default())
    with pytest.raises(SGOPDConfigError, match=message):
        trainer.train()


def test_one_can_be_taken_for_another(tmp_path: Path) -> None:
    first, second = Fixed(0.1), Fixed(0.2)
    trainer = tiny_trainer(tmp_path, settings=ANCHOR, callbacks=[first])
    assert trainer.pop_callback(Fixed) is first
    trainer.add_callback(second)
    trainer.train()
    assert logged(trainer, "anchor/alpha") == [0.2, 0.2]


def test_none_is_taken_with_teacher_sampling_off(tmp_path: Path) -> None:
    message = "teacher_sampling_enable=False, got one"
    with pytest.raises(SGOPDConfigError, match=message):
        tiny_trainer(tmp_path, settings=OFF, callbacks=[Fixed(0.1)])
    trainer = tiny_trainer(tmp_path, settings=OFF)
    with pytest.raises(SGOPDConfigError, match=message):
        trainer.add_callback(Fixed(0.1))
    assert anchors(trainer) == []


def test_nothing_is_left_of_an_anchor_that_is_removed(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=ANCHOR)
    trainer.train()
    trainer.anchor = object()
    trainer.remove_callback(TeacherAnchorCallback)
    assert trainer.anchor is None
    trainer.train()
    assert len(logged(trainer, "loss")) == 2
    assert logged(trainer, "anchor/alpha") == []


# --- resumed ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [Fixed, Default])
@pytest.mark.parametrize("restored", [False, True])
def test_a_resumed_run_goes_on_with_the_callers_instance(tmp_path: Path, kind: type[Fixed], restored: bool) -> None:
    first = kind(0.3)
    trainer = tiny_trainer(tmp_path, settings=SAVED, callbacks=[first])
    trainer.train()
    settings = SAVED | LONGER | {"max_steps": 3, "restore_callback_states_from_checkpoint": restored}
    second = kind(0.3)
    resumed = tiny_trainer(tmp_path, settings=settings, callbacks=[second])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert anchors(resumed) == [second]
    assert logged(resumed, "anchor/alpha") == [0.3, 0.3, 0.3]
    # One rollout a step; those of the first run count on, and are counted in the next checkpoint.
    assert (first.rollouts, second.rollouts) == (2, 3)
    assert second.verified >= first.verified
    assert second.tokens >= first.tokens
    again = tiny_trainer(tmp_path, settings=SAVED | LONGER | {"max_steps": 4}, callbacks=[kind(0.3)])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert anchors(again)[0].rollouts == 4


def test_what_a_subclass_exports_is_restored_where_transformers_restores(tmp_path: Path) -> None:
    class Marked(Fixed):
        mark = "none"

        def state(self) -> dict:
            state = super().state()
            return state | {"attributes": state["attributes"] | {"mark": self.mark}}

    first, second = Marked(0.3), Marked(0.3)
    first.mark = "first"
    tiny_trainer(tmp_path, settings=SAVED, callbacks=[first]).train()
    settings = SAVED | LONGER | {"max_steps": 3, "restore_callback_states_from_checkpoint": True}
    tiny_trainer(tmp_path, settings=settings, callbacks=[second]).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert (second.mark, second.rollouts) == ("first", 3)


def test_the_counters_are_those_of_one_run(tmp_path: Path) -> None:
    shared = Fixed(0.1)
    tiny_trainer(tmp_path / "first", settings=ANCHOR, callbacks=[shared]).train()
    assert shared.rollouts == 2
    second = tiny_trainer(tmp_path / "second", settings=ANCHOR, callbacks=[shared])
    second.train()
    assert shared.rollouts == 2
    second.train()
    assert shared.rollouts == 2
