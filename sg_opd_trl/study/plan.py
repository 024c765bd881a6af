"""From a study to jobs: each is one recipe, written out whole, or one model to measure, with a folder of its own."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import SGOPDConfigError
from .contents import local_contents
from .spec import Pair, RunSpec, Study, slug

Recipes = Mapping[Path, Mapping[str, Any]]
STUDENT, TEACHER = "model_name_or_path", "teacher_model_name_or_path"
PAIRED: Mapping[str, Any] = {
    **{STUDENT: None, "model_revision": "main"},
    **{"dataset_name": None, "dataset_config": None, "dataset_train_split": "train", "dataset_streaming": False},
    **{"datasets": None, "streaming": False, "test_split_size": None},
    **{"question_column": None, "answer_column": None, "instruction": None, "system_prompt": None},
    **{"min_difficulty": None, "difficulty_column": "difficulty", "max_prompt_tokens": None, "shuffle_dataset": True},
}
"""What all runs of a seed share, with the value that a recipe without it has: student, problems and their order."""
_SHARED_FOLDER = "runs"


@dataclass(frozen=True, eq=False)
class Job:
    """Something that one child process does.

    `kind` is "run", "tune" or "model"; the last measures `model` and trains nothing, so that `recipe` is None. `value`
    is what a tuning job tries, `contents` are digests of the local files that the job reads.
    """

    kind: str
    name: str
    pair: str | None
    seed: int | None
    folder: Path
    model: str
    recipe: dict[str, Any] | None
    evaluate: dict[str, Any]
    value: Any = None
    contents: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The job in a few words."""
        parts = [f"measure {self.name}" if self.kind == "model" else self.name]
        if self.pair is not None:
            parts.append(f"on {self.pair}")
        if self.kind == "tune":
            parts.append(f"trying {self.value}")
        if self.seed is not None:
            parts.append(f"seed {self.seed}")
        return ", ".join(parts)

    @property
    def key(self) -> str:
        """Hash of all that shapes the result, the version of this package included, its folder not."""
        recipe = {name: value for name, value in (self.recipe or {}).items() if name != "output_dir"}
        model = self.model if self.recipe is None else None
        # Nothing in place of no contents: a job that reads no local file has the key of its settings alone.
        parts = [recipe, model, self.evaluate, __version__, *([self.contents] if self.contents else [])]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]

    @property
    def commands(self) -> list[list[str]]:
        """Arguments of `sg-opd`, one list per command, to be run one after the other."""
        train = [["train", "--config", str(self.folder / "recipe.yaml")]] if self.recipe is not None else []
        words = ["evaluate", "--model", self.model, "--output", str(self.folder / "evaluation.json")]
        for name, value in self.evaluate.items():
            words += [f"--{name}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
        return [*train, words]


def run_jobs_of(study: Study, recipes: Recipes, choices: Mapping[str, Any], field: str | None) -> list[Job]:
    """The jobs of the tables, seed by seed, so that the first complete comparison is there early.

    Args:
        study: the study.
        recipes: file -> settings.
        choices: run -> chosen value; a run that should have one and has none is left out.
        field: which setting was chosen; None without a choice.

    Returns:
        One job per seed, pair and run.

    Raises:
        SGOPDConfigError: runs that would not start from the same student on the same data.
    """
    jobs = []
    for seed in study.seeds:
        for pair in study.pairs:
            for run in study.runs.values():
                owner = choice_owner(run)
                if field is None or owner is None:
                    chosen: dict[str, Any] = {}
                elif owner in choices:
                    chosen = {field: choices[owner]}
                else:
                    continue
                folder = study.output_dir / _SHARED_FOLDER / (pair.name if pair else "") / run.name / f"seed{seed}"
                jobs.append(_training_job("run", study, run, pair, seed, folder, recipes, chosen))
    _check_paired(jobs)
    return jobs


def tuning_jobs_of(study: Study, recipes: Recipes) -> list[Job]:
    """The jobs that a choice is made from: every run with a choice of its own x values x seeds, on the first pair.

    Raises:
        SGOPDConfigError: as `run_jobs_of`.
    """
    if study.tuning is None:
        return []
    tuning, pair = study.tuning, study.pairs[0]
    evaluate = {**study.evaluate, "dataset_split": tuning.split}
    jobs = []
    for run in study.runs.values():
        for value in tuning.values if run.tune is True else ():
            for seed in tuning.seeds:
                folder = study.output_dir / "tuning" / run.name / f"{tuning.field}={slug(value)}" / f"seed{seed}"
                chosen = {tuning.field: value}
                jobs.append(_training_job("tune", study, run, pair, seed, folder, recipes, chosen, evaluate, value))
    _check_paired(jobs)
    return jobs


def model_jobs_of(study: Study, runs: Iterable[Job]) -> list[Job]:
    """One job per student before training and per teacher of the runs, where the study measures them."""
    if not study.measure_models:
        return []
    names: dict[str, None] = {}
    for job in runs:
        for key in (STUDENT, TEACHER):
            value = (job.recipe or {}).get(key)
            if isinstance(value, str):
                names[value] = None
    evaluate = study.evaluate
    return [
        Job("model", name, None, None, folder, name, None, evaluate, contents=local_contents({}, evaluate, name))
        for name, folder in _model_folders(study, names).items()
    ]


def _model_folders(study: Study, names: Iterable[str]) -> dict[str, Path]:
    """A folder of its own for every model, also where two names differ only in what a folder's name cannot have."""
    slugs = {name: slug(name) for name in names}
    found = list(slugs.values())
    return {
        name: study.output_dir / "models" / (short if found.count(short) == 1 else f"{short}-{_digest(name)}")
        for name, short in slugs.items()
    }


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def choice_owner(run: RunSpec) -> str | None:
    """Whose choice a run uses: its own, another run's, or None for the recipe's value."""
    if isinstance(run.tune, str):
        return run.tune
    return run.name if run.tune else None


def _training_job(
    kind: str,
    study: Study,
    run: RunSpec,
    pair: Pair | None,
    seed: int,
    folder: Path,
    recipes: Recipes,
    chosen: Mapping[str, Any],
    evaluate: Mapping[str, Any] | None = None,
    value: Any = None,
) -> Job:
    recipe = dict(recipes[run.recipe])
    # From the most general to the most special: what comes later wins.
    layers = [study.settings, _pair_settings(pair, recipe), chosen, run.settings]
    for layer in layers:
        recipe |= {name: _with_seed(setting, seed) for name, setting in layer.items()}
    student = folder / "student"
    recipe = {"report": False, **recipe, "seed": seed, "output_dir": str(student), "push_to_hub": False}
    evaluate = dict(evaluate or study.evaluate)
    return Job(
        kind=kind,
        name=run.name,
        pair=pair.name if pair else None,
        seed=seed,
        folder=folder,
        model=str(student),
        recipe=recipe,
        evaluate=evaluate,
        value=value,
        contents=local_contents(recipe, evaluate),
    )


def _pair_settings(pair: Pair | None, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without a teacher, such as GRPO's, keeps none."""
    if pair is None:
        return {}
    return {STUDENT: pair.student} | ({TEACHER: pair.teacher} if TEACHER in recipe else {})


def _with_seed(value: Any, seed: int) -> Any:
    """`{seed}` in a text stands for the run's seed."""
    if isinstance(value, str):
        return value.replace("{seed}", str(seed))
    if isinstance(value, Mapping):
        return {name: _with_seed(item, seed) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_seed(item, seed) for item in value]
    return value


def _check_paired(jobs: Iterable[Job]) -> None:
    """Runs of one pair and seed start from one student and see one data set in one order; steps may differ."""
    first: dict[tuple[str | None, int | None], Job] = {}
    for job in jobs:
        other = first.setdefault((job.pair, job.seed), job)
        for name, default in PAIRED.items():
            ours, theirs = (job.recipe or {}).get(name, default), (other.recipe or {}).get(name, default)
            if ours != theirs:
                raise SGOPDConfigError(
                    f"`{name}` must be the same in all runs of a study, got {ours!r} in `{job.name}` and {theirs!r} "
                    f"in `{other.name}`. Differences are paired by seed. Set it in the study's `settings`, or use "
                    "`pairs`."
                )
