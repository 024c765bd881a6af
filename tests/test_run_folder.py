"""What the folder of a run says to several processes, and to those who only look."""

import json
from pathlib import Path

import pytest
from repository import ROOT
from test_folder_lock import end, holder
from tiny import tiny_config
from two_ranks import launch

from sg_opd_trl import SGOPDConfigError
from sg_opd_trl.run_folder import has_student, read_resume, refuse_used, step_of


def test_what_resume_asks_for() -> None:
    words = ["true", "True", True, "false", None, "", False]
    assert [read_resume(word) for word in words] == [True, True, True, False, False, False, False]
    assert (
        read_resume("outputs/checkpoint-2")
        == read_resume(Path("outputs/checkpoint-2"))
        == Path("outputs/checkpoint-2")
    )
    assert [step_of(Path(name)) for name in ("a/checkpoint-12", "checkpoint-in-progress", "student")] == [12, -1, -1]


@pytest.mark.parametrize(
    ("files", "used"),
    [
        ([], False),
        (["run.json", "README.md", "teacher_rollouts.jsonl", "checkpoint-in-progress/checkpoint-2/a"], False),
        (["checkpoint-2/trainer_state.json"], True),
        (["config.json", "model.safetensors"], True),
        (["model-00001-of-00002.safetensors"], True),
        (["adapter_model.safetensors"], True),
    ],
)
def test_what_is_used(tmp_path: Path, files: list[str], used: bool) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    if not used:
        refuse_used(tmp_path)
        return
    assert has_student(tmp_path) is ("checkpoint" not in files[0])
    with pytest.raises(SGOPDConfigError, match="of another run"):
        refuse_used(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"state": "stopped"}))
    with pytest.raises(SGOPDConfigError, match="of a run that stopped"):
        refuse_used(tmp_path)


def test_every_machine_that_saves_for_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SGOPDConfigError, match="`save_on_each_node=True` is not supported: all machines share"):
        tiny_config(tmp_path, save_on_each_node=True)


def said(*words: str) -> list[str]:
    """What two ranks say, in their order."""
    done = launch(str(ROOT / "tests" / "run_folder_script.py"), *words)
    assert done.returncode == 0, done.stderr
    return sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))


@pytest.mark.slow
def test_ranks_start_and_are_refused_together(tmp_path: Path) -> None:
    assert said(str(tmp_path), "true", "0.1") == [f"rank {rank}: starts from None" for rank in (0, 1)]
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "finished"
    process = holder(tmp_path)
    try:
        lines = said(str(tmp_path), "false", "0.1")
    finally:
        end(process)
    assert [f"process {process.pid} on" in line for line in lines] == [True, True]
    (tmp_path / "model.safetensors").write_text("")
    assert ["of a run that has finished" in line for line in said(str(tmp_path), "false", "0.1")] == [True, True]


@pytest.mark.slow
def test_ranks_with_another_disk_or_another_run_are_refused_together(tmp_path: Path) -> None:
    """As on machines that share no disk, or have another copy of a recipe and other weights under a name."""
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    lines = said(f"{here},{there}", "true", "0.1", here, "true", "0.1,0.2")
    for rank, (other_run, other_disk) in enumerate((lines[:2], lines[2:])):
        assert other_disk.startswith(f"rank {rank}: `output_dir` must be a folder that all machines of a run share")
        assert other_run.startswith(f"rank {rank}: All processes of a run must have the same settings")
        assert "rank 1 on" in other_run
        assert "`learning_rate` 0.2 in place of 0.1; `teacher (its weights)` '0.2' in place of '0.1'" in other_run
    assert list(tmp_path.rglob("_*")) == []  # neither lock nor mark
