"""The built-in task as it is shipped."""

from pathlib import Path

import pytest
from repository import ROOT

from sg_opd_trl.cli.check import check


@pytest.mark.slow
def test_the_built_in_task_is_green_in_half_a_minute(shipped_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SG_OPD_CACHE", str(shipped_cache))
    words = ["--config", str(ROOT / "recipes" / "arithmetic" / "sg_opd.yaml")]
    check(words, 0)  # the models are made on first use
    report = check(words, 4)
    assert [str(row) for row in report.rows if row.state != "green"] == []
    # Ten times what a quiet machine takes.
    assert report.seconds < 90
