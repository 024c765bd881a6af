"""What every command of `sg-opd` shares: its parser, and how it speaks."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import SGOPDConfigError, did_you_mean
from .values import as_field


class CommandParser(argparse.ArgumentParser):
    """Parser whose errors are the package's, and which names the nearest flag."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            # `--max_step` must not silently be `--max_steps`: a later flag could make it ambiguous.
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.names: list[str] = []

    def flag(self, name: str, **settings: Any) -> None:
        """Add `--name`, also under its hyphenated spelling."""
        self.names.append(name)
        # A dict without values is an ordered set: argparse refuses the same spelling twice.
        self.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **settings)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`.

        Raises:
            SGOPDConfigError: an unknown flag, or a value of the wrong type.
        """
        namespace, unknown = self.parse_known_args(list(argv))
        if unknown:
            name = unknown[0].lstrip("-").partition("=")[0]
            raise SGOPDConfigError(
                f"Unknown key `{name}` in the command line.{did_you_mean(name, self.names)} `{self.prog} --help` "
                "lists all."
            )
        return namespace

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; words for nothing become None where that is the default, and texts are looked through."""
        found, rest = super().parse_known_args(args, namespace)
        self._read_texts(found)
        return found, rest

    def _read_texts(self, namespace: argparse.Namespace) -> None:
        for name, value in vars(namespace).items():
            if isinstance(value, str):
                hint = str | None if self.get_default(name) is None else str
                try:
                    setattr(namespace, name, as_field(name, hint, value))
                except ValueError as error:
                    raise SGOPDConfigError(f"`{name}` in the command line {error}.") from error

    def error(self, message: str) -> NoReturn:
        """Raises `SGOPDConfigError` instead of leaving the process."""
        raise SGOPDConfigError(f"The command line is not valid: {message}. `{self.prog} --help` lists all flags.")


def say(text: str) -> None:
    """Write to the console as it is: no line is broken, so that paths and commands can be copied."""
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(text, markup=False)
