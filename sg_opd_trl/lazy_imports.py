"""Lazy names: a package that imports its modules when one of their names is first used (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, str], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` of a package.

    A package also lists its names in `__all__`, and imports them under `TYPE_CHECKING`: type checkers and editors
    read the source and do not run this.

    Args:
        package: its `__name__`.
        names: public name -> the module of the package that defines it.
        modules: modules of the package that are public themselves.
    """

    def get(name: str) -> Any:
        # Python calls this only for what the package does not have yet, and `import_module` caches the module: a
        # second access is one look into `sys.modules`. The name itself is not cached, so that a test's patch of the
        # module is seen.
        if name in names:
            return getattr(importlib.import_module(f".{names[name]}", package), name)
        if name in modules:
            return importlib.import_module(f".{name}", package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def public_names() -> list[str]:
        # Read when asked, so that `__all__` may stand above or below the call of `lazy_names`.
        return sorted([*sys.modules[package].__all__, *modules])

    return get, public_names
