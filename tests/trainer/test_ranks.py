"""An error of one rank ends both, with its words, and leaves the last finished step."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from two_ranks import launch

from sg_opd_trl.checkpoints import check_checkpoint
from sg_opd_trl.errors import RankError
from sg_opd_trl.ranks import naming_the_gone

from . import ranks_script as script

pytestmark = pytest.mark.slow

#: Seconds in which every rank has ended.
A_MINUTE = 60
KINDS = {
    "the verifier raises": "ZeroDivisionError",
    "the verifier leaves": "SystemExit",
    "the verifier has no memory": "MemoryError",
    "the verifier of teacher rollouts": "ZeroDivisionError",
    "the teacher does not write": "RuntimeError",
    "the teacher does not score": "RuntimeError",
    "the rollouts": "RuntimeError",
    "the gate of a subclass": "IndexError",
    "the data": "KeyError",
    "a callback": "OSError",
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank ended with, by case; all in the same two processes, which so are still together after each."""
    output = tmp_path_factory.mktemp("ranks") / "results.json"
    done = launch(script.__file__, "cases", str(output))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", script.CASES)
def test_an_error_of_one_rank_ends_both_with_its_words(case: str, both: list[dict]) -> None:
    first, second = (rank[case] for rank in both)
    assert second["kind"] == KINDS[case]
    assert first["kind"] == "RankError"
    assert f"Rank 1 has ended the run, in or after step 3, by {KINDS[case]}: {second['text']}" in first["text"]
    assert max(first["seconds"], second["seconds"]) < A_MINUTE
    assert first["steps"] == second["steps"] == script.STEPS


@pytest.mark.parametrize("case", script.CASES)
def test_the_last_finished_step_is_kept_by_both_together(case: str, both: list[dict]) -> None:
    # A callback of the caller's fails before the end of the step is known to be whole.
    kept = [] if case == "a callback" else [f"checkpoint-{script.STEPS}"]
    for rank in both:
        assert rank[case]["kept"] == kept
        assert rank[case]["problem"] == [None] * len(kept)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_on_one_rank_leaves_what_was_there(rank: int, both: list[dict]) -> None:
    case = f"the disk of rank {rank}"
    failed, other = both[rank][case], both[1 - rank][case]
    assert failed["kind"] == "CheckpointError"
    assert other["kind"] == "RankError"
    assert "`output_dir` must have room for a checkpoint" in other["text"]
    assert failed["text"] in other["text"]
    for each in (failed, other):
        assert each["kept"] == ["checkpoint-1"]
        assert each["problem"] == [None]
        assert each["left_over"] == []


def test_a_rank_that_is_killed_ends_the_other(tmp_path: Path) -> None:
    done = launch(script.__file__, "killed", str(tmp_path), timeout=A_MINUTE + 60)
    assert done.returncode != 0
    # On a machine with too much to do the launcher may be faster than the rank that is left.
    noticed = "RankError: Another rank has gone without a word in step 3" in done.stderr
    assert noticed or "closing signal SIGTERM" in done.stderr, done.stderr[-4000:]
    assert "Signal 9 (SIGKILL)" in done.stderr
    check_checkpoint(tmp_path / f"checkpoint-{script.STEPS}")


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:49201"


@pytest.mark.parametrize(
    ("error", "processes", "named"),
    [
        (RuntimeError(GLOO), 2, True),
        (torch.distributed.DistBackendError("NCCL error"), 2, True),
        (RuntimeError(GLOO), 1, False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 2, False),
        (RankError("Rank 1 has ended the run", kind="a test", told=True), 2, False),
    ],
)
def test_a_rank_that_is_gone_in_the_middle_of_an_exchange_is_named(
    error: RuntimeError, processes: int, named: bool
) -> None:
    """What the exchange itself raises: a rank may be killed after it has said that it is well."""
    run: Any = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=processes), state=SimpleNamespace(global_step=2)
    )
    with pytest.raises(RuntimeError) as caught, naming_the_gone(run):
        raise error
    if named:
        assert isinstance(caught.value, RankError)
        assert "Another rank has gone without a word in step 3" in str(caught.value)
        assert caught.value.__cause__ is error
    else:
        assert caught.value is error
