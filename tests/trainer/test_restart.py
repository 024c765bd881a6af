"""A run owns its folder, and the same `train(resume_from_checkpoint=True)` starts, goes on, and has finished."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from test_folder_lock import end, holder
from tiny import changed_weights, copied_weights, logged, tiny_data, tiny_model, tiny_trainer
from transformers import TrainerCallback

from sg_opd_trl import SGOPDConfigError

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


class Stop(TrainerCallback):
    """Ends the process's run as an interruption does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer_in(folder: Path, *, callbacks: list | None = None, **settings: Any) -> Any:
    return tiny_trainer(folder, settings=SAVING | settings, callbacks=callbacks)


def interrupted(folder: Path, step: int = 3, **settings: Any) -> Any:
    """A run that was ended after some steps."""
    trainer = trainer_in(folder, callbacks=[Stop(step)], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=True)
    return trainer


def newest(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def run_file(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_one_call_starts_goes_on_and_has_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = trainer_in(tmp_path / "whole")
    whole.train()
    folder = tmp_path / "run"
    interrupted(folder)
    assert (run_file(folder)["state"], run_file(folder)["steps"]) == ("stopped", 3)
    second = trainer_in(folder)
    second.train(resume_from_checkpoint=True)
    assert run_file(folder)["state"] == "finished"
    assert changed_weights(second.model, copied_weights(whole.model)) == []
    assert logged(second, "loss") == logged(whole, "loss")
    # The third has nothing to do. What a script saves after it is the finished student.
    third = trainer_in(folder)
    third.add_callback(Stop(3))
    third.train(resume_from_checkpoint=True)
    assert "has finished" in caplog.text
    assert third.state.global_step == 4
    assert changed_weights(third.model, copied_weights(whole.model)) == []
    assert run_file(folder) == run_file(tmp_path / "whole") | {"steps": 4}


def test_the_last_step_is_not_taken_twice(tmp_path: Path) -> None:
    """Killed between the last checkpoint and the end: transformers would train one more step."""
    first = trainer_in(tmp_path)
    first.train()
    again = trainer_in(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 4
    assert changed_weights(again.model, copied_weights(first.model)) == []


def test_a_finished_student_without_checkpoints_is_loaded(tmp_path: Path) -> None:
    first = trainer_in(tmp_path, save_strategy="no")
    first.train(resume_from_checkpoint=True)
    first.save_model(str(tmp_path))
    again = trainer_in(tmp_path, save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert changed_weights(again.model, copied_weights(first.model)) == []


def test_the_configuration_may_ask_for_it(tmp_path: Path) -> None:
    interrupted(tmp_path)
    second = trainer_in(tmp_path, resume_from_checkpoint=True)
    second.train()
    assert [entry["step"] for entry in second.state.log_history if "loss" in entry] == [1, 2, 3, 4]


# --- whose a folder is -----------------------------------------------------------------------------------------------
def test_another_run_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    trainer_in(tmp_path).train()
    before = sorted(tmp_path.rglob("*"))
    other = trainer_in(tmp_path, seed=7)
    with pytest.raises(SGOPDConfigError) as caught:
        other.train()
    for part in (str(tmp_path), "checkpoint-4", "has finished", "resume_from_checkpoint", "overwrite_output_dir"):
        assert part in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SGOPDConfigError, match="`seed` 7 in place of 42"):
        other.train(resume_from_checkpoint=True)


def test_overwriting_leaves_nothing_of_the_other(tmp_path: Path) -> None:
    trainer_in(tmp_path).train()
    trainer_in(tmp_path, seed=7, overwrite_output_dir=True, max_steps=2).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert run_file(tmp_path)["identity"]["seed"] == 7
    with pytest.raises(SGOPDConfigError, match="overwrite_output_dir=True"):
        trainer_in(tmp_path, overwrite_output_dir=True, resume_from_checkpoint="true")


def test_a_folder_in_which_nothing_was_saved_is_free(tmp_path: Path) -> None:
    for seed in (1, 2):
        trainer_in(tmp_path, save_strategy="no", seed=seed).train()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_same_trainer_goes_on_owning_its_folder(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=2)
    trainer.train()
    trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert run_file(tmp_path)["state"] == "finished"


def test_two_at_once_cannot_mix(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(SGOPDConfigError, match=f"process {process.pid} on"):
            trainer_in(tmp_path).train()
    finally:
        end(process, signal.SIGKILL)
    trainer_in(tmp_path, max_steps=1).train()


def test_a_checkpoint_of_another_folder_does_not_open_a_used_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        trainer_in(tmp_path / name, max_steps=2).train()
    with pytest.raises(SGOPDConfigError, match="`output_dir` must be a folder without another run"):
        trainer_in(tmp_path / "b", max_steps=2).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_what_cannot_be_gone_on_from_is_not_replaced_unasked(tmp_path: Path) -> None:
    """Nothing says whose the folder is, and its checkpoints are damaged."""
    interrupted(tmp_path)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").unlink()
    trainer_in(tmp_path, save_strategy="no").train(resume_from_checkpoint=True)  # its own: there is nothing to lose
    (tmp_path / "run.json").unlink()
    with pytest.raises(SGOPDConfigError, match="Nothing there can be gone on from"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)


# --- what goes on is the same run ------------------------------------------------------------------------------------
def test_a_change_is_refused_before_a_step_unless_it_is_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path)
    with pytest.raises(SGOPDConfigError, match=r"`learning_rate` 0.1 in place of 0.01 in .*checkpoint-3"):
        trainer_in(tmp_path, learning_rate=0.1).train(resume_from_checkpoint=True)
    allowed = trainer_in(tmp_path, learning_rate=0.1, allow_changed=["learning_rate"])
    allowed.train(resume_from_checkpoint=True)
    assert "`learning_rate` 0.1 in place of 0.01" in caplog.text
    assert allowed.state.global_step == 4


def test_more_steps_are_another_run_unless_they_are_allowed(tmp_path: Path) -> None:
    trainer_in(tmp_path, max_steps=2).train()
    with pytest.raises(SGOPDConfigError, match="`max_steps` 4 in place of 2"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)
    longer = trainer_in(tmp_path, allow_changed=["max_steps"])
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 4


def test_other_data_are_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    other = tiny_trainer(tmp_path, settings=SAVING, train_dataset=tiny_data(15))
    with pytest.raises(SGOPDConfigError, match="`train_dataset`"):
        other.train(resume_from_checkpoint=True)


def test_another_teacher_is_refused_by_its_weights(tmp_path: Path) -> None:
    interrupted(tmp_path)
    other = tiny_trainer(tmp_path, settings=SAVING, teacher_model=tiny_model(7))
    with pytest.raises(SGOPDConfigError, match="The teacher must be the one of the checkpoint"):
        other.train(resume_from_checkpoint=True)


def test_checkpoints_of_before_are_taken_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(tmp_path)
    path = newest(tmp_path) / "sg_opd_state.json"
    state = json.loads(path.read_text())
    del state["identity"]
    path.write_text(json.dumps(state))
    (newest(tmp_path) / "manifest.json").unlink()
    (tmp_path / "run.json").unlink()
    second = trainer_in(tmp_path)
    second.train(resume_from_checkpoint=True)
    assert "does not say which run it is of" in caplog.text
    assert second.state.global_step == 4
