"""What one rank alone drops and logs is counted on both, and told by the main process."""

import json
from pathlib import Path

import pytest
from two_ranks import launch

from . import two_ranks_script as script

pytestmark = pytest.mark.slow


def test_what_the_second_rank_drops_and_logs_is_known_to_the_first(tmp_path: Path) -> None:
    done = launch(script.__file__, str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    # 2 student prompts at rho 0.6 are 3 teacher prompts: 2 on the first rank and 1 on the second, in each of 2 steps.
    for rank in results["logged"]:
        assert rank == {
            "rollouts": [3.0, 3.0],
            "kept": [2.0, 2.0],
            "tokens": [4.0, 4.0],
            "truncated": [0.0, 0.0],
            "dropped_no_verdict": [1.0, 1.0],
            "dropped_wrong": [0.0, 0.0],
            "abstained": [1.0, 1.0],
        }
    shown = [
        [text for text in rank if "first teacher rollout that the anchor" in text] for rank in results["messages"]
    ]
    assert [len(texts) for texts in shown] == [1, 0], "the main process speaks, once"
    assert "without a verdict" in shown[0][0]
