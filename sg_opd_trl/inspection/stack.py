"""The libraries that are installed, against those that the package was tested with."""

import importlib.metadata
from collections.abc import Mapping
from functools import cache

from .report import Row

TESTED: Mapping[str, str] = {
    "torch": "2.13.0",
    "trl": "1.16.0",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "peft": "0.21.2",
    "math-verify": "0.9.0",
}
"""Those whose behaviour a run rests on, as `constraints/cpu.txt` pins them; a test holds the two together."""


def stack_row() -> Row:
    """Green where major and minor versions are the tested ones; what is not installed is left out."""
    return compared_with_tested(_installed())


def compared_with_tested(installed: Mapping[str, str]) -> Row:
    """The same for given versions, by name."""
    others = [
        f"{name} {version} (tested: {TESTED[name]})"
        for name, version in installed.items()
        if _minor(version) != _minor(TESTED[name])
    ]
    if not others:
        return Row("versions", "green", ", ".join(f"{name} {version}" for name, version in installed.items()))
    return Row(
        "versions",
        "yellow",
        f"Not tested with {', '.join(others)}.",
        "Install the tested ones (constraints/cpu.txt of the repository), or look at a short run of the built-in one.",
    )


# Reading the metadata of a package takes a millisecond, and it does not change while a process runs.
@cache
def _installed() -> Mapping[str, str]:
    found = {}
    for name in TESTED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _minor(version: str) -> list[str]:
    """`2.13` of `2.13.0+cpu`: a patch mends, and says so."""
    return version.partition("+")[0].split(".")[:2]
