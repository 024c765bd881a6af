"""The client of teacher servers when servers fail and come back: nothing is lost."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from teachers.fake_server import SECRET, FakeServer, scripted_completion, send
from teachers.http_cases import (
    FIRSTS,
    IDS,
    LIMITS,
    PATIENT,
    SEQUENCES,
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
    server = FakeServer().start()
    gone = server.released
    # From the third on they are under way when it goes.
    server.delay = lambda request: 0.0 * gone.wait(120) if len(server.completions) > 2 else 0.0
    client = connected(server, limits=PATIENT._replace(concurrency=2))
    found: list[Any] = []
    with caplog.at_level(logging.WARNING):
        run = threading.Thread(target=lambda: found.extend(client.score(SEQUENCES, FIRSTS)))
        run.start()
        wait_until(lambda: len(server.completions) == 4)
        server.stop()
        server.start()
        run.join(60)
    server.stop()
    assert_all_scored(found)
    assert f"The teacher server {server.url} failed" in caplog.text
    assert len(caplog.records) == 1, "said once, not once per request"


def test_an_answer_from_before_a_failure_does_not_end_the_rest() -> None:
    """One request is under way when another fails: the replica is no better for the first one's answer."""
    answered = threading.Event()
    with (
        FakeServer(delay=lambda request: 0.0 * answered.wait(60) if request else 0.0) as server,
        FakeServer() as other,
    ):
        client = connected(server, other)
        slow = threading.Thread(target=lambda: client.score([IDS], [1]))
        slow.start()
        wait_until(lambda: len(server.completions) == 1)
        server.behave = status(503)
        client.score([SEQUENCES[0]] * 2, [1, 1])
        assert len(server.completions) == 2, "it was asked, and failed"
        answered.set()
        slow.join(60)
        server.behave = None
        client.score([SEQUENCES[0]] * 2, [1, 1])
        assert len(server.completions) == 2, "it rests, so the other one is asked first"


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
        client = connected(sick, healthy, limits=LIMITS._replace(timeout=6.0))
        sick.behave = behave
        for _ in range(2):
            found = client.score(SEQUENCES, FIRSTS)
            assert_all_scored(found)
    assert len(sick.completions) <= len(SEQUENCES) // 2, "it rests after its first failures"


def busy(wait: str) -> Callable[[Any, str], bool]:
    return lambda handler, path: send(handler, 429, b"", **{"Retry-After": wait})


@pytest.mark.parametrize(
    ("asked", "waits"),
    [
        (["7"], [7.0, 7.0]),
        (["0"], [0.5, 2.0]),
        (["100000"], [30.0, 30.0]),
        (["9" * 400], [30.0, 30.0]),
        (["-3"], [0.5, 2.0]),
        (["soon"], [0.5, 2.0]),
        (["\u00b2"], [0.5, 2.0]),
        (["Fri, 31 Dec 1999 23:59:59 GMT"], [0.5, 2.0]),
        (["Fri, 31 Dec 9999 23:59:59 GMT"], [30.0, 30.0]),
        (["Fri, 31 Dec 99999999999 23:59:59 GMT"], [0.5, 2.0]),
        # One of them may do better sooner than the other.
        (["20", "7"], [7.0, 7.0]),
    ],
    ids=str,
)
def test_a_server_that_says_how_long_to_wait(asked: list, waits: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait is longer than half of the time that is left: of 60 seconds, which do not pass here."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(round(seconds, 0 if seconds > 29 else 3))

    servers = [FakeServer().start() for _ in asked]
    client = connected(*servers, limits=LIMITS._replace(max_retries=2))
    monkeypatch.setattr("sg_opd_trl.teachers.http.asyncio.sleep", sleep)
    for server, wait in zip(servers, asked, strict=True):
        server.behave = busy(wait)
    assert "HTTP 429" in failure(lambda: client.score([IDS], [1]))
    for server in servers:
        server.stop()
    assert slept == waits


def test_all_replicas_down() -> None:
    servers = [FakeServer().start() for _ in range(2)]
    client = connected(*servers)
    for server in servers:
        server.stop()
    message = failure(lambda: client.score([IDS], [1]))
    assert all(server.url in message for server in servers)


@pytest.mark.parametrize("number", [408, 425, 429, 500, 501, 503, 507, 511, 520, 599])
def test_what_may_go_better_elsewhere_is_asked_elsewhere(number: int) -> None:
    with FakeServer() as sick, FakeServer() as healthy:
        client = connected(sick, healthy)
        sick.behave = status(number)
        assert_all_scored(client.score(SEQUENCES, FIRSTS))
        assert sick.completions


@pytest.mark.parametrize("number", [400, 404, 409, 413, 418, 451])
def test_what_is_refused_is_not_asked_again(number: int) -> None:
    with FakeServer() as sick, FakeServer() as healthy:
        client = connected(sick, healthy, limits=PATIENT)
        sick.behave = status(number)
        assert f"HTTP {number}" in failure(lambda: client.score([IDS], [1]))
        assert (len(sick.completions), len(healthy.completions)) == (1, 0)


@pytest.mark.parametrize(
    "body", [f"<html>{SECRET}</html>", "[]", "", "[" * 100_000], ids=["web page", "list", "none", "deep"]
)
def test_what_is_no_json_is_asked_elsewhere_and_not_there_again(body: str) -> None:
    with FakeServer() as odd, FakeServer() as down:
        client = connected(odd, down, limits=LIMITS._replace(max_retries=1))
        odd.behave = status(200, body)
        assert_all_scored(client.score(SEQUENCES, FIRSTS))
        odd.requests.clear()
        down.behave = status(503)
        message = failure(lambda: client.score([IDS], [1]))
        assert f"{odd.url} (an answer that is no JSON object), {down.url} (HTTP 503" in message or (
            f"{down.url} (HTTP 503 (Service Unavailable)), {odd.url} (an answer that is no JSON object)" in message
        )
        assert len(odd.completions) == 1
        down.behave = odd.behave
        assert "Point it at vLLM itself" in failure(lambda: client.score([IDS], [1]))


@pytest.mark.parametrize("retries", [0, 1])
def test_a_request_is_sent_again_as_often_as_allowed(retries: int) -> None:
    with FakeServer() as server:
        client = connected(server, limits=LIMITS._replace(max_retries=retries))
        server.behave = status(503)
        message = failure(lambda: client.score([IDS], [1]))
        assert len(server.completions) == retries + 1
    assert f"in {retries + 1} rounds" in message
    assert f"`teacher_max_retries`={retries}" in message
