"""The scoreboard of docs/reliability.md: fifteen figures, each passed of all, with the name of what failed.

    python tests/reliability/scoreboard.py [words for pytest]
    python -m pytest -m "not full" --scoreboard

The first runs the tests that the figures name, the second all, and both print the scoreboard. A skipped test counts
as failed, and so does a figure of which less is there than there should be. The status is 0 if every figure has its
target.
"""

import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass

import pytest
from repository import ROOT, read

PAGE = "docs/reliability.md"
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
_FAULT = re.compile(r"^\| (\d+) \| .*$", re.MULTILINE)


@dataclass(frozen=True)
class Figure:
    """One row of the scoreboard.

    Attributes:
        name: what is counted.
        tests: files, or `file::function`, all of whose cases count.
        least: how many cases there must be at least; all of them have to pass.
    """

    name: str
    tests: tuple[str, ...]
    least: int


FIGURES = {
    1: Figure(
        "resumed runs that are the uninterrupted run",
        (
            "tests/trainer/test_exact_resume.py::test_a_resumed_run_is_the_uninterrupted_run",
            "tests/trainer/test_checkpoint.py::test_a_resumed_run_is_the_uninterrupted_run",
        ),
        10,
    ),
    2: Figure(
        "kills inside a checkpoint",
        (
            "tests/test_checkpoints.py::test_a_process_that_is_killed_leaves_the_checkpoints_that_were_there",
            "tests/reliability/test_kill_points.py",
        ),
        7,
    ),
    3: Figure(
        "damages that are found",
        ("tests/test_checkpoints.py::test_a_damaged_checkpoint_is_passed_over_and_refused",),
        7,
    ),
    4: Figure(
        "changes that are refused",
        ("tests/test_run_identity.py::test_other_mathematics_is_an_error_that_names_it",),
        8,
    ),
    # 5 is the page's own table.
    6: Figure("faults of a served teacher", ("tests/teachers/test_http_faults.py",), 13),
    7: Figure(
        "outages that cost nothing",
        (
            "tests/trainer/test_last_step.py::test_the_run_goes_on_from_its_last_finished_step",
            "tests/teachers/test_server.py::test_a_server_restarted_during_a_run_loses_nothing",
        ),
        3,
    ),
    8: Figure(
        "values that are not finite", ("tests/trainer/test_bad_batch.py", "tests/trainer/test_skipped_steps.py"), 4
    ),
    9: Figure(
        "two ranks",
        (
            "tests/trainer/test_ranks.py",
            "tests/trainer/test_distributed.py::test_ranks_run_and_exchange_the_same_in_the_same_order",
            "tests/trainer/test_resume_ranks.py",
        ),
        4,
    ),
    10: Figure(
        "float32 parity",
        ("tests/models/test_generate.py::test_greedy_equals_one_row_at_a_time", "tests/teachers/test_parity.py"),
        4,
    ),
    11: Figure(
        "signs under another padding",
        (
            "tests/models/test_half_precision.py::test_training_and_scoring_agree",
            "tests/test_noise.py::test_in_bfloat16_the_gate_reads_hardly_any_noise",
            "tests/test_noise.py::test_the_default_is_above_the_noise_of_float32",
        ),
        3,
    ),
    12: Figure("float64 reference", ("tests/trainer/test_gradient_oracle.py",), 6),
    13: Figure(
        "accumulation and ranks",
        (
            "tests/trainer/test_invariances.py::test_accumulation_gives_the_same_update",
            "tests/trainer/test_distributed.py::test_the_gradient_is_that_of_one_process",
        ),
        2,
    ),
    14: Figure(
        "secrets and payloads",
        (
            "tests/verifiers/test_judge.py::test_payloads_leave_no_file",
            "tests/verifiers/test_judge.py::test_child_cannot_write_and_sees_no_secret",
            "tests/reliability/test_refused.py",
            "tests/test_scrubbing.py",
            "tests/cli/test_output.py",
            "tests/cli/test_push.py::test_what_arrives_is_whole_and_holds_no_token",
            "tests/cli/test_push.py::test_no_token_is_shown_or_left_behind",
        ),
        4,
    ),
    15: Figure("answers that hang a verifier", ("tests/verifiers/test_pathological.py",), 3),
}


def faults() -> dict[int, tuple[str, ...]]:
    """The tests of every fault of the page."""
    rows = {int(row[1]): row[0] for row in _FAULT.finditer(read(PAGE))}
    return {
        number: tuple("::".join(filter(None, found)) for found in _TEST.findall(row))
        for number, row in rows.items()
        if _TEST.search(row)
    }


class Scoreboard:
    """What became of every test, by its name without the case; printed at the end of a run."""

    def __init__(self) -> None:
        self.cases: dict[str, dict[str, bool]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Passed only if all of its parts are; a skipped one is not."""
        test = report.nodeid.split("[")[0]
        before = self.cases[test].get(report.nodeid, True)
        self.cases[test][report.nodeid] = before and report.passed

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """A figure without its target fails the run."""
        if exitstatus == pytest.ExitCode.OK and any(row["failed"] for row in self.figures().values()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the figures."""
        lines = ["", "| # | figure | passed |", "|---|---|---|"]
        for number, row in self.figures().items():
            lines.append(f"| {number} | {row['figure']} | {row['passed']}/{row['total']} |")
            lines.extend(f"  failed: {name}" for name in row["failed"])
        terminalreporter.write("\n".join(lines) + "\n\n")

    def figures(self) -> dict[int, dict]:
        """All of them, in their order."""
        scored = {number: score(figure, self.of(figure.tests)) for number, figure in FIGURES.items()}
        held = {number: self.of(tests) for number, tests in faults().items()}
        by_fault = {f"fault {number}": all(cases.values()) for number, cases in held.items() if number <= 44}
        scored[5] = score(Figure("faults 1 to 44", (), 44), by_fault)
        rest = {f"fault {number}": all(cases.values()) for number, cases in held.items() if number > 44}
        scored[16] = score(Figure("faults 45 to 58", (), 14), rest)
        return dict(sorted(scored.items()))

    def of(self, tests: tuple[str, ...]) -> dict[str, bool]:
        """The cases of some tests; one that did not run at all is a failure under its own name."""
        found = {}
        for test in tests:
            cases = {
                case: passed
                for name, of_test in self.cases.items()
                if name == test or name.startswith(f"{test}::")
                for case, passed in of_test.items()
            }
            found.update(cases or {f"{test} did not run": False})
        return found


def score(figure: Figure, cases: dict[str, bool]) -> dict:
    failed = sorted(case for case, passed in cases.items() if not passed)
    if len(cases) < figure.least:
        failed.append(f"{len(cases)} cases, at least {figure.least} are expected")
    return {"figure": figure.name, "passed": sum(cases.values()), "total": len(cases), "failed": failed}


def main(words: list[str]) -> int:
    named = {test for figure in FIGURES.values() for test in figure.tests}
    named |= {test for tests in faults().values() for test in tests}
    # A file and a function of it would run that one twice.
    whole = {test for test in named if "::" not in test}
    tests = sorted(whole | {test for test in named if test.split("::")[0] not in whole})
    os.chdir(ROOT)
    return pytest.main(["-q", "-m", "not full", "-p", "no:cacheprovider", "--scoreboard", *tests, *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
