"""`sg-opd demo`: the built-in task from nothing to a measured student, through the code of `train`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SGOPDConfigError
from .command import CommandParser, say
from .evaluate import cached_evaluation, results_table
from .outside import explained
from .parsing import TrainSettings, build_settings, read_command_line
from .recipes import find_recipe

if TYPE_CHECKING:
    from ..evaluation import EvaluationResult

RECIPE = "arithmetic/sg_opd.yaml"
PROBLEMS = "built-in arithmetic"
# 400 completions at once: models of 0.1 M parameters are the faster for it, also on a CPU.
EVALUATION = {"num_samples": 8, "temperature": 1.0, "top_p": 1.0, "batch_size": 400, "seed": 0}


def run(argv: Sequence[str], *, debug: bool = False) -> int:
    """`sg-opd demo [--recipe PATH] [--seed N] [--output_dir DIR] [--field VALUE ...]`.

    Prepares the teacher, the student and the problems, trains as the recipe says, and measures student before, student
    after and teacher on held-out problems.

    Args:
        argv: words after `demo`; those that are not the demo's own go to `train`.
        debug: not used; errors are shown by `main`.

    Returns:
        0.
    """
    settings = _settings(argv)
    with explained(settings.named):
        _run(settings)
    return 0


def _run(settings: TrainSettings) -> None:
    started = time.perf_counter()
    from rich.console import Console

    from .train import check_before_loading, resolve_names, train

    check_before_loading(settings)
    console = Console()
    console.print("[bold]1/4[/bold] Built-in teacher, student and problems")
    resolve_names(settings)
    console.print("[bold]2/4[/bold] Accuracy of the student before and of the teacher")
    before, teacher = _measure(settings, settings.student), _measure(settings, _teacher(settings))
    console.print(f"[bold]3/4[/bold] Training, method {settings.script.method}")
    results: dict[str, EvaluationResult] = {}

    def measure(student: Path) -> dict[str, Any]:
        console.print("[bold]4/4[/bold] Accuracy of the student after")
        results.update(
            {"student before": before, "student after": _measure(settings, str(student)), "teacher": teacher}
        )
        return {name: result.to_dict() for name, result in results.items()}

    student = train(settings, measure)
    console.print(results_table(results, f"{before.num_problems} held-out problems, percent right"))
    elapsed = time.perf_counter() - started
    say(f"Student: {student}\nReport:  {student / 'report.html'}\nElapsed: {elapsed:.0f} s")


def _settings(argv: Sequence[str]) -> TrainSettings:
    """Settings of `train` for the demo's recipe; `--seed` chooses the student too."""
    parser = CommandParser(
        "sg-opd demo", "Distil a small student of the built-in task; all flags of `train` work too."
    )
    parser.flag("recipe", help=f"YAML recipe instead of recipes/{RECIPE}")
    parser.flag(
        "seed", type=int, default=0, help="seed of the run, and of the student unless `model_name_or_path` is given"
    )
    parser.flag("output_dir", help="folder of the student, with the seed in its name by default")
    options, rest = parser.parse_known_args(list(argv))
    recipe = options.recipe if options.recipe is not None else str(find_recipe(RECIPE))
    words = ["--config", recipe, "--seed", str(options.seed), *rest]
    command = read_command_line(words)
    if command.launch or command.launch_flags:
        raise SGOPDConfigError(
            "The demo must run in one process, got launcher keys. It measures models before and after training. Use "
            "`sg-opd train` with an `accelerate_config`."
        )
    settings = build_settings(command)
    name = settings.model.model_name_or_path
    if name is not None and name.startswith("builtin/") and "@" not in name:
        settings.model.model_name_or_path = f"{name}@{options.seed}"
    # The demo's own folder holds nothing but demos: the command may be given again.
    own = f"{settings.output_dir}-seed{options.seed}"
    if options.output_dir is None and not settings.training.resume_from_checkpoint:
        settings.training.overwrite_output_dir = True
    settings.training.output_dir = options.output_dir or own
    return settings


def _teacher(settings: TrainSettings) -> str:
    """The recipe's teacher; where there is none, or several, the built-in one as a yardstick."""
    from ..tasks import resolve

    teacher = getattr(settings.training, "teacher_model_name_or_path", None)
    if isinstance(teacher, str):
        return teacher
    return resolve("builtin/arithmetic-teacher")


def _measure(settings: TrainSettings, model: str) -> "EvaluationResult":
    from .loading import first_rows, load_splits, pick_split

    script = settings.script
    splits = load_splits(script.dataset_name or "builtin/arithmetic")
    rows: Any = first_rows(pick_split(splits, script.dataset_test_split, "dataset_test_split"), script.eval_samples)
    return cached_evaluation(
        model,
        rows,
        settings.output_dir.parent / "evaluations",
        f"{PROBLEMS}, {script.dataset_test_split} split",
        max_new_tokens=settings.training.max_completion_length,
        **EVALUATION,
    )
