"""Teachers: models that score the student's rollouts and write rollouts of their own.

Names are imported on first use, so that the HTTP client in `client` needs neither torch nor transformers.
"""

from typing import TYPE_CHECKING

from ..lazy_imports import lazy_names

_DEFINED_IN = {
    "AdapterTeacher": "adapter",
    "BaseTeacher": "adapter",
    "LocalTeacher": "local",
    "RoutedTeacher": "routed",
    "Sampling": "base",
    "ServerTeacher": "server",
    "Teacher": "base",
}

__all__ = ["AdapterTeacher", "BaseTeacher", "LocalTeacher", "RoutedTeacher", "Sampling", "ServerTeacher", "Teacher"]

if TYPE_CHECKING:
    from .adapter import AdapterTeacher, BaseTeacher
    from .base import Sampling, Teacher
    from .local import LocalTeacher
    from .routed import RoutedTeacher
    from .server import ServerTeacher

__getattr__, __dir__ = lazy_names(__name__, _DEFINED_IN)
