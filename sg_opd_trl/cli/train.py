"""`sg-opd train`: from a recipe to a saved student."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SGOPDConfigError, did_you_mean
from ..files import check_folder, write_atomically
from .command import say
from .launching import check_world_size, launch, wants_launch
from .methods import METHODS
from .outside import check_vocabulary, concerning, explained
from .parsing import TrainSettings, build_settings, read_command_line
from .rewards import load_reward_funcs

if TYPE_CHECKING:
    from ..run_folder import RunFolder, Start


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
    with explained(settings.named):
        train(settings)
    return 0


def train(settings: TrainSettings, measure: Callable[[Path], dict[str, Any]] | None = None) -> Path:
    """Train as the settings say; save the student, its tokenizer, its card, logs, costs and `report.html`.

    Args:
        settings: of the run; built-in names are resolved and written back.
        measure: called with the student's folder once it is saved; returns evaluations by name for card and report.

    Returns:
        Folder of the student.
    """
    from ..run_folder import has_student, owned, read_resume

    check_before_loading(settings)
    with owned(settings.training, **_beside_settings(settings)) as folder:
        start = folder.decide(settings.training, read_resume(settings.training.resume_from_checkpoint))
        if start.finished and has_student(folder.path):
            if settings.training.process_index == 0:
                say(f"The run in {settings.output_dir} has finished: its student is left as it is.")
        else:
            _train(settings, folder, start, measure)
    return settings.output_dir


def _beside_settings(settings: TrainSettings) -> dict[str, Any]:
    """What makes the run and is no setting of its trainer; models by the names that the recipe has."""
    names = {"method", "model_name_or_path", "model_revision", "load_in_8bit", "load_in_4bit"}
    names |= {"teacher_model_name_or_path", "reference_model_name_or_path"}
    return {name: value for name, value in settings.named().items() if name in names}


def _train(
    settings: TrainSettings,
    folder: "RunFolder",
    start: "Start",
    measure: Callable[[Path], dict[str, Any]] | None,
) -> None:
    from ..hub import reach_hub
    from ..trl_seam import save_student
    from .cost import RunCost, describe_cost

    reach_hub(settings.training)
    dataset_name = settings.script.dataset_name  # before it becomes a folder of this machine: the card names it
    resolve_names(settings)
    check_tokenizers(settings)
    reward_funcs = load_reward_funcs(settings.script.reward_funcs)
    with settings.training.main_process_first(desc="data set"):
        train_dataset, eval_dataset = load_data(settings, reward_funcs)
    trainer = build_trainer(settings, reward_funcs, train_dataset, eval_dataset)
    run_cost = RunCost(settings.script.method, trainer, folder, start.checkpoint)
    trainer.add_callback(run_cost)
    if settings.script.method != "sg_opd":
        _begin_baseline(settings, folder, start, trainer, train_dataset)
    # Not None where the run starts: that would ask the configuration.
    trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint is not None else False)

    save_student(trainer, settings.output_dir)
    cost = run_cost.facts()  # on every process: their counts are gathered
    folder.record("running", **cost)
    if trainer.accelerator.is_main_process:
        say(f"Student saved to {settings.output_dir}\n{describe_cost(cost)}")
        evaluations = measure(settings.output_dir) if measure is not None else {}
        _write_card(trainer, evaluations, dataset_name)
        _write_logs(settings, trainer.state.log_history, evaluations)
    # Before the push: a Hub that fails takes nothing from the run.
    folder.record("finished")
    if settings.training.push_to_hub:
        try:
            _push(trainer, settings)
        finally:
            trainer.end()
    else:
        trainer.end()


def _begin_baseline(settings: TrainSettings, folder: "RunFolder", start: "Start", trainer: Any, rows: Any) -> None:
    """What `SGOPDTrainer.train` does for itself, for a trainer of TRL."""
    from ..run_identity import data_fingerprint, peft_identity, settings_identity

    identity = settings_identity(
        settings.training,
        train_dataset=data_fingerprint(rows),
        reward_funcs=settings.script.reward_funcs,
        peft_config=peft_identity(trainer.model),
    )
    folder.begin(identity, start.checkpoint or False)


def check_before_loading(settings: TrainSettings) -> None:
    """Refuse what only shows after minutes otherwise: a folder that cannot be written, trackers, names for the Hub.

    Raises:
        SGOPDConfigError: names the setting.
    """
    # Not before the flags are read: `--help` is answered at once.
    from ..config import SGOPDConfig
    from ..models.sampling import check_generation_kwargs
    from ..run_folder import read_resume, refuse_used
    from ..teachers.build import check_teacher_names

    check_folder("output_dir", settings.output_dir)
    check_trackers(settings.training.report_to)
    training = settings.training
    if training.push_to_hub and training.hub_model_id is not None:
        from huggingface_hub.utils import validate_repo_id

        with concerning("hub_model_id", training.hub_model_id):
            validate_repo_id(training.hub_model_id)
    if isinstance(training, SGOPDConfig):
        check_teacher_names(training.teacher_model_name_or_path)
        # The configuration has read JSON text by now. Who writes besides is known where the trainer is built.
        kwargs: Any = training.generation_kwargs
        check_generation_kwargs(kwargs, use_vllm=training.use_vllm, local_teacher_writes=False)
    checkpoint = read_resume(training.resume_from_checkpoint)
    if isinstance(checkpoint, Path) and not checkpoint.is_dir():
        raise SGOPDConfigError(
            "`resume_from_checkpoint` must be true or the folder of a checkpoint, got "
            f"{training.resume_from_checkpoint!r}. There is no such folder. Correct it, or leave it out."
        )
    if not checkpoint and not training.overwrite_output_dir:
        refuse_used(settings.output_dir)


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that transformers does not know or that are not installed.

    Raises:
        SGOPDConfigError: names them.
    """
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    known, installed = list(INTEGRATION_TO_CALLBACK), get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise SGOPDConfigError(
                f"`report_to` must be none, all, or of {known}, got {name!r}. No other tracker is known."
                f"{did_you_mean(name, known)}"
            )
        if name not in installed:
            raise SGOPDConfigError(
                f"`report_to` must name an installed tracker, got {name!r}. Its package is missing. Install it, or "
                f"set it to one of {['none', *sorted(installed)]}."
            )


def resolve_names(settings: TrainSettings) -> None:
    """Replace `builtin/...` by local folders, which the first process of each machine prepares.

    Raises:
        SGOPDConfigError: no student named, or an unknown built-in name.
    """
    from ..tasks import resolve

    settings.model.model_name_or_path = settings.student  # asked for first, so that a missing student is told at once
    owners: list[tuple[Any, str]] = [(settings.model, "model_name_or_path"), (settings.script, "dataset_name")]
    roles = ("teacher_model_name_or_path", "reference_model_name_or_path")
    owners += [(settings.training, name) for name in roles if hasattr(settings.training, name)]
    with settings.training.main_process_first(desc="built-in models and data"):
        for owner, name in owners:
            value = getattr(owner, name)
            if isinstance(value, dict):
                setattr(owner, name, {key: resolve(one) for key, one in value.items()})
            elif value is not None:
                setattr(owner, name, resolve(value))


def check_tokenizers(settings: TrainSettings) -> None:
    """Refuse model folders without a tokenizer: transformers makes an empty one up, with which nothing is read.

    Raises:
        SGOPDConfigError: names the setting and the folder.
    """
    from transformers import AutoTokenizer

    named = settings.named()
    for setting in ("model_name_or_path", "teacher_model_name_or_path", "reference_model_name_or_path"):
        value = named.get(setting)
        for name in value.values() if isinstance(value, dict) else [value]:
            # What is on the Hub is whole; an adapter may leave the tokenizer to its base.
            if not isinstance(name, str) or not (Path(name) / "config.json").is_file():
                continue
            try:
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=settings.training.trust_remote_code)
            except (OSError, ValueError):
                continue  # said where the model is loaded
            check_vocabulary(setting, name, tokenizer)


def load_data(settings: TrainSettings, reward_funcs: Sequence[Callable[..., Any]]) -> tuple[Any, Any]:
    """Training rows, and evaluation rows or None, see `load_training_data`."""
    from .loading import load_training_data

    tokenizer = None
    if settings.script.max_prompt_tokens is not None:
        from transformers import AutoTokenizer

        with concerning("model_name_or_path", settings.student):
            tokenizer = AutoTokenizer.from_pretrained(
                settings.student,
                revision=settings.model.model_revision,
                trust_remote_code=settings.training.trust_remote_code,
            )
    return load_training_data(settings, reward_funcs, tokenizer)


def build_trainer(
    settings: TrainSettings, reward_funcs: Sequence[Callable[..., Any]], train_dataset: Any, eval_dataset: Any
) -> Any:
    """The trainer of the run's method.

    Args:
        settings: of the run, names resolved.
        reward_funcs: TRL reward functions.
        train_dataset: rows with `prompt` and what the reward functions need.
        eval_dataset: the same, or None.

    Returns:
        `SGOPDTrainer`, or TRL's own: `GRPOTrainer`, `SFTTrainer` with `method: sft` and `seqkd`, `GKDTrainer`.
    """
    from transformers import ProgressCallback
    from trl import get_peft_config, get_quantization_config

    from ..preflight import check_full_student
    from ..reporting.progress import CompactProgressCallback

    settings.training.model_init_kwargs = _model_init_kwargs(settings)
    loading = {
        "quantization_config": get_quantization_config(settings.model),
        "peft_config": get_peft_config(settings.model),
    }
    if settings.script.method != "sg_opd":
        check_full_student(settings.student, settings.model.model_revision, settings.script.method)
    build = METHODS[settings.script.method].build
    trainer = build(settings.student, settings.training, list(reward_funcs), train_dataset, eval_dataset, loading)
    # One bar of ours in place of transformers', which prints every log as a dictionary.
    if not settings.training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(CompactProgressCallback())
    return trainer


def all_settings(settings: TrainSettings) -> dict[str, Any]:
    """Settings of a run as plain values, tokens masked, for reports; the script's own only where they say anything."""
    from ..config import SGOPDConfig

    script, defaults = dataclasses.asdict(settings.script), dataclasses.asdict(type(settings.script)())
    # The report knows the defaults of SG-OPD; of another trainer's own settings it gets what was changed.
    known = {field.name for field in dataclasses.fields(SGOPDConfig)}
    usual = {field.name: field.default for field in dataclasses.fields(settings.training)}
    training = settings.training.to_dict().items()
    return {
        **{name: value for name, value in script.items() if value != defaults[name]},
        **dataclasses.asdict(settings.model),
        **{name: value for name, value in training if name in known or value != usual[name]},
    }


def write_run_report(
    settings: TrainSettings, log_history: list[dict[str, float]], evaluations: Mapping[str, Any]
) -> Path:
    """Write `report.html` into the output folder and return its path."""
    from ..reporting import write_report

    return write_report(
        settings.output_dir,
        title=settings.training.run_name or settings.output_dir.name,
        config=all_settings(settings),
        log_history=log_history,
        evaluations=evaluations,
    )


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


def _write_card(trainer: Any, evaluations: dict[str, Any], dataset_name: str | None) -> None:
    from ..trainer import SGOPDTrainer

    if isinstance(trainer, SGOPDTrainer):
        trainer.evaluations = evaluations or None
    trainer.create_model_card(dataset_name=None if _is_local(dataset_name) else dataset_name)


def _is_local(dataset_name: str | None) -> bool:
    """Whether a data set is not on the Hub, so that a card does not name it."""
    elsewhere = dataset_name is None or dataset_name.startswith("builtin/") or "://" in dataset_name
    return elsewhere or Path(str(dataset_name)).exists()


def _write_logs(settings: TrainSettings, log_history: list[dict[str, float]], evaluations: Mapping[str, Any]) -> None:
    write_atomically(settings.output_dir / "log_history.json", json.dumps(log_history, indent=1) + "\n")
    if settings.script.report:
        say(f"Report written to {write_run_report(settings, log_history, evaluations)}")


def _push(trainer: Any, settings: TrainSettings) -> None:
    from ..hub import not_pushed

    completions_repo = getattr(settings.training, "log_completions_hub_repo", None)
    if trainer.accelerator.is_main_process and completions_repo is not None:
        # The scheduler uploads every two minutes, and a shorter run would end before its first upload.
        try:
            trainer.commit_scheduler.trigger().result()
        except Exception as error:
            raise not_pushed(str(trainer.hub_model_id), settings.training, error) from error
        finally:
            trainer.commit_scheduler.stop()
    address = trainer.push_folder()
    if address is not None:
        say(f"Student pushed: {address}")
