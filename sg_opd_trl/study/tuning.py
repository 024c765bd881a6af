"""Choosing one setting per run from a grid, on problems that the tables do not use."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import SGOPDConfigError, did_you_mean
from ..reporting.settings import show_value
from .plan import Job
from .results import read_result, write_json
from .spec import Study


def choose(study: Study, jobs: Iterable[Job]) -> dict[str, Any]:
    """The value with the best mean accuracy over the tuning seeds, for every tuned run.

    A value counts once all of its seeds have finished; of equally good ones the first of the grid is taken.

    Args:
        study: with a `tune` block.
        jobs: its tuning jobs.

    Returns:
        What `choices.json` holds: the field, the data set and its split, and per run the `chosen` value, the `scores`
        (value, mean, per seed), whether the choice is at the `edge` of the grid, whether it is `complete` and which
        values are `missing`. A run of which no value has finished is not in it.
    """
    if study.tuning is None:
        raise SGOPDConfigError("`tune` must be set to choose a setting, got nothing. There is no grid. Set it.")
    scores: dict[str, dict[int, dict[int, float]]] = {}
    values = study.tuning.values
    for job in jobs:
        result = read_result(job)
        # A student that nothing could be said of is no candidate.
        judged = result is not None and result["evaluation"]["avg_at_k"] is not None
        if result is not None and judged and job.seed is not None:
            by_seed = scores.setdefault(job.name, {}).setdefault(values.index(job.value), {})
            by_seed[job.seed] = result["evaluation"]["avg_at_k"]
    chosen = {}
    for name, by_value in scores.items():
        means = {
            index: fmean(found.values())
            for index, found in sorted(by_value.items())
            if set(found) == set(study.tuning.seeds)
        }
        if means:
            # `max` keeps the first of equals, and means are in the grid's order.
            best = max(means, key=lambda index: means[index])
            chosen[name] = {
                "chosen": values[best],
                "edge": len(values) > 1 and best in (0, len(values) - 1),
                "complete": len(means) == len(values),
                "missing": [value for index, value in enumerate(values) if index not in means],
                "scores": [
                    {"value": values[index], "mean": mean, "seeds": by_value[index]} for index, mean in means.items()
                ],
            }
    dataset = show_value(study.evaluate["dataset_name"])
    return {"field": study.tuning.field, "dataset": dataset, "split": study.tuning.split, "runs": chosen}


def save_choices(study: Study, choices: Mapping[str, Any]) -> Path:
    """Write `choices.json` into the study's folder, where other studies can read it."""
    path = study.output_dir / "choices.json"
    write_json(path, choices)
    return path


def load_choices(study: Study, path: Path) -> dict[str, Any]:
    """Read another study's `choices.json`.

    Raises:
        SGOPDConfigError: not such a file, a choice on the problems of this study's table, or a run of this study that
            needs a choice and has none in it, or one that was made before all values had been tried.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        chosen = {name: entry["chosen"] for name, entry in values["runs"].items()}
        field, split = str(values["field"]), str(values["split"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SGOPDConfigError(
            f"`choices` must be a `choices.json` that a study with `tune` has written, got {str(path)!r}: {error}. "
            "Run that study first, or correct the path."
        ) from error
    dataset = show_value(study.evaluate["dataset_name"])
    if split == study.evaluate["dataset_split"] and values.get("dataset", dataset) == dataset:
        raise SGOPDConfigError(
            f"`choices` must have been made on another split than `evaluate`, got {split!r} in {path}. A choice made "
            "on the table's own problems flatters what was tuned. Set `dataset_split` to another one, or tune on "
            "another one."
        )
    for run in study.runs.values():
        owner = run.tune if isinstance(run.tune, str) else run.name
        if run.tune is not False and owner not in chosen:
            raise SGOPDConfigError(
                f"`choices` must hold a choice for `{owner}`, got {sorted(chosen)} in {path}."
                f"{did_you_mean(owner, chosen)} Run `{run.name}` needs it. Set `tune` of the run to one of these, or "
                "to false for the recipe's value."
            )
        if run.tune is not False:
            _check_complete(owner, values["runs"][owner], path)
        if run.tune is not False and field in {**study.settings, **run.settings}:
            raise SGOPDConfigError(
                f"`{field}` must not be set in run `{run.name}`, got a value beside `choices`. It is chosen. Remove "
                "it, or set `tune: false` for the run."
            )
    return dict(values)


def _check_complete(owner: str, entry: Mapping[str, Any], path: Path) -> None:
    """The best of some values may not be the best of all; files of older versions do not say."""
    if entry.get("complete") is not True:
        missing = f"one without the values {entry['missing']}" if entry.get("missing") else "one that does not say so"
        raise SGOPDConfigError(
            f"`choices` must hold a choice for `{owner}` that was made among all values, got {missing} in {path}. "
            "Another value may be better. Run the study that wrote it again, it goes on where it stopped; or set "
            "`tune: false` for the run."
        )
