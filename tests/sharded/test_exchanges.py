"""Ranks that exchange different things end in seconds, and say what each was at."""

import time
from pathlib import Path

import pytest

from sharded.launches import COLLECTIVE_PATIENCE, launch_ranks, pytestmark

__all__ = ["pytestmark"]


@pytest.mark.parametrize("kind", ["fsdp2"])
def test_ranks_that_do_not_agree_on_forwards_end_in_seconds(kind: str, tmp_path: Path) -> None:
    """One rank of a sharded teacher runs a forward more: what held every recipe up before ranks agreed beforehand."""
    start = time.monotonic()
    script = str(Path(__file__).with_name("disagreeing_script.py"))
    done = launch_ranks(kind, script, str(tmp_path), "models write", timeout=4 * COLLECTIVE_PATIENCE)
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"Rank {rank} in 'models write' began last: ['gloo:" in done.stderr, done.stderr[-4000:]
    assert "Every rank has begun" in done.stdout
    assert time.monotonic() - start < 3 * COLLECTIVE_PATIENCE  # a start among them
