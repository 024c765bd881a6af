"""What a run leaves behind: the student, its card, and checkpoints that resume exactly or refuse."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import changed_weights, copied_weights, logged, save_pair, tiny_model, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sg_opd_trl import SGOPDConfigError, SGOPDTrainer, TeacherAnchorCallback, __version__
from sg_opd_trl.bookkeeping import compare_checkpoint_facts

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
# Over 4 steps P1 = 2 and P2 = 4: the checkpoint of step 2 is the boundary of the phases.
PHASES = {"teacher_sampling_phase1_end_frac": 0.5, "teacher_sampling_phase2_end_frac": 1.0}


def always_right(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [1.0 if len(completion_ids) == 1 else float(ids[0] % 2) for ids in completion_ids]


def saved(folder: Path, **arguments: Any) -> Any:
    """A finished run with checkpoints after steps 2 and 4."""
    settings = SAVING | PHASES | arguments.pop("settings", {})
    trainer = tiny_trainer(folder, settings=settings, reward_funcs=always_right, **arguments)
    trainer.train()
    return trainer


def test_a_checkpoint_knows_teacher_and_reference(tmp_path: Path) -> None:
    teacher = save_pair(tmp_path / "teacher", 1)
    trainer = saved(tmp_path / "run", teacher_model=teacher, teacher_processing_class=None)
    for step in (2, 4):
        path = tmp_path / "run" / f"checkpoint-{step}" / "sg_opd_state.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        assert state["version"] == __version__
        assert state["teacher"] == trainer.teacher.identity
        assert state["teacher"]["name"] == teacher
        assert len(state["teacher"]["fingerprint"]) == 16
        assert state["reference"]["name"] == "initial student"
        assert state["reference"]["fingerprint"] != state["teacher"]["fingerprint"]


@pytest.mark.parametrize("prompts", ["reserve", "share"])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, prompts: str) -> None:
    settings = {"teacher_sampling_prompts": prompts}
    straight = saved(tmp_path / "run", settings=settings)
    resumed = tiny_trainer(tmp_path / "again", settings=SAVING | PHASES | settings, reward_funcs=always_right)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert changed_weights(resumed.model, copied_weights(straight.model)) == []
    assert logged(straight, "anchor/alpha") == pytest.approx([0.2, 0.2, 0.1, 0.0])
    for name in ("anchor/alpha", "anchor/loss", "gate/consensus", "teacher/kl_k1"):
        assert logged(resumed, name) == logged(straight, name), name


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "run")
    other = tiny_trainer(
        tmp_path / "again", settings=SAVING | PHASES, reward_funcs=always_right, teacher_model=tiny_model(7)
    )
    with pytest.raises(SGOPDConfigError) as caught:
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    message = str(caught.value)
    stored = json.loads((tmp_path / "run" / "checkpoint-2" / "sg_opd_state.json").read_text())["teacher"]
    assert message.startswith("The teacher must be the one of the checkpoint")
    assert stored["fingerprint"] in message
    assert other.teacher.identity["fingerprint"] in message
    assert "Give the original teacher" in message


SERVED = {"name": "teacher", "root": "folder/one", "revision": None, "dtype": "float32", "fingerprint": None}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"name": "other"}, r"got another model \(name 'other', the checkpoint has 'teacher'\)"),
        ({"root": "folder/two"}, "root 'folder/two', the checkpoint has 'folder/one'"),
        ({"root": None}, None),
        ({"revision": "v2"}, None),
        ({"fingerprint": "a" * 16, "name": "other"}, None),
    ],
    ids=["same", "name", "root", "root not told", "revision not told before", "weights that are seen"],
)
@pytest.mark.parametrize("several", [False, True])
def test_another_model_of_a_server_is_refused(changed: dict, said: str | None, several: bool) -> None:
    """Its weights have no fingerprint."""
    before, now = SERVED, SERVED | changed
    if several:
        before, now = {"teachers": {"math": before}}, {"teachers": {"math": now}}
    trainer = SimpleNamespace(teacher=SimpleNamespace(identity=now), reference=None)
    with nullcontext() if said is None else pytest.raises(SGOPDConfigError, match=said):
        compare_checkpoint_facts(trainer, {"teacher": before, "reference": None})


def test_another_reference_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "run", reference_model=tiny_model(2))
    other = tiny_trainer(
        tmp_path / "again", settings=SAVING | PHASES, reward_funcs=always_right, reference_model=tiny_model(3)
    )
    with pytest.raises(SGOPDConfigError, match="The reference must be the one of the checkpoint"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_one_changed_weight_is_another_teacher(tmp_path: Path) -> None:
    """A fine-tuned copy of the teacher, not a stranger."""
    saved(tmp_path / "run")
    tuned = tiny_model(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.01)
    other = tiny_trainer(tmp_path / "again", settings=SAVING | PHASES, reward_funcs=always_right, teacher_model=tuned)
    with pytest.raises(SGOPDConfigError, match="got other weights"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_the_reference_is_the_initial_student_after_resuming_too(tmp_path: Path) -> None:
    """A resumed run starts from the same student, not from the checkpoint's weights, as its reference."""
    student = save_pair(tmp_path / "student", 0)
    first = saved(tmp_path / "run", model=student)
    resumed = tiny_trainer(tmp_path / "again", settings=SAVING | PHASES, model=student, reward_funcs=always_right)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.reference.identity["fingerprint"] == first.reference.identity["fingerprint"]
    assert changed_weights(resumed.model, copied_weights(first.model)) == []


def test_the_callbacks_counts_are_in_the_checkpoint_and_come_back(tmp_path: Path) -> None:
    run = saved(tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
    stored = json.loads(path.read_text(encoding="utf-8"))["stateful_callbacks"]["TeacherAnchorCallback"]
    assert stored["attributes"]["rollouts"] == 2
    assert stored["attributes"]["verified"] == 2
    assert stored["attributes"]["tokens"] == pytest.approx(sum(logged(run, "anchor/tokens")[:2]))
    settings = SAVING | PHASES | {"restore_callback_states_from_checkpoint": True}
    resumed = tiny_trainer(tmp_path / "again", settings=settings, reward_funcs=always_right)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    (callback,) = [c for c in resumed.callback_handler.callbacks if isinstance(c, TeacherAnchorCallback)]
    # alpha is 0 in step 4: three rollouts in all
    assert (callback.rollouts, callback.verified) == (3, 3)
    assert changed_weights(resumed.model, copied_weights(run.model)) == []


def test_the_student_loads_as_any_model(tmp_path: Path) -> None:
    trainer = saved(tmp_path / "run")
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "run" / "checkpoint-4", tmp_path / "final"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert changed_weights(loaded, copied_weights(trainer.model)) == []
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == trainer.processing_class.get_vocab()


def test_the_card_says_who_taught(tmp_path: Path) -> None:
    teacher, student = save_pair(tmp_path / "big-teacher", 1), save_pair(tmp_path / "small-student", 0)
    saved(tmp_path / "my-run", model=student, teacher_model=teacher, teacher_processing_class=None)
    card = (tmp_path / "my-run" / "README.md").read_text(encoding="utf-8")
    assert "None" not in card
    assert "big-teacher" in card
    assert "small-student" in card
    assert "my-run" in card
    assert "2606.09304" in card
    for tag in ("trl", "grpo", "sg-opd", "distillation"):
        assert f"- {tag}\n" in card


def test_the_card_of_models_without_a_name(tmp_path: Path) -> None:
    saved(tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "None" not in card
    assert str(tmp_path) not in card


def test_the_card_takes_a_name_a_data_set_and_tags(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.create_model_card(model_name="my-student", dataset_name="some/data", tags="arithmetic")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "my-student" in card
    assert "some/data" in card
    assert "- arithmetic\n" in card


def test_names_of_the_trainer() -> None:
    assert SGOPDTrainer._tag_names == ["trl", "grpo", "sg-opd", "distillation"]
    assert SGOPDTrainer._name == "SG-OPD"
    assert SGOPDTrainer._paper["id"] == "2606.09304"
    assert "2606.09304" in SGOPDTrainer._paper["citation"]


def test_tags_reach_the_saved_model(tmp_path: Path) -> None:
    assert set(SGOPDTrainer._tag_names) <= set(tiny_trainer(tmp_path).model.model_tags)
