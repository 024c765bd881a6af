"""Two ranks write a baseline's checkpoints together, end together, and go on together."""

import json
from typing import Any

import pytest
import two_ranks
import two_ranks_script
from any_baseline import METHODS
from baseline_pair import Pair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("two")
    done = two_ranks.launch(two_ranks_script.__file__, str(output), pair.student, pair.teacher)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", METHODS)
def test_both_write_their_part_of_a_checkpoint(results: dict[str, Any], method: str) -> None:
    found = results[method]
    assert found["whole"] == {"checkpoint-4": None, "checkpoint-2": None}
    assert {"rng_state_0.pth", "rng_state_1.pth", "manifest.json", "optimizer.pt"} < set(found["files"])
    assert found["left"] == []


@pytest.mark.parametrize("method", METHODS)
def test_an_error_of_one_ends_both_and_they_keep_and_go_on_from_the_last_step(
    results: dict[str, Any], method: str
) -> None:
    found = results[method]
    first, second = found["ends"]
    assert second == {"kind": "RuntimeError", "text": "nobody expected that"}
    assert first["kind"] == "RankError"
    assert "Rank 1 has ended the run, in or after step 4, by RuntimeError: nobody expected that" in first["text"]
    assert found["kept"] == {"checkpoint-3": None, "checkpoint-2": None}
    assert found["same"] == [True, True]
