"""How busy a replica is kept, who waits for it, and how long it is left alone after a failure."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sg_opd_trl.teachers import http as asking
from sg_opd_trl.teachers.client import CompletionsClient
from sg_opd_trl.teachers.http import Outage, Places, Replica, Reply, Request, RequestLimits, Stop
from teachers.fake_server import FakeServer
from teachers.http_cases import wait_until

IDS = [3, 5, 6, 4]
REQUEST = Request("GET", "/")


class Connections:
    """A server that fails, until it is told what to answer."""

    address = "http://a"
    reply: Reply | None = None

    def exchange(self, *_: Any) -> Reply:
        if self.reply is None:
            raise Outage("it is down")
        return self.reply


def replica(concurrency: int = 4) -> Any:
    return Replica(Connections(), concurrency)  # type: ignore[arg-type]


def ask(one: Any, seconds: float = 1.0) -> str:
    return one.ask(REQUEST, lambda body, where: body.decode(), seconds, Stop())


# --- places ----------------------------------------------------------------------------------------------------------
def test_a_place_goes_to_whoever_has_waited_longest() -> None:
    """Not to the thread that gave it back and asks again before any other has woken up."""
    places, order = Places(1), []
    assert places.take(0)

    def wait(number: int) -> None:
        assert places.take(5)
        order.append(number)
        places.give_back()

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(3)]
    for number, thread in enumerate(threads):
        thread.start()
        wait_until(lambda number=number: len(places._waiting) == number + 1)
    places.give_back()
    assert places.take(5)
    order.append(3)
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2, 3]


def test_who_gave_up_waiting_has_no_place() -> None:
    places = Places(2)
    assert [places.take(0.01) for _ in range(3)] == [True, True, False]
    places.give_back()
    assert [places.take(0.01) for _ in range(2)] == [True, False]


def test_the_wait_for_a_place_ends_at_the_deadline_and_is_no_failure_of_the_server() -> None:
    one = replica(concurrency=1)
    one.connections.reply = Reply(200, b"fine")
    assert one._places.take(0)
    started = time.monotonic()
    with pytest.raises(Outage, match="no free place in time"):
        ask(one, 0.05)
    assert 0.04 < time.monotonic() - started < 1
    assert not one.resting
    one._places.give_back()
    assert [ask(one) for _ in range(3)] == ["fine"] * 3, "every place is given back"


def test_a_failed_request_gives_its_place_back() -> None:
    one = replica(concurrency=1)
    for _ in range(3):
        with pytest.raises(Outage, match="it is down"):
            ask(one, 0.05)


def test_at_failover_the_survivor_has_no_more_requests_than_before() -> None:
    sick = FakeServer().start()
    with FakeServer(delay=lambda request: 0.02 if request else 0.0) as healthy:
        limits = RequestLimits(timeout=10.0, max_retries=0, concurrency=2)
        client = CompletionsClient([sick.url, healthy.url], limits)
        client.connect("teacher")
        sick.stop()
        assert len(client.score([IDS] * 12, [1] * 12)) == 12
    assert healthy.most_at_a_time == 2
    assert len(healthy.completions) == 12


# --- rest ------------------------------------------------------------------------------------------------------------
def test_a_replica_that_fails_again_after_its_rest_rests_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(asking, "time", SimpleNamespace(monotonic=lambda: now[0]))
    one, rests = replica(), []
    for _ in range(8):
        for _ in range(5):
            # As many requests fail at once as were under way: they are one failure.
            with pytest.raises(Outage):
                ask(one)
        rests.append(one._resting_until - now[0])
        now[0] = one._resting_until
        assert not one.resting
    assert rests == [30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 960.0, 960.0]
    one.connections.reply = Reply(200, b"")
    ask(one)
    one.connections.reply = None
    with pytest.raises(Outage):
        ask(one)
    assert one._resting_until - now[0] == 30.0, "an answer ends the series"
