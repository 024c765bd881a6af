"""Types of a recipe's values. TRL's parser converts strings and takes everything else as it comes."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from sg_opd_trl.cli.arguments import RunParser
from sg_opd_trl.cli.suggest import did_you_mean
from sg_opd_trl.errors import SGOPDConfigError


def check_values(recipe: Mapping[str, Any], kinds: Iterable[type], parser: RunParser, where: str) -> None:
    """Refuse values that the flag of the same name would refuse; keys that no dataclass has are passed over.

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


def _check_word(parser: RunParser, key: str, value: str, where: str) -> None:
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
            parts = tuple(
                part for part in parts if part is not str
            )  # there, strings are another spelling of the container
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
