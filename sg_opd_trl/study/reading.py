"""Values of a study file, checked one by one; a key that nobody asked for is an error."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import SGOPDConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Block:
    """One mapping of a study file, with the place it is at for messages.

    Args:
        values: as the file has them.
        where: such as "study my.yaml" or "run `opd` of study my.yaml".
        known: all keys the block may have.

    Raises:
        SGOPDConfigError: not a mapping, or an unknown key, with the nearest known one.
    """

    def __init__(self, values: Any, where: str, known: Iterable[str]) -> None:
        if not isinstance(values, Mapping):
            raise SGOPDConfigError(f"The {where} must be a mapping, got {values!r}. Its keys are {sorted(known)}.")
        self.values, self.where, self.known = values, where, list(known)
        for key in values:
            if key not in self.known:
                raise SGOPDConfigError(
                    f"Unknown key `{key}` in the {where}.{did_you_mean(str(key), self.known)} Known keys: "
                    f"{', '.join(self.known)}."
                )

    def refuse(self, key: str, rule: str, reason: str) -> SGOPDConfigError:
        """The error for a value that breaks a rule: setting, value, reason, way out."""
        return SGOPDConfigError(f"`{key}` in the {self.where} must {rule}, got {self.values.get(key)!r}. {reason}")

    def required(self, key: str) -> Any:
        """A value that has no default."""
        if self.values.get(key) is None:
            raise SGOPDConfigError(f"`{key}` must be set in the {self.where}, got nothing. It has no default. Set it.")
        return self.values[key]

    def text(self, key: str, default: str | None = None) -> str:
        """A string; required where there is no default."""
        value = self.required(key) if default is None else self.values.get(key, default)
        if not isinstance(value, str) or not value:
            raise self.refuse(key, "be a text", "Anything else names nothing. Put it in quotes.")
        return value

    def name(self, key: str) -> str:
        """A string that can be part of a folder's name."""
        return check_name(self.text(key), f"`{key}` in the {self.where}")

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "be true or false", "It is a switch. Change the value.")
        return value

    def seeds(self, key: str) -> tuple[int, ...]:
        """A list of different whole numbers >= 0."""
        value = self.required(key)
        whole = isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value)
        if not whole or len(set(value)) < len(value):
            raise self.refuse(key, "be a list of different whole numbers", "Each is one run. Set it to e.g. [0, 1].")
        return tuple(value)

    def values_of(self, key: str) -> list[Any]:
        """A list with something in it."""
        value = self.required(key)
        if not isinstance(value, list) or not value:
            raise self.refuse(key, "be a list of values", "Each is tried. Set it to e.g. [1.0, 1.8].")
        return value

    def settings(self, key: str, refused: Iterable[str] = ()) -> dict[str, Any]:
        """A mapping of fields of a run; those that the study sets itself are refused."""
        value = self.values.get(key)
        value = {} if value is None else value
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.refuse(key, "be a mapping of fields to values", "It overrides the recipe. Change the value.")
        taken = sorted(set(refused) & set(value))
        if taken:
            raise self.refuse(key, f"not hold {taken}", "The study sets these for every run. Remove them.")
        return dict(value)


def check_name(name: Any, what: str) -> str:
    """A name that can be part of a folder's name.

    Raises:
        SGOPDConfigError: another type, or other characters.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SGOPDConfigError(
            f"{what} must be letters, digits, `_`, `-` and `.`, got {name!r}. It names a folder. Rename it."
        )
    return name


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` with the nearest known name, or nothing when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean `{near[0]}`?" if near else ""
