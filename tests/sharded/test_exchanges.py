"""Ranks that exchange different things end in seconds, and say what each was at."""

from pathlib import Path

from sharded.launches import launch_ranks, pytestmark

__all__ = ["pytestmark"]


def test_ranks_that_do_not_agree_on_forwards_end_in_seconds(tmp_path: Path) -> None:
    """One rank of a sharded teacher runs a forward more: what held every recipe up before ranks agreed beforehand."""
    script = str(Path(__file__).with_name("disagreeing_script.py"))
    done = launch_ranks("fsdp2", script, str(tmp_path), "models write", timeout=200)
    assert done.returncode != 0
    assert "Every rank has begun" in done.stdout
    for rank in (0, 1):
        assert f"Rank {rank} in 'models write' began last: ['gloo:" in done.stderr, done.stderr[-4000:]
