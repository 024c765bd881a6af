"""Settings and names as they may be shown to others: no secrets, no folders of this machine."""

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

from ..evaluation import EvaluationResult
from ..scrubbing import is_secret_name, scrubbed
from ..setting import defaults_of

_NOT_OF_THE_METHOD = ("accelerator_config", "disable_tqdm", "logging_dir")  # filled in by the config itself
_LONGEST_VALUE = 200  # characters: two lines of the page


class Setting(NamedTuple):
    """A setting that differs from its default, as text."""

    name: str
    value: str
    default: str


def shown_settings(config: Any) -> list[Setting]:
    """The settings a reader needs to repeat the run: everything that is not at its default.

    Secrets are left out, local folders appear by their last part.

    Args:
        config: a dataclass such as `SGOPDConfig`, or a mapping of settings; a mapping's names are looked up in
            `SGOPDConfig` and `StudentConfig`, and names that neither knows are shown if they say anything.

    Returns:
        Settings in the order of definition.
    """
    if is_dataclass(config):
        values = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
        defaults = defaults_of(type(config))
    else:
        values, defaults = dict(config), _run_defaults()
    return [
        Setting(name, show_value(value), show_value(defaults[name]) if name in defaults else "")
        for name, value in values.items()
        if name not in _NOT_OF_THE_METHOD
        and _is_plain(value)
        and not is_secret_name(name)
        and _normal(value) != (_normal(defaults[name]) if name in defaults else None)
    ]


def shown_results(evaluations: Mapping[str, EvaluationResult | Mapping[str, Any]]) -> dict[str, EvaluationResult]:
    """Results, also those given as `to_dict`, with models and data sets named as they may be shown."""
    results = {
        label: result if isinstance(result, EvaluationResult) else EvaluationResult.from_dict(result)
        for label, result in evaluations.items()
    }
    return {
        label: replace(
            result,
            model=show_value(result.model),
            base_model=None if result.base_model is None else show_value(result.base_model),
            dataset=None if result.dataset is None else show_value(result.dataset),
        )
        for label, result in results.items()
    }


def show_value(value: Any) -> str:
    """A value as short text without secrets."""
    text = str(_named(scrubbed(_plain(value))))
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def display_name(name: str) -> str:
    """A model or data set as it may be shown: Hub ids stay, of a local folder only its last part."""
    return os.path.basename(os.path.normpath(name)) if is_local(name) else name


def is_local(name: str) -> bool:
    """Whether a name means a folder or file of this machine."""
    looks_local = os.path.isabs(name) or name.startswith(("./", "../", "~")) or name in (".", "..")
    return bool(name) and (looks_local or os.path.exists(name))


def _run_defaults() -> dict[str, Any]:
    from ..config import SGOPDConfig, StudentConfig

    return defaults_of(StudentConfig) | defaults_of(SGOPDConfig)


def _is_plain(value: Any) -> bool:
    """Objects that a config builds for itself have no text worth showing."""
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, Enum, os.PathLike))


def _normal(value: Any) -> Any:
    """For comparing: the ways in which a config says "nothing" are one."""
    plain = _plain(value)
    return None if plain in ("", "none", [], {}) else plain


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return value


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _named(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    return display_name(value) if isinstance(value, str) else value
