"""Jobs as child processes, several at a time; none of them outlives the study."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .plan import Job
from .results import LOG, finish, last_line, prepare, record_failure, secret_settings

CHILD = "sg_opd_trl.cli.study_child"
SECRETS_VARIABLE = "SG_OPD_STUDY_SECRETS"
"""Has the settings of a job that hold secrets, for its process alone: they are not in the recipe in its folder."""
_POLL_SECONDS = 0.3  # jobs take minutes; the bar looks alive
_GRACE_SECONDS = 5.0  # as the child's own


@dataclass(frozen=True)
class Failure:
    """A job that ended without a result, and why."""

    job: Job
    reason: str


@dataclass
class Running:
    """A job whose process runs."""

    job: Job
    process: "subprocess.Popen[bytes]"
    started: float

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


class Watcher(Protocol):
    """Who is told about the progress of jobs."""

    def tick(self, waiting: Iterable[Job], running: Iterable[Running]) -> None:
        """Called a few times a second."""

    def done(self, job: Job, result: Mapping[str, Any], waiting: Iterable[Job], running: Iterable[Running]) -> None:
        """A job has its result."""

    def failed(self, failure: Failure) -> None:
        """A job has ended without one."""


def run_jobs(jobs: Iterable[Job], *, at_once: int, watcher: Watcher, keep_models: bool) -> list[Failure]:
    """Run jobs in order, `at_once` of them at a time; a failing job does not stop the others.

    Args:
        jobs: without a result so far.
        at_once: processes, >= 1; they share the cores.
        watcher: is told what happens.
        keep_models: leave trained models on disk.

    Returns:
        The jobs that failed. An interruption ends the running processes and is raised again.
    """
    waiting, running, failures = list(jobs), list[Running](), list[Failure]()
    environment = child_environment(at_once)

    def fail(failure: Failure) -> None:
        failures.append(failure)
        record_failure(failure.job, failure.reason)
        watcher.failed(failure)

    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                begun = _begin(waiting.pop(0), environment)
                if isinstance(begun, Failure):
                    fail(begun)
                else:
                    running.append(begun)
            time.sleep(_POLL_SECONDS)
            for item in [item for item in running if item.process.poll() is not None]:
                running.remove(item)
                outcome = _outcome(item, keep_models)
                if isinstance(outcome, Failure):
                    fail(outcome)
                else:
                    watcher.done(item.job, outcome, waiting, running)
            watcher.tick(waiting, running)
    finally:
        for item in running:
            if item.process.poll() is None:
                _stop(item.process)
    return failures


def child_environment(at_once: int) -> dict[str, str]:
    """The shell's variables, with the cores divided among the processes unless the shell sets `OMP_NUM_THREADS`."""
    threads = max(1, num_cores() // at_once)
    # PASSIVE: threads that spin while they wait take the cores of the other jobs.
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", **os.environ}


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_recipes(paths: Iterable[str], evaluations: Iterable[Sequence[str]], report: Callable[[str], None]) -> int:
    """Have a child process build the settings of recipes and read the problems that students will be measured on.

    A child, so that this process needs none of the heavy libraries.

    Args:
        paths: recipe files.
        evaluations: arguments of `sg-opd evaluate`; the model need not be there yet.
        report: receives what the child said when one of them is refused.

    Returns:
        The child's exit status.
    """
    commands = json.dumps(
        [*(["check", path] for path in paths), *(["check_evaluation", *words] for words in evaluations)]
    )
    done = subprocess.run(
        [sys.executable, "-m", CHILD, commands],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=child_environment(1),
    )  # fmt: skip
    if done.returncode:
        report(done.stderr.strip() or done.stdout.strip())
    return done.returncode


def _begin(job: Job, environment: Mapping[str, str]) -> Running | Failure:
    """A folder that cannot be written to is this job's failure, not the study's."""
    try:
        return _start(job, environment)
    except OSError as error:
        return Failure(job, f"cannot be started: {error}")


def _start(job: Job, environment: Mapping[str, str]) -> Running:
    """The child leads a process group, and ends it when the pipe to this process breaks: however this one dies."""
    prepare(job)
    with (job.folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", CHILD, "--watch", json.dumps(job.commands)],
            # A group of its own: Ctrl-C in the terminal reaches this process alone, which then ends its children.
            stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**environment, SECRETS_VARIABLE: json.dumps(secret_settings(job))},
        )  # fmt: skip
    return Running(job, process, time.monotonic())


def _outcome(item: Running, keep_models: bool) -> dict[str, Any] | Failure:
    if item.process.stdin is not None:
        item.process.stdin.close()
    status = item.process.returncode
    if status:
        ended = f"was ended by signal {-status}" if status < 0 else f"exit status {status}"
        return Failure(item.job, f"{ended}: {last_line(item.job)}")
    try:
        return finish(item.job, item.elapsed, keep_model=keep_models)
    except (OSError, ValueError) as error:
        return Failure(item.job, f"the result cannot be read: {error}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a child that has not been waited for and everything in its process group, politely first."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
