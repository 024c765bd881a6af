"""What the tests of the HTTP client share: sequences, a connected client, and ways of a server to fail.

A server that must be waited for waits for an event, and never for a number of seconds: a busy machine changes nothing.
"""

import asyncio
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from sg_opd_trl.errors import NonFiniteError, SGOPDError, TeacherError
from sg_opd_trl.teachers.client import CompletionsClient
from sg_opd_trl.teachers.http import RequestLimits, background_loop
from teachers.fake_server import SECRET, FakeServer, scripted_logps, send

LIMITS = RequestLimits(timeout=60.0, max_retries=0)
PATIENT = LIMITS._replace(max_retries=5)
# For servers that never answer.
SHORT = LIMITS._replace(timeout=0.25)
IDS = [3, 5, 6, 4, 8, 9]
SEQUENCES = [[3, 5, 6], [3, 7, 9, 10, 11], [4, 5], [3, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14]]
FIRSTS = [1, 3, 1, 2, 2, 1]


def connected(*servers: FakeServer, limits: RequestLimits = LIMITS, **arguments: Any) -> CompletionsClient:
    client = CompletionsClient([server.url for server in servers], limits, **arguments)
    client.connect("teacher")
    return client


def expected(ids: list[int], first: int) -> list[float]:
    rows = scripted_logps(ids)
    return [rows[position][ids[position]] for position in range(first, len(ids))]


def assert_all_scored(found: list) -> None:
    wanted = [expected(ids, first) for ids, first in zip(SEQUENCES, FIRSTS, strict=True)]
    assert [scores.logps for scores in found] == [pytest.approx(logps) for logps in wanted]


def choice(change: Callable[[dict], Any]) -> Callable[[str, dict, dict], None]:
    """Change the choice of every completion."""

    def apply(path: str, request: dict, answer: dict) -> None:
        if path == "/v1/completions":
            change(answer["choices"][0])

    return apply


def stuck(handler: Any, path: str) -> bool:
    """No answer for as long as the server is there."""
    return handler.server.released.wait(60)


def hung_up(handler: Any, path: str) -> bool:
    handler.close_connection = True
    return True


def cut_off(handler: Any, path: str) -> bool:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices"')
    handler.close_connection = True
    return True


def status(number: int, body: str = SECRET) -> Callable[[Any, str], bool]:
    return lambda handler, path: send(handler, number, body.encode())


def failure(action: Callable[[], Any]) -> str:
    """The message of the error that an action ends with, after looking for secrets."""
    with pytest.raises(SGOPDError) as caught:
        action()
    assert isinstance(caught.value, TeacherError | NonFiniteError)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def under_way() -> set[asyncio.Task]:
    """What the event loop of the requests is doing."""
    return asyncio.all_tasks(background_loop(os.getpid()))
