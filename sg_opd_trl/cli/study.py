"""`sg-opd study`: recipes x seeds, resumable, and one table of what came out."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SGOPDConfigError, did_you_mean
from ..files import check_folder
from .command import CommandParser
from .recipes import load_recipe

if TYPE_CHECKING:
    from rich.console import Console

    from ..study.execution import Failure
    from ..study.plan import Job, Recipes
    from ..study.progress import StudyProgress, Timing
    from ..study.spec import Study

EXIT_SOME_FAILED = 1


@dataclass
class Plan:
    """What there is to do: tuning first, then runs and models, of which `only` says which are wanted.

    `choices` is None until the tuning jobs have been looked at; until then `runs` holds every run with the grid's
    first value, for counting, checking and estimates.
    """

    study: "Study"
    recipes: "Recipes"
    only: list[str]
    tuning: "list[Job]"
    runs: "list[Job]"
    models: "list[Job]"
    choices: dict[str, Any] | None = None

    def wanted(self, jobs: "Iterable[Job]") -> "list[Job]":
        """Jobs of the runs and sweeps that `--only` names; all without it."""
        if not self.only:
            return list(jobs)
        from ..study.plan import choice_owner

        chosen = [run for run in self.study.runs.values() if {run.name, run.sweep} & set(self.only)]
        names = {run.name for run in chosen}
        owners = {choice_owner(run) for run in chosen}
        return [job for job in jobs if job.name in (owners if job.kind == "tune" else names)]


def run(argv: Sequence[str], *, debug: bool = False) -> int:
    """`sg-opd study STUDY.yaml [--jobs N] [--only NAME ...] [--dry_run] [--report_only] [--output_dir DIR]`.

    Args:
        argv: words after `study`.
        debug: not used; errors are shown by `main`.

    Returns:
        0, or 1 when a run failed.
    """
    options = _parser().parse(argv)
    if options.jobs < 1:
        raise SGOPDConfigError(f"`jobs` must be at least 1, got {options.jobs}. It is a count. Set it to 1.")
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    plan = _read_plan(Path(options.study), options.output_dir, options.only or [])
    check_folder("output_dir", plan.study.output_dir)
    if options.dry_run:
        _list_jobs(plan, options.jobs, console)
        return 0
    if options.report_only:
        _settle_choices(plan)
        with _lock(plan.study.output_dir) as alone:
            _write(plan, console, files=alone)
        return 0
    with _lock(plan.study.output_dir) as alone:
        if not alone:
            raise _in_use(plan.study.output_dir)
        try:
            failures = _work(plan, options.jobs, console)
        except KeyboardInterrupt:
            # What is done is worth a table; the next start goes on from there.
            _settle_choices(plan)
            _write(plan, console)
            raise
        _write(plan, console)
    return EXIT_SOME_FAILED if failures else 0


def _parser() -> CommandParser:
    parser = CommandParser(
        "sg-opd study", "Run recipes x seeds, measure every student, write one table. Finished runs are kept."
    )
    parser.add_argument("study", help="YAML file of the study")
    parser.flag("jobs", type=int, default=1, help="processes at a time; the cores are divided among them")
    parser.flag("only", nargs="+", metavar="NAME", help="runs or sweeps to do now; the table shows all that is there")
    parser.flag("dry_run", action="store_true", help="list the jobs and estimate the time from those that are done")
    parser.flag("report_only", action="store_true", help="write the table of what is done, run nothing")
    parser.flag("output_dir", help="folder of the study instead of the file's own")
    return parser


def _read_plan(path: Path, output_dir: str | None, only: list[str]) -> Plan:
    from ..study import plan as planning
    from ..study.spec import read_study
    from ..study.tuning import load_choices

    study = read_study(load_recipe(path), path.resolve(), None if output_dir is None else Path(output_dir).resolve())
    names = [*study.runs, *dict.fromkeys(run.sweep for run in study.runs.values() if run.sweep is not None)]
    for name in only:
        if name not in names:
            raise SGOPDConfigError(
                f"`only` must name runs or sweeps of the study, got {name!r}.{did_you_mean(name, names)} There are "
                f"{', '.join(names)}."
            )
    recipes = {run.recipe: load_recipe(run.recipe) for run in study.runs.values()}
    choices, field, values = None, None, dict[str, Any]()
    if study.choices is not None:
        choices = load_choices(study, study.choices)
        field, values = choices["field"], {name: entry["chosen"] for name, entry in choices["runs"].items()}
    elif study.tuning is not None:
        field, values = study.tuning.field, dict.fromkeys(study.runs, study.tuning.values[0])
    runs = planning.run_jobs_of(study, recipes, values, field)
    tuning = planning.tuning_jobs_of(study, recipes)
    return Plan(study, recipes, only, tuning, runs, planning.model_jobs_of(study, runs), choices)


def _work(plan: Plan, at_once: int, console: "Console") -> "list[Failure]":
    """All jobs that have no result yet: the tuning jobs, then the runs and the models."""
    from ..study.execution import run_jobs
    from ..study.progress import StudyProgress
    from ..study.tuning import save_choices

    tuning = _pending(plan.wanted(plan.tuning))
    if not tuning:  # the runs are known already, so that finished ones are not counted
        _settle_choices(plan)
    runs, models = _pending(plan.wanted(plan.runs)), _pending(plan.models)
    _check([*(plan.wanted([*plan.tuning, *plan.runs]) if tuning or runs else []), *models], console)
    total = len(tuning) + len(runs) + len(models)
    console.print(f"{plan.study.name}: {total} jobs to do, {at_once} at a time, in {plan.study.output_dir}")
    with StudyProgress(console, total, at_once, _timing(plan)) as progress:
        progress.later = [*runs, *models] if tuning else []
        keep = plan.study.keep_models
        failures = run_jobs(tuning, at_once=at_once, watcher=progress, keep_models=False)
        _settle_choices(plan)
        if plan.choices is not None and plan.study.tuning is not None:
            save_choices(plan.study, plan.choices)
        _resize(progress, len(tuning), _pending(plan.wanted(plan.runs)), models)
        failures += run_jobs(
            [*models, *_pending(plan.wanted(plan.runs))], at_once=at_once, watcher=progress, keep_models=keep
        )
    return failures


def _resize(progress: "StudyProgress", done: int, runs: "list[Job]", models: "list[Job]") -> None:
    """Chosen values may have been run before, and runs without a choice are gone."""
    progress.later = []
    progress.total = done + len(runs) + len(models)


def _settle_choices(plan: Plan) -> None:
    """From the tuning results: the choices, and the runs with the chosen values."""
    from ..study.plan import run_jobs_of
    from ..study.tuning import choose

    if plan.study.tuning is None:
        return
    plan.choices = choose(plan.study, plan.tuning)
    values = {name: entry["chosen"] for name, entry in plan.choices["runs"].items()}
    plan.runs = run_jobs_of(plan.study, plan.recipes, values, plan.study.tuning.field)


def _pending(jobs: "Iterable[Job]") -> "list[Job]":
    from ..study.results import read_result

    return [job for job in jobs if read_result(job) is None]


def _check(jobs: "Iterable[Job]", console: "Console") -> None:
    """Build the settings of one job of every run and read the problems, so that hours do not end in a misspelt key.

    Raises:
        SGOPDConfigError: a recipe that `sg-opd train` refuses, or problems or flags that `sg-opd evaluate` does.
    """
    import yaml

    from ..study.execution import check_recipes

    found = list(jobs)
    # One job of every run, its first: other seeds and pairs change values, not names or types.
    first = {job.name: job for job in reversed(found) if job.recipe is not None}
    evaluations = {json.dumps(job.evaluate, sort_keys=True, default=str): job.commands[-1][1:] for job in found}
    if not found:
        return
    console.print("Checking the recipes")
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, job in first.items():
            paths.append(str(Path(folder) / f"{name}.yaml"))
            Path(paths[-1]).write_text(yaml.safe_dump(job.recipe, sort_keys=False), encoding="utf-8")
        said: list[str] = []
        if check_recipes(paths, evaluations.values(), said.append):
            # The recipe's path in the message is that of a copy, which will be gone.
            raise SGOPDConfigError(f"The study is refused. {''.join(said).replace(folder, '...')}")


def _timing(plan: Plan) -> "Timing":
    from ..study.progress import Timing
    from ..study.results import read_result

    timing = Timing()
    for job in (*plan.tuning, *plan.runs, *plan.models):
        result = read_result(job)
        if result is not None:
            timing.add(job, result["wall_seconds"])
    return timing


def _list_jobs(plan: Plan, at_once: int, console: "Console") -> None:
    from ..study.progress import show_seconds

    if plan.tuning and not _pending(plan.tuning):
        _settle_choices(plan)
    waiting = []
    for job in (*plan.wanted(plan.tuning), *plan.models, *plan.wanted(plan.runs)):
        done = not _pending([job])
        waiting += [] if done else [job]
        console.print(f"{'done ' if done else 'to do'} {job.label}", markup=False)
    left = _timing(plan).time_left(waiting, {}, at_once)
    estimate = "no estimate before the first has finished" if left is None else f"about {show_seconds(left)}"
    console.print(f"{len(waiting)} jobs to do, {at_once} at a time: {estimate if waiting else 'nothing left'}")


def _write(plan: Plan, console: "Console", *, files: bool = True) -> None:
    """The table on the console, and in files unless another process works in the folder."""
    from ..reporting.curves import can_draw
    from ..study.page import write_study
    from ..study.results import failures_of
    from ..study.summary import summarise
    from ..study.tables import to_markdown

    groups = summarise(plan.study, plan.runs, plan.models)
    failures = failures_of([*plan.tuning, *plan.models, *plan.runs])
    console.print(to_markdown(plan.study, groups, plan.choices, failures), markup=False)
    if not files:
        console.print(f"A study runs in {plan.study.output_dir}, which writes the files when it ends.", markup=False)
        return
    written = write_study(plan.study, groups, plan.choices, failures)
    console.print("\n".join(map(str, written)), markup=False)
    if not can_draw():
        console.print("No plots: they need matplotlib, `pip install matplotlib`. Then run this again.")


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder for itself, until the end of the block."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _in_use(folder: Path) -> SGOPDConfigError:
    return SGOPDConfigError(
        f"`output_dir` must be used by one study at a time, got {folder}, where another one runs. They would delete "
        "each other's runs. Wait for it, or set `--output_dir`."
    )
