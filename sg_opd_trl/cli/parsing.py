"""Recipe and flags -> typed settings. Every key is known to the run, or to accelerate, or an error."""

import argparse
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from ..errors import SGOPDConfigError, SGOPDError, did_you_mean
from ..setting import Rule, declared, defaults_of
from .foreign_keys import advice_for
from .methods import METHODS
from .outside import lost_processes
from .recipes import apply_env, load_recipe
from .values import as_field, as_launch_word

if TYPE_CHECKING:
    from trl import DatasetMixtureConfig

    from ..config import StudentConfig
    from .arguments import RunParser, SGOPDScriptArguments

_BOUNDS: Mapping[str, Rule] = {
    "learning_rate": Rule(at_least=0, why="It is how far a step goes."),
    "weight_decay": Rule(at_least=0, why="It pulls weights towards zero."),
    "adam_beta1": Rule(at_least=0, below=1, why="It is a decaying mean's share."),
    "adam_beta2": Rule(at_least=0, below=1, why="It is a decaying mean's share."),
    "adam_epsilon": Rule(at_least=0, why="It keeps a division finite."),
    "max_grad_norm": Rule(at_least=0, why="It is the longest gradient; 0 leaves gradients alone."),
    "num_train_epochs": Rule(above=0, why="It is how often the data are gone through."),
    "per_device_train_batch_size": Rule(at_least=1, why="It is a count."),
    "per_device_eval_batch_size": Rule(at_least=1, why="It is a count."),
    "gradient_accumulation_steps": Rule(at_least=1, why="It is a count."),
    "max_completion_length": Rule(at_least=1, why="It is a count of tokens."),
    "logging_steps": Rule(above=0, why="It is a count of steps, or a share of them."),
    "save_steps": Rule(above=0, why="It is a count of steps, or a share of them."),
    "save_total_limit": Rule(at_least=1, why="It is a count of checkpoints."),
    "dataloader_num_workers": Rule(at_least=0, why="It is a count of processes."),
    "seed": Rule(at_least=0, below=2**32, why="It seeds NumPy too, which takes no other numbers."),
    "lora_r": Rule(at_least=1, why="It is a rank."),
    "lora_alpha": Rule(above=0, why="It scales the adapter."),
    "lora_dropout": Rule(at_least=0, below=1, why="It is a probability."),
}
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
    model: "StudentConfig"
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

    def named(self) -> dict[str, Any]:
        """All settings by name, as they are now: built-in names become folders during a run."""
        return {name: value for part in self.parts for name, value in vars(part).items()}

    @property
    def parts(self) -> tuple[Any, ...]:
        """The configurations that hold them."""
        return self.model, self.script, self.training


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
        # All at once: somebody who brings a recipe from elsewhere has several.
        raise SGOPDConfigError(_unknown(unknown, f"recipe {config}", method, own | accelerate.keys()))
    recipe = _values(recipe, method, parser, f"recipe {config}")
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
    from ..config import unpin
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
    except (TypeError, ValueError, ImportError, OSError, RuntimeError) as error:
        if (meeting := lost_processes(error)) is not None:
            raise SGOPDConfigError(meeting) from error
        where = f" (recipe {command.config})" if command.config else ""
        owners = _owners(parser, command, str(error))
        raise SGOPDConfigError(f"The settings{where} are not valid: {owners}{str(error).strip()}") from error
    settings = TrainSettings(*built)
    unpin(settings.training)  # the configurations of the baselines are TRL's
    _check_numbers(settings)
    optim_args = settings.named().get("optim_args")
    if optim_args and not all("=" in part for part in optim_args.split(",")):
        raise SGOPDConfigError(f"`optim_args` must be name=value pairs with commas between them, got {optim_args!r}.")
    check_prompt_room(settings.training, settings.script.max_prompt_tokens, "`max_prompt_tokens`")
    return settings


def _owners(parser: "RunParser", command: CommandLine, text: str) -> str:
    """`` `name`: `` of the settings with the value that an enumeration refuses, which says its own name only."""
    refused = re.match(r"'?(.+?)'? is not a valid ", text)
    if refused is None:
        return ""
    found, _ = parser.parse_known_args(command.flags)
    names = [f"`{name}`" for name, value in vars(found).items() if value == refused.group(1)]
    return f"{' and '.join(names)}: " if names else ""


def _check_numbers(settings: TrainSettings) -> None:
    """Bounds of numbers that the libraries leave unchecked, or check after the models are loaded.

    Raises:
        SGOPDConfigError: lists all that are out of bounds.
    """
    named = settings.named()
    usual = {name: value for part in settings.parts for name, value in defaults_of(type(part)).items()}
    present = [
        (name, rule, named[name]) for name, rule in _BOUNDS.items() if isinstance(named.get(name), (int, float))
    ]
    problems = [rule.problem(name, value, usual[name]) for name, rule, value in present]
    found = [problem for problem in problems if problem is not None]
    if found:
        raise SGOPDConfigError("\n".join(found))


def make_parser(method: str) -> "RunParser":
    """TRL's parser over the fields of one method."""
    from .arguments import RunParser

    return RunParser(run_dataclasses(method), method, field_types(method), own_words(method))


def run_dataclasses(method: str) -> tuple[Any, ...]:
    """The dataclasses whose fields are the settings of one method."""
    from trl import DatasetMixtureConfig

    from ..config import StudentConfig
    from .arguments import SGOPDScriptArguments

    return (SGOPDScriptArguments, METHODS[method].config_class, StudentConfig, DatasetMixtureConfig)


def own_names(method: str) -> set[str]:
    """Names of all fields a run of this method has."""
    return {field.name for kind in run_dataclasses(method) for field in fields(kind) if field.init}


def field_types(method: str) -> dict[str, Any]:
    """The types of all fields that a run of this method has."""
    return {name: hint for kind in run_dataclasses(method) for name, hint in get_type_hints(kind).items()}


def own_words(method: str) -> dict[str, Sequence[str]]:
    """The words of settings that declare their choices, of which 'none' may be one."""
    return {name: each.rule.choices for name, each in declared(METHODS[method].config_class).items()}


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


def _unknown(names: Sequence[str], where: str, method: str, known: Iterable[str]) -> str:
    known = set(known)
    lines = [_unknown_key(name, where, method, known) for name in names]
    return "\n".join([*lines, "`sg-opd train --help_all` lists all fields."]) if lines else ""


def _unknown_key(name: str, where: str, method: str, known: Collection[str]) -> str:
    name = name.replace("-", "_")
    if method != "sg_opd" and name in own_names("sg_opd"):
        return (
            f"`{name}` in {where} must not be set with `method: {method}`. It is a setting of SG-OPD and would have "
            f"no effect.{did_you_mean(name, known)} Remove it, or set `method: sg_opd`."
        )
    advice = advice_for(name, known)
    return f"Unknown key `{name}` in {where}.{f' {advice}' if advice else did_you_mean(name, known)}"


def _launch_flags(left_over: list[str], method: str, known: Iterable[str]) -> list[str]:
    """The words the run's parser left over, if accelerate's launcher takes them all.

    Raises:
        SGOPDConfigError: a word that neither of them knows.
    """
    from accelerate.commands.launch import launch_command_parser

    rest, _ = pop_option(left_over, ACCELERATE_CONFIG)
    # The script comes first in `parse_known_args`, because accelerate takes all words after it as the script's own.
    launcher = launch_command_parser()
    launcher.exit_on_error = False  # its own way is to print its usage and leave
    try:
        namespace, unknown = launcher.parse_known_args([*rest, "-m", "script"])
    except argparse.ArgumentError as error:
        raise SGOPDConfigError(f"The command line is not valid: {error}. Correct the value.") from error
    if unknown or namespace.training_script != "script":
        # All flags at once; the launcher stops at the first word that it cannot place.
        flags = [word.lstrip("-").partition("=")[0] for word in rest if word.startswith("--")]
        strange = [flag for flag in dict.fromkeys(flags) if flag.replace("-", "_") not in known]
        names = strange or [str((unknown or [namespace.training_script])[0]).lstrip("-").partition("=")[0]]
        raise SGOPDConfigError(_unknown(names, "the command line", method, known))
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


def _values(recipe: Mapping[str, Any], method: str, parser: "RunParser", where: str) -> dict[str, Any]:
    """A recipe's values as their fields hold them; all that do not fit are told at once.

    TRL's parser converts texts and takes everything else as it comes: `max_steps: "ten"` would fail, but
    `max_steps: [10]` only somewhere in the trainer.

    Args:
        recipe: settings as the YAML file has them.
        method: of the run.
        parser: of its dataclasses.
        where: the recipe, for messages.

    Raises:
        SGOPDConfigError: a value of another type, or outside the choices of a field, or an unknown key of `datasets`.
    """
    hints, words = field_types(method), own_words(method)
    found, problems = {}, []
    for key, value in recipe.items():
        try:
            if key in hints:
                found[key] = as_field(key, hints[key], value, words.get(key, ()))
                if isinstance(found[key], str):
                    _check_word(parser, key, found[key])
            else:
                found[key] = as_launch_word(key, value)
        except ValueError as error:
            problems.append(f"`{key}` in {where} {str(error).removesuffix('.')}.")
    if problems:
        raise SGOPDConfigError("\n".join(problems))
    _check_mixture(found.get("datasets"), where)
    return found


def _check_word(parser: "RunParser", key: str, value: str) -> None:
    """Texts are what flags are made of: the parser's own conversion and choices decide."""
    try:
        parser.parse_known_args([f"--{key}={value}"])
    except SGOPDConfigError as error:
        raise ValueError(f"must be a valid value, got {value!r}. {error}") from error


def _check_mixture(mixture: Any, where: str) -> None:
    from trl.scripts.utils import DatasetConfig

    known = [field.name for field in fields(DatasetConfig)]
    for entry in [mixture] if isinstance(mixture, str) else mixture or []:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise SGOPDConfigError(
                f"`datasets` in {where} must be a list of mappings with a `path`, got {str(entry)[:200]!r}. Each is "
                "one part of a mixture. Set for example [{path: builtin/arithmetic}], or `dataset_name` for one alone."
            )
        for key in entry:
            if key not in known:
                raise SGOPDConfigError(f"Unknown key `{key}` of `datasets` in {where}.{did_you_mean(key, known)}")
