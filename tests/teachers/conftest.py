"""A stand-in for a teacher server."""

from collections.abc import Iterator

import pytest
from tiny import tiny_model

from teachers.fake_server import FakeServer
from teachers.model_server import model_server


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with model_server(tiny_model(1)) as started:
        yield started
