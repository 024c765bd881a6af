"""What runs, how far it is and how long it will take."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .execution import Failure, Running
from .plan import Job
from .results import LOG

# tqdm's `| 40/100 [`; in bytes, because the end of a log may begin in the middle of a character.
_STEPS = re.compile(rb"\|\s*(\d+/\d+)\s*\[")
_TAIL_BYTES = 4096


class Timing:
    """Wall seconds of finished jobs, and from them the time left.

    A job is taken to last as long as the mean of finished ones of the same kind and name, of the same kind where there
    are none, of all jobs where there are none of these either.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = {}

    def add(self, job: Job, seconds: float) -> None:
        """Remember a finished job."""
        self.seconds.setdefault((job.kind, job.name), []).append(seconds)

    def expected(self, job: Job) -> float | None:
        """Seconds a job will take; None while nothing has finished."""
        same_kind = [value for (kind, _), values in self.seconds.items() if kind == job.kind for value in values]
        everything = [value for values in self.seconds.values() for value in values]
        known = self.seconds.get((job.kind, job.name)) or same_kind or everything
        return fmean(known) if known else None

    def time_left(self, waiting: Iterable[Job], running: Mapping[Job, float], at_once: int) -> float | None:
        """Seconds until all is done.

        Args:
            waiting: jobs that have not started.
            running: job -> seconds it has run.
            at_once: processes at a time.

        Returns:
            The estimate; None while nothing has finished.
        """
        if not self.seconds:
            return None
        # At best the work is spread evenly; but no earlier than the longest single job can end.
        left = [max(0.0, (self.expected(job) or 0.0) - elapsed) for job, elapsed in running.items()]
        left += [self.expected(job) or 0.0 for job in waiting]
        return max(sum(left) / max(1, min(at_once, len(left))), *left, 0.0)


class StudyProgress:
    """A line for every job that ends, and on a terminal a bar with what runs now.

    Args:
        console: to write to.
        total: jobs to be done now.
        at_once: processes at a time.
        timing: seconds of jobs that finished earlier.

    Attributes:
        later: jobs of a coming stage, which count for the time left.
    """

    def __init__(self, console: Console, total: int, at_once: int, timing: Timing) -> None:
        self.console, self.total, self.at_once, self.timing, self.ended = console, total, at_once, timing, 0
        self.later: list[Job] = []
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.task = self.bar.add_task("starting", total=total)

    def __enter__(self) -> "StudyProgress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()

    def tick(self, waiting: Iterable[Job], running: Iterable[Running]) -> None:
        """Show what runs and the time left."""
        if self.console.is_terminal:
            current = "; ".join(" ".join((item.job.label, steps_done(item.job.folder))).strip() for item in running)
            left = self._left(waiting, running)
            self.bar.update(self.task, completed=self.ended, description=f"{left} · {current}")

    def done(self, job: Job, result: Mapping[str, Any], waiting: Iterable[Job], running: Iterable[Running]) -> None:
        """A line with the job's accuracy, its time, and the time left."""
        self.ended += 1
        self.timing.add(job, result["wall_seconds"])
        evaluation = result["evaluation"]
        average, without = evaluation["avg_at_k"], evaluation.get("abstained", 0)
        score = f"avg@{evaluation['num_samples']} " + ("no verdict" if average is None else f"{100 * average:.1f}")
        score += f", {without} without a verdict" if without and average is not None else ""
        left = self._left(waiting, running)
        self._say(f"{self.ended}/{self.total} {job.label}: {score} in {show_seconds(result['wall_seconds'])}; {left}")

    def failed(self, failure: Failure) -> None:
        """A line with the reason and the log."""
        self.ended += 1
        log = failure.job.folder / LOG
        self._say(f"{self.ended}/{self.total} {failure.job.label}: FAILED, {failure.reason} (log: {log})")

    def _left(self, waiting: Iterable[Job], running: Iterable[Running]) -> str:
        left = self.timing.time_left(
            [*waiting, *self.later], {item.job: item.elapsed for item in running}, self.at_once
        )
        return "time left not known yet" if left is None else f"about {show_seconds(left)} left"

    def _say(self, text: str) -> None:
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def steps_done(folder: Path) -> str:
    """The `40/100` of the newest progress bar in a job's log; empty where there is none."""
    try:
        with (folder / LOG).open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - _TAIL_BYTES))
            found = _STEPS.findall(log.read())
    except OSError:
        return ""
    return found[-1].decode() if found else ""


def show_seconds(seconds: float) -> str:
    """`52 s`, `12 min` or `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
