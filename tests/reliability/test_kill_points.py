"""SIGKILL at twelve points inside the writing of a checkpoint: the same call goes on, to the same student."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import PATIENCE, ROOT, python_path

POINTS = 12


@pytest.mark.slow
def test_a_killed_writer_loses_nothing(tmp_path: Path) -> None:
    script = str(ROOT / "tests" / "reliability" / "kill_points_script.py")
    # One thread: forks of a process with several would wait for threads that they do not have.
    environment = os.environ | {"PYTHONPATH": python_path(ROOT, ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, str(tmp_path), str(POINTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == POINTS
    for outcome in outcomes:
        assert outcome["killed"], outcome
        assert outcome["same student"], outcome
        # A whole one is there whenever the process dies: the one before, or the new one.
        assert {"checkpoint-2", "checkpoint-4"} & set(outcome["left"]), outcome
    assert any("checkpoint-in-progress" in outcome["left"] for outcome in outcomes)
