"""`sg-opd check`: everything that can be seen of a recipe without training, in one table."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, SGOPDConfigError, SGOPDError, TeacherError, VerifierError
from ..files import check_file, write_atomically
from ..scrubbing import shown
from ..teacher_sampling.stored.store import is_hub_id
from .command import CommandParser
from .outside import concerning, explained
from .parsing import CommandLine, TrainSettings, build_settings, pop_option, read_command_line
from .rewards import load_reward_funcs
from .train import build_trainer, check_before_loading, check_tokenizers, load_data, resolve_names

if TYPE_CHECKING:
    from ..inspection.report import Report, Row

_WIDTH = 160
EXIT_RED = 2
"""As after any other error of a user."""
# What a refusal is about, by its kind.
_ABOUT: tuple[tuple[type[SGOPDError], str], ...] = (
    (DataError, "data"),
    (TeacherError, "teacher"),
    (VerifierError, "verifier"),
)


def run(argv: Sequence[str], *, debug: bool = False) -> int:
    """`sg-opd check --config RECIPE [--FIELD VALUE ...] [--json FILE] [--prompts N]`: print a table.

    The trainer is built as `sg-opd train` builds it, in this process alone; nothing is trained, pushed, tracked or
    written into the output folder.

    Args:
        argv: words after `check`.
        debug: raise what the package refuses in place of telling it in a row.

    Returns:
        0 where no row is red, 2 otherwise.
    """
    options, words = _own_options(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SGOPDConfigError(
            f"`sg-opd check` must run as one process, got {os.environ['WORLD_SIZE']}. Each would say the same. Start "
            "it without a launcher; keys of one in the recipe are left out."
        )
    check_file("json", options.json)
    report = check(words, options.prompts, debug=debug)
    if options.json is not None:
        write_atomically(options.json, shown(json.dumps(report.as_dict(), indent=1)) + "\n")
    _show(report)
    return EXIT_RED if report.state == "red" else 0


def check(words: Sequence[str], prompts: int, *, debug: bool = False) -> "Report":
    """The report of a recipe.

    Args:
        words: the command line of `sg-opd train`.
        prompts: that are sampled, a group of rollouts each; 0 samples nothing.
        debug: raise what the package refuses.
    """
    from ..inspection.report import Report

    start = time.perf_counter()
    rows: list[Row] = []
    inspection = _Inspection(rows, debug)
    command = inspection.tried("settings", lambda: read_command_line(words))
    settings = command and inspection.tried("settings", lambda: build_settings(command))
    if settings:
        with tempfile.TemporaryDirectory() as folder:
            inspection.of(command, settings, prompts, folder)
    else:
        inspection.versions()
    return Report(tuple(rows), time.perf_counter() - start)


class _Inspection:
    """The stages of a run until its trainer is there; what a stage that fails leaves is looked at all the same."""

    def __init__(self, rows: "list[Row]", debug: bool) -> None:
        self.rows, self.debug = rows, debug

    def tried(self, about: str, action: Callable[[], Any]) -> Any:
        """The result of an action, or None and red rows of what the package says against it."""
        from ..inspection.report import rows_of_error

        try:
            return action()
        except SGOPDError as error:
            if self.debug:
                raise
            name = next((name for kind, name in _ABOUT if isinstance(error, kind)), about)
            self.rows += rows_of_error(name, error)
            return None

    def of(self, command: CommandLine, settings: TrainSettings, prompts: int, folder: str) -> None:
        """All rows of settings that are valid on their own.

        Args:
            command: which they are from.
            settings: of the run; changed so that nothing of it is seen outside.
            prompts: that are sampled.
            folder: what a trainer writes where it is built goes there.
        """

        def tried(about: str, action: Callable[[], Any]) -> Any:
            def told() -> Any:
                with explained(settings.named):
                    return action()

            return self.tried(about, told)

        tried("output", lambda: check_before_loading(settings))
        if command.launch or command.launch_flags:
            self._say_one_process()
        keep_inside(settings, folder)
        resolved = tried("models", lambda: _resolved(settings))
        rewards = tried("verifier", lambda: load_reward_funcs(settings.script.reward_funcs))
        data = tried("data", lambda: load_data(settings, rewards or []))
        trainer = None
        if resolved and rewards and data and settings.script.method == "sg_opd":
            trainer = tried("settings", lambda: build_trainer(settings, rewards, *data))
        if trainer is not None:
            report = tried("trainer", lambda: trainer.check(prompts))
            self.rows += report.rows if report is not None else ()
            return
        self.versions()
        if resolved:
            self._add(tried("models", lambda: list(_text_rows(settings, data))))
        if rewards and data:
            self._add(tried("verifier", lambda: _verifier_rows(settings, rewards, data)))
        if settings.script.method != "sg_opd":
            self._say_other_method(settings.script.method)

    def versions(self) -> None:
        """The row that needs nothing of a run."""
        from ..inspection.stack import stack_row

        self.rows.append(stack_row())

    def _add(self, rows: "list[Row] | None") -> None:
        # What has kept the trainer from being built is told already.
        told = {row.found for row in self.rows}
        self.rows += [row for row in rows or [] if row.found not in told]

    def _say_one_process(self) -> None:
        from ..inspection.report import Row

        self.rows.append(Row("processes", "green", "The run has several; all of this is seen in one of them."))

    def _say_other_method(self, method: str) -> None:
        from ..inspection.report import Row

        said = (
            f"`method: {method}` is trained by TRL's own trainer: settings, models, data and verifier are looked at."
        )
        self.rows.append(Row("method", "green", said))


def _resolved(settings: TrainSettings) -> bool:
    resolve_names(settings)
    check_tokenizers(settings)
    return True


def keep_inside(settings: TrainSettings, folder: str) -> None:
    """Change settings so that building a trainer leaves nothing behind.

    Args:
        settings: of the run.
        folder: a temporary one, which takes the output folder's place.
    """
    training = settings.training
    training.output_dir = folder
    training.push_to_hub, training.report_to, training.disable_tqdm = False, [], True
    if "log_completions_hub_repo" in settings.named():
        training.log_completions_hub_repo = None
    stored = settings.named().get("teacher_rollouts_path")
    # What is stored is compared with the run; a folder that would be created is not.
    if stored is not None and not is_hub_id(stored) and not Path(stored).is_dir():
        training.teacher_rollouts_path = None


# --- what is known without a trainer ---------------------------------------------------------------------------------
def _text_rows(settings: TrainSettings, data: Any) -> "Iterator[Row]":
    from ..data import first_prompts
    from ..inspection.texts import chat_rows, tokenizer_rows

    (student,) = _tokenizers(settings, "model_name_or_path").values()
    others: dict[str, Any] = {}
    for role in ("teacher", "reference"):
        name = f"{role}_model_name_or_path"
        others |= _tokenizers(settings, name, role) if settings.named().get(name) is not None else {}
    yield from tokenizer_rows(student, others)
    if data:
        kwargs = settings.named().get("chat_template_kwargs") or {}
        yield from chat_rows(student, others, first_prompts(data[0]), kwargs, [student.eos_token_id])


def _tokenizers(settings: TrainSettings, setting: str, role: str = "student") -> dict[str, Any]:
    """Those of the models that a setting names, by what messages call them."""
    from transformers import AutoTokenizer

    named = settings.named()
    value = named[setting]
    names = {f"{role} {key}": one for key, one in value.items()} if isinstance(value, dict) else {role: value}
    revision = named.get("model_revision" if role == "student" else f"{role}_model_revision")
    found = {}
    for key, name in names.items():
        with concerning(setting, name):
            found[key] = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=settings.training.trust_remote_code
            )
    return found


def _verifier_rows(settings: TrainSettings, rewards: Sequence[Any], data: Any) -> "list[Row]":
    from ..data import first_rows
    from ..inspection.run import rows_of_verifier
    from ..verifiers.bounded import bounded
    from ..verifiers.verdicts import RunVerifier

    named = settings.named()
    rewards = bounded(list(rewards), named.get("verifier_timeout"))
    verifier = RunVerifier(
        rewards, [each.__name__ for each in rewards], named.get("verifier_reward_func"), binary=False
    )
    sets = {"train_dataset": data[0], "eval_dataset": data[1]}
    datasets = {name: first_rows(each) for name, each in sets.items() if each is not None}
    (student,) = _tokenizers(settings, "model_name_or_path").values()
    return rows_of_verifier(verifier, student, datasets)


# --- the command line ------------------------------------------------------------------------------------------------
class _Parser(CommandParser):
    """Knows its own flags; all others are those of `train`."""

    def format_help(self) -> str:
        return _HELP


_HELP = """\
usage: sg-opd check --config RECIPE [--FIELD VALUE ...] [--json FILE] [--prompts N]

Look at all that a run needs, in seconds and without training: versions, tokens and chat templates, context,
log-probs, teacher, verifier and golds, first rollouts, memory and time. One row each: green, yellow, or red, what
was found and what to change. Nothing is written but FILE; no tracker is started and nothing is pushed.

  --config RECIPE     YAML file, as for `sg-opd train`; so are all other flags (`sg-opd train --help`).
  --json FILE         Write the rows there too, for machines.
  --prompts N         Prompts that are sampled, a group of rollouts each; 0 samples nothing. [4]

Exit code: 0 where no row is red, 2 otherwise.
"""


def _own_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own flags, and the words that are those of `train`."""
    words, file = pop_option(list(argv), "json")
    words, prompts = pop_option(words, "prompts")
    parser = _Parser("sg-opd check", "")
    parser.flag("json", default=None)
    parser.flag("prompts", type=int, default=4)
    if {"-h", "--help"} & set(words):
        parser.print_help()
        parser.exit()
    given = [word for name, value in (("--json", file), ("--prompts", prompts)) if value for word in (name, value)]
    return parser.parse(given), words


def _show(report: "Report") -> None:
    from rich.console import Console

    from ..inspection.report import STATES

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)  # a file has no width, and rich would take 80 columns
    console.print(report.table())
    said = ", ".join(f"{len(list(report.in_state(state)))} {state}" for state in STATES)
    console.print(f"{said}, in {report.seconds:.1f} s")
