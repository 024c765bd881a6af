"""What may not be written: tokens and keys in settings, by their names and by their look."""

import copy
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

HIDDEN = "(hidden)"
SECRET_NAME = re.compile(r"(^|_)(token|auth|authorization|cookie)$|secret|passw|api_?key|credential", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|Bearer )[A-Za-z0-9_-]{12,}")
URL_USER = re.compile(r"(?<=://)[^/@\s]+@")


def scrubbed_text(text: str) -> str:
    """A text without what looks like a token, and without the user of a URL."""
    return URL_USER.sub("", SECRET_VALUE.sub(HIDDEN, text))


def scrubbed(value: Any) -> Any:
    """A value without secrets, itself where it has none; entries of mappings go by their names too."""
    if isinstance(value, str):
        # An enumeration of strings stays what it is.
        return scrubbed_text(value) if type(value) is str else value
    if isinstance(value, Mapping) and type(value) is dict:
        return {name: HIDDEN if _is_secret(name, each) else scrubbed(each) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(scrubbed, value))
    return value


def _is_secret(name: Any, value: Any) -> bool:
    # `True` asks for the token of the machine and is none.
    return isinstance(value, str) and bool(SECRET_NAME.search(str(name)))


class WrittenWithoutSecrets:
    """A base for configurations, which transformers pickles into every checkpoint and pushes.

    Pickles, `repr` and `to_dict` hold no secrets; the configuration itself and its copies do, and the Hub gets them.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A dataclass writes its own otherwise, with every value.
        cls.__repr__ = WrittenWithoutSecrets.__repr__  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        state = scrubbed(dict(self.__dict__))
        return {name: None if _is_secret(name, value) else value for name, value in state.items()}

    def __copy__(self) -> Any:
        made = self.__class__.__new__(self.__class__)
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = self.__class__.__new__(self.__class__)
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __repr__(self) -> str:
        shown = scrubbed({field.name: getattr(self, field.name, None) for field in fields(self) if field.repr})  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __str__(self) -> str:
        return repr(self)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for trackers, cards and reports."""
        return scrubbed(super().to_dict())  # type: ignore[misc]  # of transformers' TrainingArguments
