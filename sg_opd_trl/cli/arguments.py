"""Script arguments of `sg-opd train`: what the trainer's configuration does not say.

Apart from `parsing`, because these classes need TRL, which takes seconds to import.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, NoReturn, get_args

from trl import ScriptArguments, TrlParser

from ..errors import SGOPDConfigError
from .help_text import short_help
from .methods import METHODS
from .values import as_field


@dataclass
class SGOPDScriptArguments(ScriptArguments):
    """Method, data set, reward functions and report of one training run, on top of `trl.ScriptArguments`.

    Raises:
        SGOPDConfigError: a count below 1, or no reward function.
    """

    method: str = field(
        default="sg_opd",
        metadata={
            "help": "'sg_opd' trains with `SGOPDTrainer`; the others with TRL's own trainers: 'grpo' without a "
            "teacher, 'sft' on its verified samples, 'seqkd' on its greedy outputs, 'gkd' on the student's rollouts "
            "with the generalized Jensen-Shannon divergence. Settings that a method lacks are unknown keys.",
            "choices": list(METHODS),
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["math_reward"],
        metadata={
            "help": "Reward functions: `math_reward`, `exact_match_reward`, or dotted import paths such as "
            "`my_package.rewards.my_reward`."
        },
    )
    question_column: str | None = field(
        default=None, metadata={"help": "Column that becomes the user's message. Default: the data set has `prompt`."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Column that becomes `solution`, the gold answer. Default: `solution`."}
    )
    instruction: str | None = field(
        default=None, metadata={"help": "Text appended to every user message on a new line."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message of every chat that has none."})
    min_difficulty: float | None = field(
        default=None, metadata={"help": "Rows whose difficulty is lower, or missing, are dropped."}
    )
    difficulty_column: str = field(default="difficulty", metadata={"help": "Column `min_difficulty` refers to."})
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "Rows with a longer prompt, chat template included, are dropped."}
    )
    eval_samples: int | None = field(
        default=None, metadata={"help": "Number of rows of the test split used for evaluation. Default: all."}
    )
    report: bool = field(default=True, metadata={"help": "Write `report.html` with the curves of the run."})

    def __post_init__(self) -> None:
        for name, value in (("max_prompt_tokens", self.max_prompt_tokens), ("eval_samples", self.eval_samples)):
            if value is not None and value < 1:
                raise SGOPDConfigError(
                    f"`{name}` must be at least 1, got {value}. It is a count. Leave it out for no limit."
                )
        if not self.reward_funcs:
            raise SGOPDConfigError(
                "`reward_funcs` must name at least one reward function, got none. The verifier is one of them. Set it "
                "to `math_reward`."
            )


class RunParser(TrlParser):
    """`trl.TrlParser` whose words are read as the fields mean them, and whose errors and help are the package's.

    Args:
        kinds: dataclasses of the run.
        method: of the run.
        types: the fields' types by name.
        words: own words of fields, such as 'none', by name.
    """

    def __init__(
        self, kinds: tuple[Any, ...], method: str, types: Mapping[str, Any], words: Mapping[str, Sequence[str]]
    ) -> None:
        # Before the parser is built: it adds the fields at once.
        self._types, self._words, self._method = types, words, method
        usage = "sg-opd train --config RECIPE [--FIELD VALUE ...]"
        # Abbreviations off: `--max_step` is not `--max_steps`.
        super().__init__(kinds, prog="sg-opd train", usage=usage, allow_abbrev=False)
        super().add_argument("--help_all", "--help-all", action=_HelpAll, help="show all fields and leave")

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Add a flag, its words read by `values.as_field` before the field's own type converts them."""
        name = names[0].lstrip("-")
        # Several words are one list, which `parse_known_args` sees whole; a switch takes no word.
        if name in self._types and "nargs" not in settings and "type" in settings:
            settings["type"] = self._reader(name, settings["type"])
            if settings.get("choices") and NoneType in get_args(self._types[name]):
                settings["choices"] = [*settings["choices"], None]
        return super().add_argument(*names, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and read lists that are given as one word: `q_proj,v_proj`, `none`."""
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) and name in self._types:
                read = self._reader(name, str)(value[0])
                setattr(found, name, value if isinstance(read, str) else read)
        return found, rest

    def _reader(self, name: str, convert: Callable[[str], Any]) -> Callable[[str], Any]:
        def read(text: str) -> Any:
            try:
                value = as_field(name, self._types[name], text, self._words.get(name, ()))
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from error
            return convert(value) if isinstance(value, str) else value

        # argparse names the type where the conversion fails.
        read.__name__ = getattr(convert, "__name__", "value")
        return read

    def format_help(self) -> str:
        """The settings that most runs touch, in groups."""
        return short_help(self._method, self.dataclass_types)

    def format_all(self) -> str:
        """Every field with its help."""
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Raises `SGOPDConfigError` instead of leaving the process."""
        raise SGOPDConfigError(f"The settings are not valid: {message}. `sg-opd train --help_all` lists all fields.")


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        # No value of it among the settings.
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        sys.stdout.write(parser.format_all())
        parser.exit()
