"""One command starts, goes on after a kill, and leaves a finished student alone; a used folder is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from repository import PATIENCE, ROOT, python_path
from test_folder_lock import end, holder
from tiny import same_saved_student
from two_ranks import FLAGS

from sg_opd_trl.checkpoints import check_checkpoint
from sg_opd_trl.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:.*trl.experimental.*")

#: Judges by the number of tokens, and kills its process in the step that a variable names.
REWARD = """
import os, signal

def reward(completion_ids, trainer_state=None, **kwargs):
    step = -1 if trainer_state is None else trainer_state.global_step
    if str(step) == os.environ.get("KILL_IN_STEP"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(ids) % 2) for ids in completion_ids]
"""
SAVING = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4", "--resume_from_checkpoint", "true")

#: The launcher of both ranks is killed, as by a system that is out of memory, while they train.
LAUNCHERS_END = """
import os, signal

def reward(completion_ids, trainer_state=None, **kwargs):
    step = -1 if trainer_state is None else trainer_state.global_step
    with open(os.environ["RANKS"], "a") as file:
        print(os.getpid(), file=file)
    if str(step) == os.environ.get("KILL_IN_STEP") and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGKILL)
    return [float(len(ids) % 2) for ids in completion_ids]
"""


def words_of(recipe: Path, folder: Path, *more: str) -> list[str]:
    return ["train", "--config", str(recipe), "--output_dir", str(folder), *SAVING, *more]


def facts(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def without_teacher(recipe: Path) -> Path:
    lines = [line for line in recipe.read_text(encoding="utf-8").splitlines() if not line.startswith("teacher_")]
    recipe.write_text("\n".join(lines), encoding="utf-8")
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sg_opd", "grpo"])
def test_the_same_command_three_times(
    method: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "killing_reward.py").write_text(REWARD, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tiny_recipe if method == "sg_opd" else without_teacher(tiny_recipe)
    own = ("--method", method, "--reward_funcs", "killing_reward.reward")
    words, folder = words_of(recipe, tmp_path / "run", *own), tmp_path / "run"

    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]),
        "KILL_IN_STEP": "3",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "sg_opd_trl.cli", *words]
    killed = subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert facts(folder)["state"] == "running"
    assert [path.name for path in folder.glob("checkpoint-*[0-9]")] == ["checkpoint-2"]

    assert main(words) == 0
    assert (facts(folder)["state"], facts(folder)["steps"]) == ("finished", 4)
    assert main(words_of(recipe, tmp_path / "whole", *own)) == 0
    assert same_saved_student(folder, tmp_path / "whole")
    ignored = {"seconds": 0}
    assert facts(folder) | ignored == facts(tmp_path / "whole") | ignored

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert main(words) == 0
    assert f"The run in {folder} has finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_keep_their_last_step(tiny_recipe: Path, tmp_path: Path) -> None:
    """They have sessions of their own: what kills the launcher's group leaves them, and the folder is theirs."""
    (tmp_path / "launchers_end.py").write_text(LAUNCHERS_END, encoding="utf-8")
    own = (*FLAGS, "--reward_funcs", "launchers_end.reward", "--per_device_train_batch_size", "4")
    ranks, folder = tmp_path / "ranks", tmp_path / "run"
    environment = os.environ | {
        "PYTHONPATH": python_path(ROOT, tmp_path),
        "KILL_IN_STEP": "2",
        "RANKS": str(ranks),
        "OMP_NUM_THREADS": "1",
    }

    def run(into: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sg_opd_trl.cli", *words_of(tiny_recipe, into, "--max_steps", "300", *own)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)

    killed = run(folder)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    numbers = set(ranks.read_text(encoding="utf-8").split())
    assert len(numbers) == 2
    left = [process for process in psutil.process_iter() if str(process.pid) in numbers]
    assert psutil.wait_procs(left, timeout=PATIENCE)[1] == []
    steps = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert 2 < steps < 300
    check_checkpoint(folder / f"checkpoint-{steps}")
    assert facts(folder)["state"] == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sg_opd", "sft", "gkd"])
def test_killed_between_the_last_step_and_the_end(method: str, tiny_recipe: Path, tmp_path: Path) -> None:
    """transformers would train one more step, and the student would be another one."""
    if method == "gkd":
        text = tiny_recipe.read_text(encoding="utf-8").replace("max_completion_length", "max_new_tokens")
        tiny_recipe.write_text(text, encoding="utf-8")
    own = {"sft": ("--teacher_sampling_filter_correct", "false")}.get(method, ())
    words = words_of(tiny_recipe, tmp_path / "run", "--method", method, *own)
    assert main(words) == 0
    (tmp_path / "run" / "model.safetensors").rename(tmp_path / "model.safetensors")
    state = facts(tmp_path / "run") | {"state": "running"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(state), encoding="utf-8")
    assert main(words) == 0
    again = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "model.safetensors").read_bytes()
    assert facts(tmp_path / "run")["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sg_opd", "grpo"])
def test_a_used_folder_is_refused_before_anything_is_loaded(
    method: str, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe if method == "sg_opd" else without_teacher(tiny_recipe)
    words = ["train", "--config", str(recipe), "--method", method, "--max_steps", "1"]
    assert main(words) == 0
    folder = tmp_path / "student"
    weights = (folder / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("sg_opd_trl.cli.train.load_data", lambda *_: pytest.fail("loaded"))
        for more, said in (
            ([], ["`output_dir`", "has finished", "overwrite_output_dir"]),
            (["--resume_from_checkpoint", "true", "--seed", "5"], ["`seed` 5 in place of 42", "allow_changed"]),
            (["--resume_from_checkpoint", "true", "--overwrite_output_dir"], ["overwrite_output_dir"]),
        ):
            assert main([*words, *more]) == 2
            error = capsys.readouterr().err
            assert [part for part in said if part not in " ".join(error.split())] == []
        assert (folder / "model.safetensors").read_bytes() == weights
        process = holder(folder)
        try:
            assert main([*words, "--overwrite_output_dir", "true"]) == 2
            assert f"process {process.pid} on" in capsys.readouterr().err
        finally:
            end(process)
    assert main([*words, "--overwrite_output_dir", "true", "--seed", "5"]) == 0
    assert facts(folder)["identity"]["seed"] == 5
