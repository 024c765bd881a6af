"""Checkpoints are whole or not there: killed at every point, damaged in every file, on a full disk."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from repository import ROOT
from tiny import changed_weights, copied_weights, tiny_trainer
from transformers import Trainer

from sg_opd_trl import SGOPDTrainer, checkpoints, trl_seam
from sg_opd_trl.checkpoints import MANIFEST, check_checkpoint, checkpoints_of, find_problem, newest_whole_checkpoint
from sg_opd_trl.errors import CheckpointError

SETTINGS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "teacher_sampling_enable": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    tiny_trainer(folder, settings=SETTINGS).train()
    return folder


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "weights are truncated": ("model.safetensors", truncate, "has .* bytes in place of"),
    "a weight is flipped": ("model.safetensors", flip_a_bit, "the content of model.safetensors is not what"),
    "no weights": ("model.safetensors", Path.unlink, "is missing"),
    "no optimizer": ("optimizer.pt", Path.unlink, "is missing"),
    "no random state": ("rng_state.pth", Path.unlink, "is missing"),
    "no state of ours": ("sg_opd_state.json", Path.unlink, "is missing"),
    "the trainer's state is truncated": ("trainer_state.json", truncate, "has .* bytes in place of"),
    "the manifest is truncated": (MANIFEST, truncate, "cannot be read"),
}


def test_the_manifest_lists_every_file(written: Path) -> None:
    newest = written / "checkpoint-2"
    listed = json.loads((newest / MANIFEST).read_text(encoding="utf-8"))["files"]
    assert set(listed) == {path.name for path in newest.iterdir()} - {MANIFEST}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "sg_opd_state.json"} < set(listed)
    assert find_problem(newest) is None
    assert checkpoints_of(written) == [newest, written / "checkpoint-1"]
    assert not (written / checkpoints.ASIDE).exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_refused(
    run: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    name, act, said = DAMAGES[damage]
    act(run / "checkpoint-2" / name)
    with pytest.raises(CheckpointError, match=rf"checkpoint-2.*{name if 'content' not in said else ''}.*{said}"):
        check_checkpoint(run / "checkpoint-2")
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl.checkpoints"):
        assert newest_whole_checkpoint(run) == run / "checkpoint-1"
    assert name in caplog.text
    assert "passed over" in caplog.text


def test_a_run_does_not_go_on_from_a_damaged_one(run: Path) -> None:
    flip_a_bit(run / "checkpoint-1" / "optimizer.pt")
    trainer = tiny_trainer(run.parent / "again", settings=SETTINGS)
    before = copied_weights(trainer.model)
    with pytest.raises(CheckpointError, match=r"the content of optimizer\.pt is not what was written"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert changed_weights(trainer.model, before) == []


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"])
def test_without_a_manifest_the_parts_are_looked_for(run: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """As an older version or TRL itself has written it."""
    (run / "checkpoint-2" / MANIFEST).unlink()
    check_checkpoint(run / "checkpoint-2")
    assert "cannot be told" in caplog.text
    (run / "checkpoint-2" / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        check_checkpoint(run / "checkpoint-2")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="there is no such folder"):
        check_checkpoint(tmp_path / "checkpoint-1")


# --- killed ----------------------------------------------------------------------------------------------------------
class Killed(BaseException):
    """What no code of the run catches."""


def kill(*_: Any, **__: Any) -> NoReturn:
    raise Killed


POINTS = {
    "before anything": (Trainer, "save_model"),
    "after the weights": (Trainer, "_save_optimizer_and_scheduler"),
    "after the optimizer": (Trainer, "_save_rng_state"),
    "before our state": (SGOPDTrainer, "checkpoint_state"),
    "before the manifest": (checkpoints, "_digests"),
    "before the renaming": (Path, "rename"),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_process_that_is_killed_leaves_the_checkpoints_that_were_there(
    run: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    (run / "checkpoint-2").rename(run / "checkpoint-1-other")
    trainer = tiny_trainer(run, settings=SETTINGS)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*POINTS[point], kill)
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert checkpoints_of(run) == [run / "checkpoint-1"]
    assert newest_whole_checkpoint(run) == run / "checkpoint-1"
    # What was left aside is in nobody's way.
    tiny_trainer(run, settings=SETTINGS).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert newest_whole_checkpoint(run) == run / "checkpoint-2"
    assert not (run / checkpoints.ASIDE).exists()


# --- a full disk -----------------------------------------------------------------------------------------------------
def test_without_room_nothing_is_begun(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "free_space", lambda folder: 1000)
    (run / "checkpoint-2").rename(run / "checkpoint-1-other")
    said = r"room for a checkpoint of about \d+ MiB, got .*run, whose disk is full: 0 MiB"
    with pytest.raises(CheckpointError, match=said):
        tiny_trainer(run, settings=SETTINGS).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert newest_whole_checkpoint(run) == run / "checkpoint-1"


FULL = """
import resource, sys
from pathlib import Path
from tiny import tiny_trainer
settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "teacher_sampling_enable": False}
trainer = tiny_trainer(Path(sys.argv[1]), settings=settings)
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [20_000, 150_000], ids=["weights", "optimizer"])
def test_a_disk_that_is_full_in_the_middle(tmp_path: Path, limit: int) -> None:
    """The system refuses to write on, as a full disk does; each library has its own words for that."""
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "run"), str(limit)],
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
        check=False,
    )
    assert result.returncode == 1
    assert "CheckpointError: `output_dir` must have room for a checkpoint of about" in result.stderr
    assert checkpoints_of(tmp_path / "run") == []
    assert not (tmp_path / "run" / checkpoints.ASIDE).exists()


# --- what transformers keeps about checkpoints -----------------------------------------------------------------------
def test_older_checkpoints_go_once_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    complete = trl_seam.complete

    def watched(aside: Path, place: Path) -> None:
        seen.append([path.name for path in checkpoints_of(tmp_path)])
        complete(aside, place)

    monkeypatch.setattr(trl_seam, "complete", watched)
    tiny_trainer(tmp_path, settings=SETTINGS | {"max_steps": 3, "save_total_limit": 1}).train()
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"]]
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-3"]


def test_the_best_checkpoint_is_named_by_its_place(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_reward"}
    from tiny import tiny_data

    trainer = tiny_trainer(
        tmp_path,
        settings=SETTINGS | settings | {"greater_is_better": True, "per_device_eval_batch_size": 4},
        eval_dataset=tiny_data(2),
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert Path(best).parent == tmp_path
    for checkpoint in checkpoints_of(tmp_path):
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        assert Path(state["best_model_checkpoint"]).parent == tmp_path
        assert find_problem(checkpoint) is None


def test_a_checkpoint_is_pushed_from_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []

    def push(self: Any, folder: str) -> None:
        pushed.append((folder, find_problem(Path(folder))))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = tiny_trainer(tmp_path, settings=SETTINGS | {"max_steps": 1})
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [(str(tmp_path / "checkpoint-1"), None)]


def test_a_checkpoint_of_the_model_alone_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    """Transformers would begin with a new optimizer and other random numbers, without a word."""
    tiny_trainer(tmp_path, settings=SETTINGS | {"max_steps": 1, "save_only_model": True}).train()
    with pytest.raises(CheckpointError, match=r"holds the model alone \(save_only_model\)"):
        check_checkpoint(tmp_path / "checkpoint-1")
