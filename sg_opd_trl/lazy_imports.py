"""Names of a package that are imported on first use."""

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def imported_on_first_use(
    package: str, names: Mapping[str, str], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        names: public name -> the module of the package that has it.
        modules: modules of the package that are public themselves.
    """

    def find(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(f".{names[name]}", package), name)
        if name in modules:
            return importlib.import_module(f".{name}", package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listed() -> list[str]:
        return sorted([*sys.modules[package].__all__, *modules])

    return find, listed
