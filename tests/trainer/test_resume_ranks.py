"""Two ranks, killed or with one that fails inside a generation batch, go on by the same command, bit for bit."""

import json
from pathlib import Path

import pytest
from two_ranks import launch

from sg_opd_trl import SGOPDConfigError
from sg_opd_trl.trl_seam import ROLLOUTS_FILE

from . import resume_ranks_script as script

pytestmark = pytest.mark.slow


def test_two_killed_ranks_and_one_that_failed_go_on_by_the_same_command(tmp_path: Path) -> None:
    command = script.__file__, str(tmp_path)
    killed = launch(*command)
    assert "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr[-4000:]
    cut = tmp_path / "cut"
    assert json.loads((cut / "run.json").read_text(encoding="utf-8"))["state"] == "running"
    assert sorted(path.name for path in cut.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    # Each rank's own part of the batch that is in use.
    assert all((cut / "checkpoint-6" / ROLLOUTS_FILE.format(rank)).is_file() for rank in (0, 1))

    # On another number of ranks it would be another run.
    with pytest.raises(SGOPDConfigError, match=r"`world_size` 1 in place of 2.*allow_changed: \[world_size\]"):
        script.build(cut).train()

    resumed = launch(*command)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert json.loads((cut / "run.json").read_text(encoding="utf-8"))["state"] == "finished"
