"""The built-in tasks: problems, a teacher and students for each, made on this machine on first use."""

from .registry import KNOWN_NAMES, resolve

__all__ = ["KNOWN_NAMES", "resolve"]
