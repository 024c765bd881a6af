import io

import pytest
from rich.console import Console

from sg_opd_trl.study.execution import Failure
from sg_opd_trl.study.progress import StudyProgress, Timing, show_seconds, steps_done
from sg_opd_trl.study.results import LOG

from .fakes import evaluation, jobs, study


def test_the_time_left_comes_from_the_same_run_first():
    opd, gated, other_opd, *rest = jobs(study("/out"))
    timing = Timing()
    assert timing.time_left([gated], {}, 1) is None
    timing.add(opd, 10.0)
    assert timing.expected(gated) == 10.0
    timing.add(gated, 30.0)
    assert (timing.expected(other_opd), timing.expected(rest[0])) == (10.0, 30.0)
    # 10 + 30 waiting, 30 - 12 still running
    assert timing.time_left([other_opd, rest[0]], {gated: 12.0}, 1) == pytest.approx(58.0)
    # half of it would be 29: never less than the longest job
    assert timing.time_left([other_opd, rest[0]], {gated: 12.0}, 2) == pytest.approx(30.0)
    assert timing.time_left([], {gated: 99.0}, 1) == 0.0


def test_a_line_per_job_says_what_how_far_and_how_long():
    text = io.StringIO()
    found = jobs(study("/out"))
    with StudyProgress(Console(file=text, width=200), 3, 1, Timing()) as progress:
        progress.later = [found[2]]
        progress.done(found[0], {"evaluation": evaluation(0.604), "wall_seconds": 52.0}, [found[1]], [])
        progress.failed(Failure(found[1], "exit status 1: Error: no"))
        progress.tick([], [])
    first, second = text.getvalue().splitlines()
    assert first == "1/3 opd, seed 0: avg@8 60.4 in 52 s; about 2 min left"
    assert second.startswith("2/3 gated, seed 0: FAILED, exit status 1: Error: no (log: ")
    assert second.endswith("/log.txt)")


def test_the_newest_progress_bar_of_the_log_counts(tmp_path):
    assert steps_done(tmp_path) == ""
    bars = b"\rDistilling:  39%|###  | 39/100 [00:01<00:02]\rDistilling: 40%|# | 40/100 [00:02"
    (tmp_path / LOG).write_bytes(b"x" * 9000 + bars)
    assert steps_done(tmp_path) == "40/100"


@pytest.mark.parametrize(("seconds", "shown"), [(52.3, "52 s"), (720, "12 min"), (11_100, "3 h 05 min")])
def test_times_are_short(seconds, shown):
    assert show_seconds(seconds) == shown
