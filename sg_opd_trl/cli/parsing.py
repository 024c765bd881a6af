"""Recipe and flags -> typed settings. Every key is known to the run, or to accelerate, or an error."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from ..errors import SGOPDConfigError, SGOPDError, did_you_mean
from .methods import METHODS
from .recipes import apply_env, load_recipe

if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig

    from .arguments import RunParser, SGOPDScriptArguments

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
    _check_values(recipe, run_dataclasses(method), parser, f"recipe {config}")
    # What the run's parser does not know must be accelerate's: no word is passed on unseen.
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
    from ..preflight import check_prompt_room

    parser = make_parser(command.method)
    values = dict(command.fields)
    # A recipe may name a single function without a list, as a flag may.
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
    from .arguments import RunParser

    return RunParser(run_dataclasses(method), prog="sg-opd train", allow_abbrev=False)


def run_dataclasses(method: str) -> tuple[Any, ...]:
    """The dataclasses whose fields are the settings of one method."""
    from trl import DatasetMixtureConfig, ModelConfig

    from .arguments import SGOPDScriptArguments

    return (SGOPDScriptArguments, METHODS[method].config_class, ModelConfig, DatasetMixtureConfig)


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
    # By hand: this runs before the method is known, and only with it the fields that argparse needs.
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
    method = flag if flag is not None else recipe.get("method", next(iter(METHODS)))
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
    """The words the run's parser left over, if accelerate's launcher takes them all.

    Raises:
        SGOPDConfigError: a word that neither of them knows.
    """
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


def _check_values(recipe: Mapping[str, Any], kinds: Iterable[type], parser: "RunParser", where: str) -> None:
    """Refuse values that the flag of the same name would refuse; keys that no dataclass has are passed over.

    TRL's parser converts strings and takes everything else as it comes: `max_steps: "ten"` would fail, but
    `max_steps: [10]` only somewhere in the trainer.

    Args:
        recipe: settings as the YAML file has them.
        kinds: dataclasses of the run.
        parser: of the same dataclasses.
        where: the recipe, for messages.

    Raises:
        SGOPDConfigError: a value of another type, or outside the choices of a field, or an unknown key of `datasets`.
    """
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    for key, value in recipe.items():
        if key not in hints:
            continue
        if isinstance(value, str):
            _check_word(parser, key, value, where)
        elif not _accepts(hints[key], value):
            raise SGOPDConfigError(
                f"`{key}` in {where} must be {_describe(hints[key])}, got {value!r} ({type(value).__name__}). It is "
                "the type of the field. Change the value."
            )
    _check_mixture(recipe.get("datasets"), where)


def _check_word(parser: "RunParser", key: str, value: str, where: str) -> None:
    """Strings are what flags are made of: the parser's own conversion and choices decide."""
    try:
        parser.parse_known_args([f"--{key}={value}"])
    except SGOPDConfigError as error:
        raise SGOPDConfigError(f"`{key}` in {where} must be a valid value, got {value!r}. {error}") from error


def _accepts(hint: Any, value: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        parts = get_args(hint)
        if any((get_origin(part) or part) in (dict, list) for part in parts):
            # Here a string is JSON, another spelling of the container, which the parser has looked at already.
            parts = tuple(part for part in parts if part is not str)
        return any(_accepts(part, value) for part in parts)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, (str, int, float))  # a run may be called 2026
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def _describe(hint: Any) -> str:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = ["null" if part is type(None) else str(getattr(part, "__name__", part)) for part in parts]
    return " or ".join(names)


def _check_mixture(mixture: Any, where: str) -> None:
    from trl.scripts.utils import DatasetConfig

    known = [field.name for field in fields(DatasetConfig)]
    for entry in mixture or []:
        for key in entry if isinstance(entry, dict) else []:
            if key not in known:
                raise SGOPDConfigError(f"Unknown key `{key}` of `datasets` in {where}.{did_you_mean(key, known)}")
