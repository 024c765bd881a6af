"""Recipe and flags -> typed settings. Every key is known to the run, or to accelerate, or an error."""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sg_opd_trl.cli.recipes import apply_env, load_recipe
from sg_opd_trl.cli.suggest import did_you_mean
from sg_opd_trl.cli.values import check_values
from sg_opd_trl.errors import SGOPDConfigError, SGOPDError

if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig

    from sg_opd_trl.cli.arguments import RunParser, SGOPDScriptArguments

METHODS = ("sg_opd", "grpo", "sft", "seqkd", "gkd")
ACCELERATE_CONFIG = "accelerate_config"


@dataclass(frozen=True)
class CommandLine:
    """Names checked, values not yet built into configurations.

    Attributes:
        fields: the recipe's values for the run's own fields.
        flags: arguments for the run's own fields, `--config` taken out.
        launch: keys for accelerate's launcher, from the recipe, then from the flags.
        launch_flags: the part of `launch` that came from flags, as words.
        config: path of the recipe, None without one.
        method: one of `METHODS`.
    """

    fields: dict[str, Any]
    flags: list[str]
    launch: dict[str, Any]
    launch_flags: list[str]
    config: str | None
    method: str


@dataclass
class TrainSettings:
    """One training run, ready to start."""

    script: "SGOPDScriptArguments"
    training: Any  # the configuration class of the method
    model: "ModelConfig"
    mixture: "DatasetMixtureConfig"

    @property
    def output_dir(self) -> Path:
        """Folder of the student; `transformers` has filled in its default."""
        return Path(str(self.training.output_dir))

    @property
    def student(self) -> str:
        """Name or path of the student.

        Raises:
            SGOPDConfigError: not set.
        """
        if self.model.model_name_or_path is None:
            raise SGOPDConfigError(
                "`model_name_or_path` must be set, got None. It is the student. Set it to a folder, a Hub id or "
                "`builtin/arithmetic-student`."
            )
        return self.model.model_name_or_path


def read_command_line(argv: Iterable[str]) -> CommandLine:
    """Read the recipe, and sort every key of it and every flag into the run's and accelerate's.

    Args:
        argv: words after `train`.

    Returns:
        The sorted command line. The recipe's `env` block has been applied.

    Raises:
        SGOPDConfigError: a bad recipe, or a key that nobody knows, with the nearest known name.
    """
    words, config = pop_option(list(argv), "config")
    recipe = load_recipe(config) if config is not None else {}
    if config is not None:
        apply_env(recipe, config)
    method = _method(words, recipe)
    parser = make_parser(method)
    own, accelerate = own_names(method), accelerate_defaults()

    unknown = [key for key in recipe if key not in own and key not in accelerate]
    if unknown:
        raise SGOPDConfigError(_unknown(unknown[0], f"recipe {config}", method, own | accelerate.keys()))
    check_values(recipe, run_dataclasses(method), parser, f"recipe {config}")
    _, left_over = parser.parse_known_args(words)
    launch_flags = _launch_flags(left_over, method, own | accelerate.keys())
    launch = {key: value for key, value in recipe.items() if key not in own}
    return CommandLine(
        fields={key: value for key, value in recipe.items() if key in own},
        flags=_without(words, left_over),
        launch=launch,
        launch_flags=launch_flags,
        config=config,
        method=method,
    )


def build_settings(command: CommandLine) -> TrainSettings:
    """Build the configurations; flags win over the recipe, the recipe over the defaults.

    Raises:
        SGOPDConfigError: a value of the wrong type, out of range, or a combination that is refused.
    """
    from sg_opd_trl.preflight import check_prompt_room

    parser = make_parser(command.method)
    values = dict(command.fields)
    if isinstance(values.get("reward_funcs"), str):
        values["reward_funcs"] = [values["reward_funcs"]]
    parser.set_defaults_with_config(**values)
    try:
        built = parser.parse_args_into_dataclasses(args=command.flags, look_for_args_file=False)
    except SGOPDError:
        raise
    except (TypeError, ValueError) as error:
        where = f" (recipe {command.config})" if command.config else ""
        raise SGOPDConfigError(f"The settings{where} are not valid: {error}") from error
    settings = TrainSettings(*built)
    check_prompt_room(settings.training, settings.script.max_prompt_tokens, "`max_prompt_tokens`")
    return settings


def make_parser(method: str) -> "RunParser":
    """TRL's parser over the fields of one method, abbreviations off: `--max_step` is not `--max_steps`."""
    from sg_opd_trl.cli.arguments import RunParser

    return RunParser(run_dataclasses(method), prog="sg-opd train", allow_abbrev=False)


def run_dataclasses(method: str) -> tuple[Any, ...]:
    """The dataclasses whose fields are the settings of one method."""
    from trl import DatasetMixtureConfig, ModelConfig

    from sg_opd_trl.cli.arguments import SGOPDScriptArguments

    return (SGOPDScriptArguments, training_class(method), ModelConfig, DatasetMixtureConfig)


def training_class(method: str) -> Any:
    """The configuration class of one method's trainer; only that one is imported."""
    module, name = {
        "sg_opd": ("sg_opd_trl.config", "SGOPDConfig"),
        "grpo": ("trl", "GRPOConfig"),
        "sft": ("sg_opd_trl.baselines.config", "TeacherSFTConfig"),
        "seqkd": ("sg_opd_trl.baselines.config", "SeqKDConfig"),
        "gkd": ("sg_opd_trl.baselines.gkd_config", "OnPolicyGKDConfig"),
    }[method]
    return getattr(importlib.import_module(module), name)


def own_names(method: str) -> set[str]:
    """Names of all fields a run of this method has."""
    return {field.name for kind in run_dataclasses(method) for field in fields(kind) if field.init}


def accelerate_defaults() -> dict[str, Any]:
    """What accelerate's launcher understands, with its defaults; `accelerate_config` is ours."""
    from accelerate.commands.launch import launch_command_parser

    known = vars(launch_command_parser().parse_args(["script"]))
    positional = {"training_script", "training_script_args", "module", "no_python"}
    return {key: value for key, value in known.items() if key not in positional} | {ACCELERATE_CONFIG: None}


def pop_option(words: list[str], name: str) -> tuple[list[str], str | None]:
    """Take `--name VALUE` or `--name=VALUE` out of a command line.

    Raises:
        SGOPDConfigError: no value, or given twice.
    """
    rest: list[str] = []
    values: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in (f"--{name}", f"--{name.replace('_', '-')}"):
            rest.append(word)
        elif equals:
            values.append(value)
        elif words:
            values.append(words.pop(0))
        else:
            raise SGOPDConfigError(f"`--{name}` must be followed by a value, got none.")
    if len(values) > 1:
        raise SGOPDConfigError(f"`--{name}` must be given once, got {values}. Settings of two files would be mixed.")
    return rest, values[0] if values else None


def _method(words: list[str], recipe: Mapping[str, Any]) -> str:
    flag = pop_option(words, "method")[1]
    method = flag if flag is not None else recipe.get("method", METHODS[0])
    if method not in METHODS:
        raise SGOPDConfigError(
            f"`method` must be one of {list(METHODS)}, got {method!r}.{did_you_mean(str(method), METHODS)}"
        )
    return method


def _unknown(name: str, where: str, method: str, known: Iterable[str]) -> str:
    if method != "sg_opd" and name in own_names("sg_opd"):
        return (
            f"`{name}` in {where} must not be set with `method: {method}`. It is a setting of SG-OPD and would have "
            f"no effect.{did_you_mean(name, known)} Remove it, or set `method: sg_opd`."
        )
    return f"Unknown key `{name}` in {where}.{did_you_mean(name, known)} `sg-opd train --help` lists all fields."


def _launch_flags(left_over: list[str], method: str, known: Iterable[str]) -> list[str]:
    """The words the run's parser left over, if accelerate's launcher takes them all."""
    from accelerate.commands.launch import launch_command_parser

    rest, _ = pop_option(left_over, ACCELERATE_CONFIG)
    # The script comes first in `parse_known_args`, because accelerate takes all words after it as the script's own.
    namespace, unknown = launch_command_parser().parse_known_args([*rest, "-m", "script"])
    if unknown or namespace.training_script != "script":
        word = unknown[0] if unknown else str(namespace.training_script)
        raise SGOPDConfigError(_unknown(word.lstrip("-").partition("=")[0], "the command line", method, known))
    return left_over


def _without(words: list[str], taken: list[str]) -> list[str]:
    """`words` less `taken`, which argparse hands back in order."""
    taken = list(taken)
    kept = []
    for word in words:
        if taken and word == taken[0]:
            taken.pop(0)
        else:
            kept.append(word)
    return kept
