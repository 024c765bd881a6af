"""Fixtures of the verifier tests."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sg_opd_trl.verifiers import Judge

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def read_rows() -> Callable[[str], list[dict[str, Any]]]:
    """Reads a JSON-lines file of the shared data folder, or skips the test and says which file is missing."""

    def read(name: str) -> list[dict[str, Any]]:
        path = DATA / name
        if not path.is_file():
            pytest.skip(f"needs {name} in ../shared/data next to the repository, which is missing")
        with path.open() as lines:
            return [json.loads(line) for line in lines]

    return read


@pytest.fixture
def judge() -> Iterator[Judge]:
    """A judge of its own for each test, with a limit short enough to wait for."""
    judge = Judge(time_limit=1.0, wall_limit=20.0)
    yield judge
    judge.close()
