"""Runs of the built-in task as `sg-opd train` makes them: a recipe, its problems and models, its trainer."""

import contextlib
import io
import tempfile
from dataclasses import dataclass
from typing import Any

from sg_opd_trl.cli.loading import first_rows, load_splits, load_training_data
from sg_opd_trl.cli.parsing import TrainSettings, build_settings, read_command_line
from sg_opd_trl.cli.recipes import find_recipe
from sg_opd_trl.cli.rewards import load_reward_funcs
from sg_opd_trl.cli.train import build_trainer, resolve_names


@dataclass
class Run:
    """A run that is ready to start."""

    settings: TrainSettings
    trainer: Any
    problems: Any
    reward_func: Any


def prepare_run(recipe: str, args: Any, seed: int, **flags: Any) -> Run:
    """Build the run of a recipe of `recipes/arithmetic`; nothing of it is written or reported.

    Args:
        recipe: name without `.yaml`.
        args: with `student`, `teacher` and `dataset`, empty for the recipe's, and `max_steps`, 0 for the recipe's.
        seed: of the run and of the built-in student.
        flags: further settings of the run.
    """
    given = {
        "model_name_or_path": args.student or f"builtin/arithmetic-student@{seed}",
        "dataset_name": args.dataset,
        "teacher_model_name_or_path": args.teacher if recipe != "grpo" else "",
        "max_steps": args.max_steps or "",
        "seed": seed,
        "output_dir": tempfile.mkdtemp(),
        "disable_tqdm": True,
        **flags,
    }
    words = [word for name, value in given.items() if value != "" for word in (f"--{name}", str(value))]
    command = read_command_line(["--config", str(find_recipe(f"arithmetic/{recipe}.yaml")), *words])
    settings = build_settings(command)
    resolve_names(settings)
    reward_funcs = load_reward_funcs(settings.script.reward_funcs)
    train_dataset, _ = load_training_data(settings, reward_funcs, None)
    trainer = build_trainer(settings, reward_funcs, train_dataset, None)
    test = load_splits(settings.script.dataset_name)[settings.script.dataset_test_split]
    return Run(settings, trainer, first_rows(test, args.problems), reward_funcs[0])


def train_silently(run: Run) -> None:
    """Train; what the loop prints would tear the table apart."""
    with contextlib.redirect_stdout(io.StringIO()):
        run.trainer.train()
