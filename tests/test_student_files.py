"""Killed at every moment of its saving, a student is the old one, the new one, or refused."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_pair, tiny_trainer

from sg_opd_trl import CheckpointError
from sg_opd_trl.checkpoints import MANIFEST
from sg_opd_trl.evaluation import evaluate_model
from sg_opd_trl.run_folder import has_student
from sg_opd_trl.student_files import STUDENT_ASIDE, check_student, written_aside

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def save(folder: Path, files: dict[str, str]) -> None:
    with written_aside(folder, 0, own=True) as aside:
        for name, content in files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_text(content, encoding="utf-8")


NEW = {"config.json": "new", "model-00001.safetensors": "new", "model.safetensors.index.json": "new", "part/x": "new"}


def killed_at(folder: Path, operation: int) -> bool:
    """Save in a fork that is killed before its N-th file operation; whether there was one."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in OPERATIONS and str(folder) in str(arguments[0]):
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(count)
        save(folder, NEW)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_whenever_it_is_killed_nobody_takes_a_mixture_for_a_student(tmp_path: Path) -> None:
    outcomes = []
    for operation in range(100):
        folder = tmp_path / str(operation)
        save(folder, dict.fromkeys(NEW, "old"))
        if not killed_at(folder, operation):
            break
        there = {(folder / name).read_text(encoding="utf-8") for name in NEW}
        try:
            check_student(folder)
            assert len(there) == 1, f"a mixture is taken for a student after {operation} operations"
            outcomes.append(there.pop())
        except CheckpointError:
            assert not has_student(folder)
            outcomes.append("refused")
        # Whatever is there, saving again puts it right.
        save(folder, NEW)
        check_student(folder)
        assert {(folder / name).read_text(encoding="utf-8") for name in NEW} == {"new"}
    assert set(outcomes) == {"old", "refused", "new"}
    assert len(outcomes) > 20


def test_the_trainer_saves_so_and_leaves_nothing_aside(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings={"max_steps": 1, "teacher_sampling_enable": False})
    trainer.train()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        trainer.save_model(str(folder))
        saved = load_file(folder / "model.safetensors")
        assert all(torch.equal(saved[name], weight) for name, weight in trainer.model.named_parameters())
        assert (folder / "tokenizer.json").is_file()
        assert not (folder / STUDENT_ASIDE).exists()


def half(folder: Path) -> Path:
    """A student of which the weights are still to come."""
    save_pair(folder, 0)
    (folder / STUDENT_ASIDE).mkdir()
    (folder / "model.safetensors").rename(folder / STUDENT_ASIDE / "model.safetensors")
    (folder / STUDENT_ASIDE / MANIFEST).write_text(json.dumps({"files": ["model.safetensors"]}), encoding="utf-8")
    return folder


def test_a_half_one_is_refused_wherever_it_is_loaded(tmp_path: Path) -> None:
    folder = str(half(tmp_path / "student"))
    said = r"is not whole.*\['model.safetensors'\] were in their place.*resume_from_checkpoint: true"
    with pytest.raises(CheckpointError, match=said):
        evaluate_model(folder, None, [{"prompt": "1+1=", "solution": "2"}])
    with pytest.raises(CheckpointError, match=said):
        tiny_trainer(tmp_path / "run", model=folder)
    with pytest.raises(CheckpointError, match=said):
        tiny_trainer(tmp_path / "run", teacher_model=folder, teacher_processing_class=None)


def test_a_full_disk_leaves_the_student_that_was_there(tmp_path: Path) -> None:
    save(tmp_path, {"model.safetensors": "old"})
    with pytest.raises(CheckpointError, match="full"), written_aside(tmp_path, 0, own=True):
        raise OSError(28, "No space left on device")
    assert (tmp_path / "model.safetensors").read_text(encoding="utf-8") == "old"
    assert not (tmp_path / STUDENT_ASIDE).exists()
