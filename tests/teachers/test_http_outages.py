"""The client of teacher servers when servers fail and come back: nothing is lost."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from sg_opd_trl.errors import TeacherError
from sg_opd_trl.teachers.http import RequestLimits
from teachers.fake_server import FakeServer, scripted_completion
from teachers.http_cases import (
    FIRSTS,
    IDS,
    PATIENT,
    SEQUENCES,
    TIMEOUT,
    assert_all_scored,
    choice,
    connected,
    cut_off,
    failure,
    hung_up,
    status,
    stuck,
    wait_until,
)


# --- outages ---------------------------------------------------------------------------------------------------------
def test_a_failure_now_and_then_costs_nothing() -> None:
    failures = iter([status(503), hung_up, cut_off])
    with FakeServer() as server:
        client = connected(server, limits=PATIENT)
        server.behave = lambda handler, path: next(failures, lambda *_: False)(handler, path)
        found = client.score(SEQUENCES, FIRSTS)
    assert_all_scored(found)


def test_a_server_that_is_stopped_and_started_again_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer(delay=lambda request: 0.02 if request else 0.0).start()
    client = connected(server, limits=PATIENT._replace(concurrency=2))
    found: list[Any] = []
    with caplog.at_level(logging.WARNING):
        run = threading.Thread(target=lambda: found.extend(client.score(SEQUENCES, FIRSTS)))
        run.start()
        wait_until(lambda: len(server.completions) >= 3)
        server.stop()
        time.sleep(0.1)
        server.start()
        run.join(5)
    server.stop()
    assert_all_scored(found)
    assert f"The teacher server {server.url} failed" in caplog.text
    assert len(caplog.records) == 1, "said once, not once per request"


def test_an_answer_from_before_a_failure_does_not_end_the_rest() -> None:
    """One request is under way when another fails: the replica is no better for the first one's answer."""
    with FakeServer(delay=lambda request: 0.2 if request.get("prompt") == IDS else 0.0) as server:
        client = connected(server, limits=PATIENT._replace(max_retries=0))
        replica = client.replicas[0]
        slow = threading.Thread(target=lambda: client.score([IDS], [1]))
        slow.start()
        wait_until(lambda: len(server.completions) == 1)
        server.behave = status(503)
        with pytest.raises(TeacherError, match="HTTP 503"):
            client.score([SEQUENCES[0]], [1])
        slow.join(2)
        assert replica.resting
        server.behave = None
        client.score([SEQUENCES[0]], [1])
        assert not replica.resting


def test_a_request_that_the_server_gave_up_is_sent_again() -> None:
    """vLLM ends what it is working on with `abort` when it is shut down."""
    ends = iter(["abort"])
    with FakeServer(change=choice(lambda c: c.update(finish_reason=next(ends, c["finish_reason"])))) as server:
        client = connected(server, limits=PATIENT)
        assert client.generate([IDS], [{"max_tokens": 4, "seed": 2}]) == [scripted_completion(IDS, 2, 4)]
    assert len(server.completions) == 2


@pytest.mark.parametrize("behave", [status(503), hung_up, stuck], ids=["503", "hung up", "stuck"])
def test_failover(behave: Callable[[Any, str], bool]) -> None:
    with FakeServer() as healthy, FakeServer() as sick:
        client = connected(sick, healthy, limits=RequestLimits(timeout=4 * TIMEOUT, max_retries=0))
        sick.behave = behave
        for _ in range(2):
            found = client.score(SEQUENCES, FIRSTS)
            assert_all_scored(found)
    # One more for the connection that was kept from the start, whose end is no failure.
    assert len(sick.completions) <= len(SEQUENCES) // 2 + 1, "it rests after its first failures"


def test_all_replicas_down() -> None:
    servers = [FakeServer().start() for _ in range(2)]
    client = connected(*servers)
    for server in servers:
        server.stop()
    message = failure(lambda: client.score([IDS], [1]))
    assert all(server.url in message for server in servers)
