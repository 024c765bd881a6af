"""Teachers: models that score the student's rollouts and write rollouts of their own.

Names are imported on first use, so that the HTTP client in `remote` needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

_SOURCES = {
    "AdapterTeacher": "adapter",
    "LocalTeacher": "local",
    "RoutedTeacher": "routed",
    "Sampling": "base",
    "ServerTeacher": "server",
    "Teacher": "base",
}

__all__ = ["AdapterTeacher", "LocalTeacher", "RoutedTeacher", "Sampling", "ServerTeacher", "Teacher"]

if TYPE_CHECKING:
    from .adapter import AdapterTeacher
    from .base import Sampling, Teacher
    from .local import LocalTeacher
    from .routed import RoutedTeacher
    from .server import ServerTeacher


def __getattr__(name: str) -> Any:
    if name in _SOURCES:
        return getattr(importlib.import_module(f".{_SOURCES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
