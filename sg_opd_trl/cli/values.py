"""What is written for a setting -> what its field holds, for recipes and flags alike.

YAML and shells know texts; a field knows what it can be. So `None` is nothing where a field may be nothing, `no` is a
word where the field has that word, and `["1e-1"]` are numbers where the field has numbers. What does not fit is an
error that says how to write it.
"""

import json
import re
import unicodedata
from collections.abc import Collection, Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ..setting import NumberOrWord

NOTHING = ("none", "null")
"""Words for nothing, in small letters: Python's and YAML's."""
_OWN_WORDS: Mapping[str, Collection[str]] = {
    "report_to": ("none",),
    "scale_rewards": ("none",),
    "mixed_precision": ("no",),
    "dynamo_backend": ("no",),
    "downcast_bf16": ("no",),
    "include_num_input_tokens_seen": ("no",),
}
"""Fields of other libraries that have such a word themselves, without saying so in a type."""
_TAKES_SWITCH = ("fsdp", "resume_from_checkpoint")
"""Texts whose libraries take true and false too."""
_NUMBERS_ONLY = ("lr_scheduler_kwargs", "generation_kwargs")
"""Dictionaries in which a text that looks like a number cannot be meant as one: other libraries calculate with it."""
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NAMES = re.compile(r"[\w.\-]+(?:\s*,\s*[\w.\-]+)+")


def is_nothing(value: Any) -> bool:
    """Whether a value is None, or a word for it."""
    return value is None or (isinstance(value, str) and value.strip().lower() in NOTHING)


def control_character(text: str) -> str | None:
    """The first character that no text means, None without one. Line breaks and tabs are meant."""
    found = (each for each in text if each not in "\n\t" and unicodedata.category(each) in ("Cc", "Zl", "Zp"))
    return next(found, None)


def as_field(name: str, hint: Any, value: Any, own_words: Collection[str] = ()) -> Any:
    """A value as its field holds it.

    Args:
        name: of the field.
        hint: its type.
        value: as YAML or JSON has it, or a flag's word.
        own_words: words that the field has of its own, such as 'none'.

    Returns:
        The value; texts stay texts where only the parser knows what they mean.

    Raises:
        ValueError: it cannot be what the field holds. The message goes on after the name: "must be ...".
    """
    words = {*own_words, *_OWN_WORDS.get(name, ()), *_words(hint)}
    kinds = _kinds(hint)
    value = _without_nothing(value, kinds, words)
    if value is None:
        return _nothing(name, kinds, words)
    if isinstance(value, str):
        return _text(name, kinds, value)
    if isinstance(value, bool):
        return _switch(name, kinds, words, value)
    if isinstance(value, list):
        return _list(name, hint, kinds, value)
    if isinstance(value, Mapping):
        return _mapping(name, hint, kinds, value)
    return _number(hint, kinds, value)


def as_launch_word(name: str, value: Any) -> Any:
    """A value of a key of accelerate's launcher: nothing is no flag, and YAML's false may be the word `no`."""
    if value is False and "no" in _OWN_WORDS.get(name, ()):
        return "no"
    return None if is_nothing(value) else value


def _kinds(hint: Any) -> tuple[Any, ...]:
    if hint is NumberOrWord:
        return float, str
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _words(hint: Any) -> set[str]:
    """The words that a type lists: members of an enumeration, literals."""
    words: set[str] = set()
    for kind in _kinds(hint):
        if isinstance(kind, type) and issubclass(kind, Enum):
            words |= {str(member.value) for member in kind}
        elif get_origin(kind) is Literal:
            words |= {word for word in get_args(kind) if isinstance(word, str)}
    return words


def _without_nothing(value: Any, kinds: tuple[Any, ...], words: set[str]) -> Any:
    if isinstance(value, str) and is_nothing(value) and value.strip().lower() not in words:
        if NoneType not in kinds:
            raise ValueError(f"must not be nothing, got {value!r}. The field has no such value. Leave it out")
        return None
    return value


def _nothing(name: str, kinds: tuple[Any, ...], words: set[str]) -> Any:
    # The field's own word for it: transformers trips over None in `report_to`, though its type has it.
    if "none" in words:
        return "none"
    if NoneType not in kinds:
        raise ValueError(f"must be {describe(kinds)}, got null. The field has no such value. Leave it out")
    return None


def _text(name: str, kinds: tuple[Any, ...], value: str) -> Any:
    bad = control_character(value)
    if bad is not None:
        raise ValueError(
            f"must be text without control characters, got {value!r} with {bad!r}. A backslash was taken for an "
            "escape. Put the text in single quotes"
        )
    containers = {get_origin(kind) or kind for kind in kinds} & {dict, list}
    if dict in containers and value.lstrip().startswith("{"):
        return _from_json(name, kinds, value)
    if list in containers and _NAMES.fullmatch(value.strip()):
        return [part.strip() for part in value.split(",")]
    return value


def _from_json(name: str, kinds: tuple[Any, ...], value: str) -> Any:
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be JSON, got {value!r}: {error}. Names and texts need double quotes") from error
    return _mapping(name, None, kinds, found)


def _switch(name: str, kinds: tuple[Any, ...], words: set[str], value: bool) -> Any:
    if bool in kinds or Any in kinds or (value is False and Literal[False] in kinds):
        return value
    # YAML reads `no` as false.
    if not value and "no" in words:
        return "no"
    if name in _TAKES_SWITCH:
        return value
    if str in kinds:
        raise ValueError(
            f"must be a text, got {value}. YAML reads yes, no, on, off, true and false as a switch. Put the word in "
            "quotes if it is meant"
        )
    raise ValueError(f"must be {describe(kinds)}, got {value}. It is the type of the field. Change the value")


def _list(name: str, hint: Any, kinds: tuple[Any, ...], value: list) -> list:
    lists = [kind for kind in kinds if (get_origin(kind) or kind) is list]
    if not lists and Any not in kinds:
        raise ValueError(f"must be {describe(kinds)}, got the list {value!r}. Give a single value")
    inner = get_args(lists[0]) if lists else ()
    if not inner:
        return [_checked(name, each) for each in value]
    return [_typed(as_field(f"{name}[{index}]", inner[0], each), inner[0]) for index, each in enumerate(value)]


def _mapping(name: str, hint: Any, kinds: tuple[Any, ...], value: Mapping) -> Any:
    # The entries of `datasets` are mappings that a dataclass is made of.
    if any((get_origin(kind) or kind) is dict for kind in kinds) or Any in kinds or not _plain(kinds):
        return _checked(name, value)
    raise ValueError(f"must be {describe(kinds)}, got the mapping {dict(value)!r}. Give a single value")


def _plain(kinds: tuple[Any, ...]) -> bool:
    known = (str, int, float, bool, NoneType)
    return all(
        kind in known or get_origin(kind) in (list, Literal) or kind is list or _is_enum(kind) for kind in kinds
    )


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _checked(name: str, value: Any) -> Any:
    """A value inside a dictionary whose library knows its types: texts are looked through."""
    if isinstance(value, Mapping):
        return {key: _checked(name, each) for key, each in value.items()}
    if isinstance(value, list):
        return [_checked(name, each) for each in value]
    if isinstance(value, str):
        value = _text(name, (str,), value)
        if name in _NUMBERS_ONLY and _NUMBER.fullmatch(value):
            return float(value) if any(mark in value for mark in ".eE") else int(value)
        # Quoted nothing is nothing: no option of these dictionaries is the word.
        return None if is_nothing(value) else value
    return value


def _typed(value: Any, kind: Any) -> Any:
    """An entry of a list, whose texts no parser converts."""
    if isinstance(value, str) and kind in (int, float):
        try:
            return kind(value)
        except ValueError as error:
            raise ValueError(f"must hold {kind.__name__}, got {value!r}. Write numbers") from error
    return value


def _number(hint: Any, kinds: tuple[Any, ...], value: Any) -> Any:
    if Any in kinds or type(value) in kinds or (isinstance(value, int) and float in kinds):
        return value
    # A run may be called 2026; beside a container a text is another spelling of that.
    if str in kinds and isinstance(value, int) and not {get_origin(kind) or kind for kind in kinds} & {dict, list}:
        return str(value)
    if str in kinds:
        # 1.10 has become 1.1 by now, and 2026-11-28 a date.
        raise ValueError(f"must be a text, got {value!r} ({type(value).__name__}). Put it in quotes")
    if any(isinstance(kind, type) and isinstance(value, kind) for kind in kinds):
        return value
    raise ValueError(
        f"must be {describe(kinds)}, got {value!r} ({type(value).__name__}). It is the type of the field. Change the "
        "value"
    )


def describe(kinds: tuple[Any, ...]) -> str:
    """Types in words."""
    return " or ".join("null" if kind is NoneType else str(getattr(kind, "__name__", kind)) for kind in kinds)
