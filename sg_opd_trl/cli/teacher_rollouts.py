"""`sg-opd teacher-rollouts`: the teacher's rollouts of a recipe, written before any run."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import SGOPDConfigError
from ..files import check_folder
from ..teacher_sampling.stored.store import is_hub_id, push_store
from .command import CommandParser, say
from .launching import check_world_size, launch, wants_launch
from .outside import explained
from .parsing import TrainSettings, build_settings, read_command_line

NAME = "teacher-rollouts"


def run(argv: Sequence[str], *, debug: bool = False) -> int:
    """`sg-opd teacher-rollouts --config RECIPE [--output DIR] [--push_to_hub ID] [--field VALUE ...]`.

    It starts as `sg-opd train` with the same recipe would, under accelerate's launcher where the recipe says so, and
    asks the teacher for every rollout that training will ask for. A killed run goes on where it stopped.

    Args:
        argv: words after `teacher-rollouts`.
        debug: show full tracebacks in launched processes too.

    Returns:
        0, or the exit status of the launched processes.
    """
    options, flags = _parser().parse_known_args(list(argv))
    command = read_command_line(["--config", options.config, *flags])
    if command.method != "sg_opd":
        raise SGOPDConfigError(
            f"`method` must be 'sg_opd', got {command.method!r}. Only its anchor reads stored rollouts; 'sft' and "
            "'seqkd' keep theirs in their output folder. Leave method out."
        )
    if wants_launch(command):
        own = {name: value for name, value in vars(options).items() if value is not None}
        words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
        return launch(command, [*words, *command.flags], debug=debug, name=NAME)
    settings = build_settings(command)
    check_world_size(settings.training.world_size)
    with explained(settings.named):
        generate(settings, options)
    return 0


def generate(settings: TrainSettings, options: argparse.Namespace) -> None:
    """Write the missing rollouts, say what was done, and push the store where that was asked for.

    Raises:
        SGOPDConfigError: a recipe without teacher rollouts, or nowhere to put them.
    """
    from ..hub import reach_hub
    from ..teacher_sampling.stored.precompute import planned_rollouts, precompute

    _check(settings.training, options)
    folder = store_folder(settings, options)
    check_folder("teacher_rollouts_path" if options.output is None else "output", folder)
    if options.push_to_hub is not None:
        # Before the teacher writes: its rollouts are what costs.
        reach_hub(settings.training, options.push_to_hub, repo_type="dataset")
    trainer = _trainer(settings, folder)
    wanted = planned_rollouts(trainer, options.train_processes)
    if not wanted:
        raise SGOPDConfigError(
            "`teacher_sampling_phase2_end_frac` must leave at least one step with an anchor, got a run that asks for "
            "no teacher rollout. There is nothing to write. Raise it and teacher_sampling_phase1_end_frac, or train "
            "longer."
        )
    counts = precompute(trainer, wanted, options.batch_size)
    if trainer.accelerator.is_main_process:
        share = f", {100 * counts.right / counts.written:.1f}% right" if counts.written else ""
        say(
            f"{len(wanted)} teacher rollouts in {folder}: {counts.stored} were there, {counts.written} written "
            f"({counts.tokens} tokens{share}) in {counts.seconds:.1f} s"
        )
        if options.push_to_hub is not None:
            private, token = settings.training.hub_private_repo, settings.training.hub_token
            say(f"Pushed: {push_store(folder, options.push_to_hub, private=private, token=token)}")
    trainer.end()


def store_folder(settings: TrainSettings, options: argparse.Namespace) -> Path:
    """Where the rollouts go: `--output`, the recipe's own folder, or one beside the student before a push.

    Raises:
        SGOPDConfigError: none of them.
    """
    path = settings.training.teacher_rollouts_path
    if options.output is not None:
        return Path(options.output)
    if path is not None and not is_hub_id(path):
        return Path(path).expanduser()
    if options.push_to_hub is not None:
        return settings.output_dir / "teacher_rollouts"
    raise SGOPDConfigError(
        f"`output` must be set, got None with teacher_rollouts_path={path!r}. The rollouts have to be written "
        "somewhere. Set --output DIR, --push_to_hub ID, or a folder as teacher_rollouts_path in the recipe; "
        "a new one of the form a/b, which also names a data set, is written ./a/b."
    )


def _parser() -> CommandParser:
    parser = CommandParser(
        f"sg-opd {NAME}",
        "Generate and judge the teacher rollouts that a recipe's anchor will ask for, into a folder that runs read "
        "with teacher_rollouts_path. All other flags are fields of the recipe, as for `sg-opd train`.",
    )
    parser.flag("config", required=True, help="recipe of the runs")
    parser.flag("output", help="folder; teacher_rollouts_path of the recipe by default")
    parser.flag("push_to_hub", help="id of a data set on the Hub that receives the folder")
    parser.flag("batch_size", type=int, default=64, help="rollouts that one process writes at once")
    parser.flag("train_processes", type=int, help="processes of the runs; by default as many as this command has")
    return parser


def _check(training: Any, options: argparse.Namespace) -> None:
    for name in ("batch_size", "train_processes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise SGOPDConfigError(f"`{name}` must be at least 1, got {value}. It is a count. Leave it out.")
    if not training.teacher_sampling_enable:
        raise SGOPDConfigError(
            "`teacher_sampling_enable` must be true, got false. The runs would ask for no teacher rollout. Leave it "
            "out of the recipe."
        )
    if training.teacher_sampling_prompts != "reserve":
        raise SGOPDConfigError(
            f"`teacher_sampling_prompts` must be 'reserve', got {training.teacher_sampling_prompts!r}. Which of the "
            "student's prompts a step has is known in the run only. Set teacher_rollouts_path to a folder and train: "
            "the first run fills it."
        )


def _trainer(settings: TrainSettings, folder: Path) -> Any:
    """The trainer that would train, with nothing in it that reaches outside or is not needed."""
    from .rewards import load_reward_funcs
    from .train import build_trainer, load_data, resolve_names

    training = settings.training
    training.teacher_rollouts_path = str(folder if folder.is_absolute() else Path.cwd() / folder)
    training.push_to_hub = training.use_vllm = False
    training.log_completions_hub_repo = None
    resolve_names(settings)
    reward_funcs = load_reward_funcs(settings.script.reward_funcs)
    with training.main_process_first(desc="data set"):
        train_dataset, eval_dataset = load_data(settings, reward_funcs)
    return build_trainer(settings, reward_funcs, train_dataset, eval_dataset)
