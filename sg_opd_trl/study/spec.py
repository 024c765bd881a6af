"""A study file as typed values: which runs, on which seeds, measured how. Recipes are not read here."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SGOPDConfigError, did_you_mean

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
SET_BY_STUDY = ("seed", "output_dir", "push_to_hub")
STUDY_KEYS = (
    *(
        "name",
        "output_dir",
        "baseline",
        "seeds",
        "settings",
        "runs",
        "sweep",
        "pairs",
        "contrasts",
        "evaluate",
        "tune",
    ),
    *("choices", "measure_models", "keep_models"),
)
EVALUATE_KEYS = (
    *("dataset_name", "dataset_config", "dataset_split", "num_samples", "k", "temperature", "top_p", "max_new_tokens"),
    *("batch_size", "limit", "seed", "reward_func", "verifier_timeout"),
    *("question_column", "answer_column", "instruction"),
    *("system_prompt", "chat_template_kwargs", "generation_kwargs", "dtype"),
)
"""Flags of `sg-opd evaluate` that a study may set; they are the same for every run."""


@dataclass(frozen=True)
class RunSpec:
    """One row of the table: a recipe with settings of its own.

    `tune` is True for a choice of its own from the study's grid, the name of another run to share that run's choice,
    or False for the recipe's value. `sweep` and `point` are set on the runs that a sweep stands for.
    """

    name: str
    recipe: Path
    settings: dict[str, Any]
    tune: bool | str = True
    sweep: str | None = None
    point: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A student and a teacher that every run of the study is done with."""

    name: str
    student: str
    teacher: str


@dataclass(frozen=True)
class Tuning:
    """Every tuned run is done with each value on each seed and measured on `split`; the best mean is chosen."""

    field: str
    values: tuple[Any, ...]
    seeds: tuple[int, ...]
    split: str


@dataclass(frozen=True)
class Study:
    """A whole study; see `docs/study_guide.md` for what each key means."""

    name: str
    output_dir: Path
    baseline: str
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    runs: dict[str, RunSpec]
    pairs: tuple[Pair | None, ...]
    contrasts: dict[str, dict[str, float]]
    evaluate: dict[str, Any]
    tuning: Tuning | None
    choices: Path | None
    measure_models: bool
    keep_models: bool


def read_study(values: Any, path: Path, output_dir: Path | None = None) -> Study:
    """Check a study file.

    Args:
        values: its content.
        path: where it is; paths in it are relative to its folder.
        output_dir: instead of the file's own.

    Returns:
        The study, sweeps written out.

    Raises:
        SGOPDConfigError: an unknown key, a value of the wrong type, a name that nothing has, or two settings that
            contradict each other.
    """
    top = Block(values, f"study {path}", STUDY_KEYS)
    name, folder = top.name("name"), path.parent
    tuning = _tuning(top)
    runs = _all_runs(top, folder)
    choices = folder / top.text("choices") if "choices" in values else None
    study = Study(
        name=name,
        output_dir=output_dir or folder / top.text("output_dir", f"outputs/studies/{name}"),
        baseline=top.text("baseline"),
        seeds=top.seeds("seeds"),
        settings=top.settings("settings", SET_BY_STUDY),
        runs=runs,
        pairs=_pairs(top),
        contrasts=_contrasts(top, runs),
        evaluate=_evaluate(top),
        tuning=tuning,
        choices=choices,
        measure_models=top.flag("measure_models", True),
        keep_models=top.flag("keep_models", False),
    )
    _check_names(study, top)
    return study


def _all_runs(top: "Block", folder: Path) -> dict[str, RunSpec]:
    listed = [*_runs(top, folder), *_sweeps(top, folder)]
    runs = {run.name: run for run in listed}
    if not runs:
        raise top.refuse("runs", "name at least one run", "There is nothing to do. Add a run or a sweep.")
    if len(runs) < len(listed):
        raise top.refuse("sweep", "give every run a name of its own", "Two runs would share a folder. Rename one.")
    return runs


def _runs(top: "Block", folder: Path) -> Iterable[RunSpec]:
    for name, values in top.settings("runs").items():
        check_name(name, f"a run's name in the {top.where}")
        block = Block(values, f"run `{name}` of the {top.where}", ("recipe", "settings", "tune"))
        yield RunSpec(name, folder / block.text("recipe"), block.settings("settings", SET_BY_STUDY), _tune(block))


def _sweeps(top: "Block", folder: Path) -> Iterable[RunSpec]:
    for name, values in top.settings("sweep").items():
        check_name(name, f"a sweep's name in the {top.where}")
        block = Block(values, f"sweep `{name}` of the {top.where}", ("recipe", "settings", "tune", "grid"))
        block.required("grid")
        grid = Block(block.settings("grid", SET_BY_STUDY), f"grid of the {block.where}", block.values["grid"])
        settings = block.settings("settings", (*SET_BY_STUDY, *grid.known))
        for combination in itertools.product(*(grid.values_of(key) for key in grid.known)):
            point = dict(zip(grid.known, combination, strict=True))
            label = ",".join(f"{key}={slug(value)}" for key, value in point.items())
            yield RunSpec(
                name=f"{name}-{label}",
                recipe=folder / block.text("recipe"),
                settings={**settings, **point},
                tune=_tune(block),
                sweep=name,
                point=point,
            )


def slug(value: Any) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", str(value)).strip("_")


def _tune(block: "Block") -> bool | str:
    value = block.values.get("tune", True)
    if not isinstance(value, (bool, str)):
        raise block.refuse("tune", "be true, false or a run's name", "It says whose choice is used. Change the value.")
    return value


def _pairs(top: "Block") -> tuple[Pair | None, ...]:
    if "pairs" not in top.values:
        return (None,)
    pairs = []
    for index, values in enumerate(top.values_of("pairs")):
        block = Block(values, f"pair {index + 1} of the {top.where}", ("name", "student", "teacher"))
        name = block.name("name") if "name" in block.values else f"pair{index + 1}"
        pairs.append(Pair(name, block.text("student"), block.text("teacher")))
    if len({pair.name for pair in pairs}) < len(pairs):
        raise top.refuse("pairs", "have different names", "Each has a folder and a table. Rename one.")
    return tuple(pairs)


def _contrasts(top: "Block", runs: Mapping[str, RunSpec]) -> dict[str, dict[str, float]]:
    contrasts = top.settings("contrasts")
    for name, weights in contrasts.items():
        block = Block(weights, f"contrast `{name}` of the {top.where}", runs)
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in weights.values())
        if not numbers or len(block.values) < 2 or abs(sum(weights.values())) > 1e-9:
            raise top.refuse(
                "contrasts", "hold numbers that sum to 0 for at least two runs",
                "Else it is no comparison. Set it to e.g. {my_run: 1, other_run: -1}.",
            )  # fmt: skip
    return contrasts


def _evaluate(top: "Block") -> dict[str, Any]:
    block = Block(top.required("evaluate"), f"block `evaluate` of the {top.where}", EVALUATE_KEYS)
    block.text("dataset_name")
    block.required("max_new_tokens")
    # Null is the default: as a word of a command line it would be the text "None".
    given = {name: value for name, value in block.values.items() if value is not None}
    return {"dataset_split": "test", "num_samples": 8, "seed": 0, **given}


def _tuning(top: "Block") -> Tuning | None:
    if top.values.get("tune") is None:
        return None
    if top.values.get("choices") is not None:
        raise top.refuse("tune", "not be set together with `choices`", "There would be two choices. Remove one.")
    block = Block(top.values["tune"], f"block `tune` of the {top.where}", ("field", "values", "seeds", "split"))
    name = block.text("field")
    if name in SET_BY_STUDY:
        raise block.refuse("field", "be a setting of the recipes", "The study sets this one. Tune another.")
    values = tuple(block.values_of("values"))
    if len({slug(value) for value in values}) < len(values):
        raise block.refuse("values", "be different", "Each has a folder of its own. Remove what is there twice.")
    return Tuning(name, values, block.seeds("seeds"), block.text("split"))


def _check_names(study: Study, top: "Block") -> None:
    """Names that refer to runs, and settings that would be set twice."""
    if study.baseline not in study.runs:
        near = did_you_mean(study.baseline, study.runs)
        raise top.refuse("baseline", "name a run", f"Differences are taken to it.{near} Set it to one of the runs.")
    if study.tuning is not None and study.tuning.split == study.evaluate["dataset_split"]:
        raise top.refuse(
            "tune", "measure on another split than `evaluate`",
            "A choice made on the table's own problems flatters what was tuned. Set `split` to another one.",
        )  # fmt: skip
    if study.tuning is not None and study.tuning.field in study.settings:
        raise top.refuse("settings", f"not set `{study.tuning.field}`", "It is tuned. Remove it, or `tune`.")
    for run in study.runs.values():
        _check_choice(study, run)


def _check_choice(study: Study, run: RunSpec) -> None:
    """A shared choice exists, and a chosen setting is not set by the run as well; `choices` is checked when read."""
    chosen = study.tuning.field if study.tuning is not None else None
    owner = study.runs.get(run.tune, run) if isinstance(run.tune, str) else None
    if owner is not None and study.choices is None and (chosen is None or owner.tune is not True):
        raise SGOPDConfigError(
            f"`tune` of run `{run.name}` must be true, false or the name of a run with `tune: true`, got "
            f"{run.tune!r}.{did_you_mean(str(run.tune), study.runs)} It says whose choice is used, and needs the "
            "study's `tune` or `choices`. Change the value."
        )
    if chosen is not None and run.tune is not False and chosen in run.settings:
        raise SGOPDConfigError(
            f"`{chosen}` must not be set in run `{run.name}`, got {run.settings[chosen]!r}. It is tuned. Remove it, "
            "or set `tune: false` for the run."
        )


class Block:
    """One mapping of a study file, with the place it is at for messages.

    Args:
        values: as the file has them.
        where: such as "study my.yaml" or "run `opd` of study my.yaml".
        known: all keys the block may have.

    Raises:
        SGOPDConfigError: not a mapping, or an unknown key, with the nearest known one.
    """

    def __init__(self, values: Any, where: str, known: Iterable[str]) -> None:
        if not isinstance(values, Mapping):
            raise SGOPDConfigError(f"The {where} must be a mapping, got {values!r}. Its keys are {sorted(known)}.")
        self.values, self.where, self.known = values, where, list(known)
        for key in values:
            if key not in self.known:
                raise SGOPDConfigError(
                    f"Unknown key `{key}` in the {where}.{did_you_mean(str(key), self.known)} Known keys: "
                    f"{', '.join(self.known)}."
                )

    def refuse(self, key: str, rule: str, reason: str) -> SGOPDConfigError:
        """The error for a value that breaks a rule: setting, value, reason, way out."""
        return SGOPDConfigError(f"`{key}` in the {self.where} must {rule}, got {self.values.get(key)!r}. {reason}")

    def required(self, key: str) -> Any:
        """A value that has no default."""
        if self.values.get(key) is None:
            raise SGOPDConfigError(f"`{key}` must be set in the {self.where}, got nothing. It has no default. Set it.")
        return self.values[key]

    def text(self, key: str, default: str | None = None) -> str:
        """A string; required where there is no default."""
        value = self.required(key) if default is None else self.values.get(key, default)
        if not isinstance(value, str) or not value:
            raise self.refuse(key, "be a text", "Anything else names nothing. Put it in quotes.")
        return value

    def name(self, key: str) -> str:
        """A string that can be part of a folder's name."""
        return check_name(self.text(key), f"`{key}` in the {self.where}")

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "be true or false", "It is a switch. Change the value.")
        return value

    def seeds(self, key: str) -> tuple[int, ...]:
        """A list of different whole numbers >= 0."""
        value = self.required(key)
        whole = isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value)
        if not whole or len(set(value)) < len(value):
            raise self.refuse(key, "be a list of different whole numbers", "Each is one run. Set it to e.g. [0, 1].")
        return tuple(value)

    def values_of(self, key: str) -> list[Any]:
        """A list with something in it."""
        value = self.required(key)
        if not isinstance(value, list) or not value:
            raise self.refuse(key, "be a list of values", "Each is tried. Set it to e.g. [1.0, 1.8].")
        return value

    def settings(self, key: str, refused: Iterable[str] = ()) -> dict[str, Any]:
        """A mapping of fields of a run; those that the study sets itself are refused."""
        value = self.values.get(key)
        value = {} if value is None else value
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.refuse(key, "be a mapping of fields to values", "It overrides the recipe. Change the value.")
        taken = sorted(set(refused) & set(value))
        if taken:
            raise self.refuse(key, f"not hold {taken}", "The study sets these for every run. Remove them.")
        return dict(value)


def check_name(name: Any, what: str) -> str:
    """A name that can be part of a folder's name.

    Raises:
        SGOPDConfigError: another type, or other characters.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SGOPDConfigError(
            f"{what} must be letters, digits, `_`, `-` and `.`, got {name!r}. It names a folder. Rename it."
        )
    return name
