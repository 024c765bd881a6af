"""`sg-opd train`: from a recipe to a saved student."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sg_opd_trl.cli.launching import check_world_size, launch, wants_launch
from sg_opd_trl.cli.parsing import TrainSettings, build_settings, read_command_line
from sg_opd_trl.cli.rewards import load_reward_funcs

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


def run(argv: Sequence[str], *, debug: bool = False) -> int:
    """`sg-opd train --config RECIPE [--field VALUE ...]`.

    With accelerate's keys (`--accelerate_config`, `--num_processes`, ... as flags or in the recipe) the command starts
    itself again under accelerate's launcher; otherwise it trains in this process.

    Args:
        argv: words after `train`.
        debug: show full tracebacks in launched processes too.

    Returns:
        0, or the exit status of the launched processes.
    """
    command = read_command_line(argv)
    if wants_launch(command):
        config = ["--config", command.config] if command.config is not None else []
        return launch(command, [*config, *command.flags], debug=debug)
    settings = build_settings(command)
    check_world_size(settings.training.world_size)
    train(settings)
    return 0


def train(settings: TrainSettings, measure: Callable[[Path], dict[str, Any]] | None = None) -> Path:
    """Train as the settings say; save the student, its tokenizer, its card, `log_history.json` and `report.html`.

    Args:
        settings: of the run; built-in names are resolved and written back.
        measure: called with the student's folder once it is saved; returns evaluations by name for card and report.

    Returns:
        Folder of the student.
    """
    dataset_name = settings.script.dataset_name
    resolve_names(settings)
    reward_funcs = load_reward_funcs(settings.script.reward_funcs)
    with settings.training.main_process_first(desc="data set"):
        train_dataset, eval_dataset = _load_data(settings, reward_funcs)
    trainer = build_trainer(settings, reward_funcs, train_dataset, eval_dataset)
    trainer.train(resume_from_checkpoint=_checkpoint(settings.training.resume_from_checkpoint))

    trainer.save_model(str(settings.output_dir))
    if trainer.accelerator.is_main_process:
        _say(f"Student saved to {settings.output_dir}")
        evaluations = measure(settings.output_dir) if measure is not None else {}
        _write_card(trainer, evaluations, dataset_name)
        _write_logs(settings, trainer.state.log_history, evaluations)
    if settings.training.push_to_hub:
        _push(trainer, settings, dataset_name)
    trainer.end()
    return settings.output_dir


def resolve_names(settings: TrainSettings) -> None:
    """Replace `builtin/...` by local folders, which the first process of each machine prepares.

    Raises:
        SGOPDConfigError: no student named, or an unknown built-in name.
    """
    from sg_opd_trl.tasks import resolve

    settings.model.model_name_or_path = settings.student  # asked for first, so that a missing student is told at once
    owners: list[tuple[Any, str]] = [(settings.model, "model_name_or_path"), (settings.script, "dataset_name")]
    if settings.script.method == "sg_opd":
        owners += [
            (settings.training, "teacher_model_name_or_path"),
            (settings.training, "reference_model_name_or_path"),
        ]
    with settings.training.main_process_first(desc="built-in models and data"):
        for owner, name in owners:
            value = getattr(owner, name)
            setattr(owner, name, value if value is None else resolve(value))


def build_trainer(
    settings: TrainSettings, reward_funcs: Sequence[Callable[..., Any]], train_dataset: Any, eval_dataset: Any
) -> "GRPOTrainer":
    """The trainer of the run's method.

    Args:
        settings: of the run, names resolved.
        reward_funcs: TRL reward functions.
        train_dataset: rows with `prompt` and what the reward functions need.
        eval_dataset: the same, or None.

    Returns:
        `SGOPDTrainer`, or TRL's `GRPOTrainer` with `method: grpo`.
    """
    from transformers import ProgressCallback
    from trl import GRPOTrainer, get_peft_config, get_quantization_config

    from sg_opd_trl.reporting.progress import CompactProgressCallback

    trainer_class: type[Any] = GRPOTrainer
    if settings.script.method == "sg_opd":
        from sg_opd_trl.trainer import SGOPDTrainer

        trainer_class = SGOPDTrainer
    settings.training.model_init_kwargs = _model_init_kwargs(settings)
    trainer = trainer_class(
        model=settings.student,
        reward_funcs=list(reward_funcs),
        args=settings.training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(settings.model),
        peft_config=get_peft_config(settings.model),
    )
    if not settings.training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(CompactProgressCallback())
    return trainer


def all_settings(settings: TrainSettings) -> dict[str, Any]:
    """Settings of a run as plain values, tokens masked, for reports; the script's own only where they say anything."""
    script, defaults = dataclasses.asdict(settings.script), dataclasses.asdict(type(settings.script)())
    return {
        **{name: value for name, value in script.items() if value != defaults[name]},
        **dataclasses.asdict(settings.model),
        **settings.training.to_dict(),
    }


def write_run_report(
    settings: TrainSettings, log_history: list[dict[str, float]], evaluations: Mapping[str, Any]
) -> Path:
    """Write `report.html` into the output folder and return its path."""
    from sg_opd_trl.reporting import write_report

    return write_report(
        settings.output_dir,
        title=settings.training.run_name or settings.output_dir.name,
        config=all_settings(settings),
        log_history=log_history,
        evaluations=evaluations,
    )


def _load_data(settings: TrainSettings, reward_funcs: Sequence[Callable[..., Any]]) -> tuple[Any, Any]:
    from sg_opd_trl.cli.loading import load_training_data

    tokenizer = None
    if settings.script.max_prompt_tokens is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            settings.student,
            revision=settings.model.model_revision,
            trust_remote_code=settings.training.trust_remote_code,
        )
    return load_training_data(settings, reward_funcs, tokenizer)


def _model_init_kwargs(settings: TrainSettings) -> dict[str, Any]:
    """The student's loading arguments; those of `model_init_kwargs` win over the model's own fields."""
    given = settings.training.model_init_kwargs
    return {
        "revision": settings.model.model_revision,
        "trust_remote_code": settings.training.trust_remote_code,
        "attn_implementation": settings.model.attn_implementation,
        "dtype": settings.model.dtype,
        **(given if isinstance(given, dict) else {}),
    }


def _checkpoint(value: str | bool | None) -> str | bool | None:
    """`true` means the newest checkpoint of the output folder; the parser only knows strings."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


def _write_card(trainer: "GRPOTrainer", evaluations: dict[str, Any], dataset_name: str | None) -> None:
    from sg_opd_trl.trainer import SGOPDTrainer

    if isinstance(trainer, SGOPDTrainer):
        trainer.evaluations = evaluations or None
    trainer.create_model_card(dataset_name=None if _is_local(dataset_name) else dataset_name)


def _is_local(dataset_name: str | None) -> bool:
    """Whether a data set is not on the Hub, so that a card does not name it."""
    return dataset_name is None or dataset_name.startswith("builtin/") or Path(dataset_name).exists()


def _write_logs(settings: TrainSettings, log_history: list[dict[str, float]], evaluations: Mapping[str, Any]) -> None:
    path = settings.output_dir / "log_history.json"
    path.write_text(json.dumps(log_history, indent=1) + "\n", encoding="utf-8")
    if settings.script.report:
        _say(f"Report written to {write_run_report(settings, log_history, evaluations)}")


def _push(trainer: "GRPOTrainer", settings: TrainSettings, dataset_name: str | None) -> None:
    """Push the student; a data set that is not on the Hub is left out of its card."""
    if trainer.accelerator.is_main_process and settings.training.log_completions_hub_repo is not None:
        # The scheduler uploads every two minutes, and a shorter run would end before its first upload.
        trainer.commit_scheduler.trigger().result()
        trainer.commit_scheduler.stop()
    commit = trainer.push_to_hub(dataset_name=None if _is_local(dataset_name) else dataset_name)
    if trainer.accelerator.is_main_process:
        _say(f"Student pushed: {commit.commit_url}")


def _say(text: str) -> None:
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(text, markup=False)
