"""What a job leaves: one small file, written last, so that a job is either finished or starts anew."""

import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..files import write_atomically
from ..scrubbing import scrubbed
from .plan import Job

logger = logging.getLogger(__name__)

RESULT, LOG, COMMANDS, FAILED = "result.json", "log.txt", "commands.json", "failed.txt"
_KEPT = ("log_history.json", "run.json", "report.html", "README.md")
_TOKENS = ("teacher_tokens_generated", "teacher_tokens_scored")
_REUSED = "teacher_tokens_reused"


def read_result(job: Job) -> dict[str, Any] | None:
    """The result of a finished job; None for one that is not finished or was made with other settings."""
    values = _read_json(job.folder / RESULT)
    return values if isinstance(values, dict) and values.get("key") == job.key else None


def prepare(job: Job) -> None:
    """An empty folder with the recipe and the commands; what an unfinished attempt left is removed.

    Raises:
        OSError: a folder that cannot be made or emptied; hidden files, such as a network disk's, may stay.
    """
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    left = sorted(path.name for path in job.folder.iterdir() if not path.name.startswith("."))
    if left:
        raise OSError(f"{job.folder} cannot be emptied, {left} of an earlier attempt are left")
    if job.recipe is not None:
        text = yaml.safe_dump(scrubbed(job.recipe), sort_keys=False, allow_unicode=True)
        (job.folder / "recipe.yaml").write_text(text, encoding="utf-8")
    (job.folder / COMMANDS).write_text(json.dumps(scrubbed(job.commands)) + "\n", encoding="utf-8")


def secret_settings(job: Job) -> dict[str, Any]:
    """The settings of a job that the recipe in its folder does not show as they are."""
    return {name: value for name, value in (job.recipe or {}).items() if scrubbed({name: value}) != {name: value}}


def finish(job: Job, seconds: float, *, keep_model: bool) -> dict[str, Any]:
    """Gather a job's numbers into its result file, and delete the trained model unless it is to be kept.

    Args:
        job: whose processes have ended well.
        seconds: wall time of the whole job, start-up and evaluation included.
        keep_model: leave the model's folder.

    Returns:
        The result.

    Raises:
        OSError, ValueError: the evaluation's file is not there or not readable.
    """
    evaluation = json.loads((job.folder / "evaluation.json").read_text(encoding="utf-8"))
    result = {"key": job.key, "evaluation": evaluation, "wall_seconds": round(seconds, 1)}
    if job.recipe is not None:
        student = job.folder / "student"
        run = _read_json(student / "run.json")
        log = _read_json(student / "log_history.json")
        result |= _cost(run if isinstance(run, dict) else {}, log if isinstance(log, list) else [])
        result["curve"] = _reward_curve(log if isinstance(log, list) else [])
        for name in _KEPT:
            if (student / name).is_file():
                shutil.copy2(student / name, job.folder / name)
        if not keep_model:
            shutil.rmtree(student)
    write_json(job.folder / RESULT, result)
    return result


def record_failure(job: Job, reason: str) -> None:
    """Leave the reason in the job's folder, where a later table finds it; the next attempt removes it."""
    try:
        (job.folder / FAILED).write_text(reason + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("The failure of %s is not in its folder: %s", job.label, error)


def failures_of(jobs: Iterable[Job]) -> list[str]:
    """One line per job whose last attempt failed."""
    failed = [(job, job.folder / FAILED) for job in jobs if read_result(job) is None]
    return [f"{job.label}: {path.read_text(encoding='utf-8').strip()}" for job, path in failed if path.is_file()]


def last_line(job: Job) -> str:
    """The last line of a job's log that says something: an error's message, where there is one."""
    try:
        text = (job.folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("Error")]
    return (errors or lines or [""])[-1][:300]  # characters: one line of a table's list of failures


def write_json(path: Path, values: Any) -> None:
    """Write JSON, whole or not at all."""
    write_atomically(path, json.dumps(values, indent=1) + "\n")


def _cost(run: Mapping[str, Any], log: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Training seconds and teacher tokens; None for what the run did not write down."""
    seconds = run.get("seconds")
    if seconds is None:
        seconds = next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), None)
    reused = {_REUSED: run[_REUSED]} if _REUSED in run else {}
    return {"seconds": seconds, **{name: run.get(name) for name in _TOKENS}, **reused}


def _reward_curve(log: list[Mapping[str, Any]]) -> list[list[float]]:
    """Step and mean reward of the student's rollouts, where the method has rollouts with rewards."""
    return [
        [int(entry["step"]), round(float(entry["reward"]), 5)]
        for entry in log
        if "step" in entry and isinstance(entry.get("reward"), (int, float)) and math.isfinite(entry["reward"])
    ]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s is not readable and is taken as missing: %s", path, error)
        return None
