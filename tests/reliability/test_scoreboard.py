"""The scoreboard fails a run that is not what the page says."""

import pytest
from reliability.scoreboard import FIGURES, Scoreboard, faults

REPORT = {"location": ("", 0, ""), "keywords": {}, "longrepr": None, "when": "call"}


class Session:
    exitstatus = pytest.ExitCode.OK


def filled(outcome: str = "passed", cases: int = 60) -> Scoreboard:
    """A run in which every test that a figure or a fault names came out alike."""
    board = Scoreboard()
    tests = {test for figure in FIGURES.values() for test in figure.tests}
    for test in tests | {test for named in faults().values() for test in named}:
        name = test if "::" in test else f"{test}::test_all"
        for case in range(cases):
            board.pytest_runtest_logreport(
                pytest.TestReport(nodeid=f"{name}[{case}]", outcome=outcome, **REPORT)  # type: ignore[arg-type]
            )
    return board


def status(board: Scoreboard) -> pytest.ExitCode:
    session = Session()
    board.pytest_sessionfinish(session, pytest.ExitCode.OK)  # type: ignore[arg-type]
    return session.exitstatus


def test_a_run_in_which_all_passed_passes() -> None:
    board = filled()
    assert {number: row["failed"] for number, row in board.figures().items() if row["failed"]} == {}
    assert set(board.figures()) == set(range(1, 17))
    assert status(board) == pytest.ExitCode.OK


@pytest.mark.parametrize("board", [filled("skipped"), filled("failed"), filled(cases=1), Scoreboard()])
def test_a_run_in_which_some_were_skipped_or_too_few_fails(board: Scoreboard) -> None:
    assert status(board) == pytest.ExitCode.TESTS_FAILED


def test_one_case_that_failed_is_named() -> None:
    board, name = filled(), f"{FIGURES[12].tests[0]}::test_all[7]"
    board.pytest_runtest_logreport(
        pytest.TestReport(nodeid=name, outcome="failed", **REPORT)  # type: ignore[arg-type]
    )
    assert board.figures()[12]["failed"] == [name]
    assert status(board) == pytest.ExitCode.TESTS_FAILED
