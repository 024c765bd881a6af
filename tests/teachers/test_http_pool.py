"""How busy replicas are kept, who is served first, how long one that failed is left alone, and where requests run."""

import asyncio
import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sg_opd_trl.teachers import http
from sg_opd_trl.teachers.http import Health
from teachers.fake_server import FakeServer
from teachers.http_cases import (
    FIRSTS,
    IDS,
    LIMITS,
    SEQUENCES,
    SHORT,
    assert_all_scored,
    connected,
    under_way,
    wait_until,
)

ROOT = Path(__file__).resolve().parents[2]


def held(event: threading.Event) -> Any:
    """A delay of completions until an event."""
    return lambda request: 0.0 * event.wait(60) if request else 0.0


# --- turns -----------------------------------------------------------------------------------------------------------
def test_first_come_first_served() -> None:
    with FakeServer() as server:
        client = connected(server, limits=LIMITS._replace(concurrency=1))
        client.score(SEQUENCES, FIRSTS)
    assert [request["prompt"] for request in server.completions] == SEQUENCES


def test_a_connection_goes_to_whoever_has_waited_longest() -> None:
    """Also if those who wait are of different calls, and the one that has it wants it again."""
    opened = threading.Event()
    with FakeServer(delay=held(opened)) as server:
        client = connected(server, limits=LIMITS._replace(concurrency=1))
        calls = [SEQUENCES[:2], *([ids] for ids in SEQUENCES[2:])]
        threads = [threading.Thread(target=client.score, args=(ids, [1] * len(ids))) for ids in calls]
        tasks = 0
        for ids, thread in zip(calls, threads, strict=True):
            thread.start()
            # The call, and each of its requests; only then the next.
            tasks += 1 + len(ids)
            wait_until(lambda tasks=tasks: len(under_way()) == tasks)
        opened.set()
        for thread in threads:
            thread.join(60)
    first, *others = [request["prompt"] for request in server.completions]
    assert first == SEQUENCES[0]
    assert others == [*SEQUENCES[2:], SEQUENCES[1]]


def test_who_waited_in_vain_takes_no_connection_and_blames_no_server(caplog: pytest.LogCaptureFixture) -> None:
    opened = threading.Event()
    with FakeServer(delay=held(opened)) as server:
        patient = connected(server, limits=LIMITS._replace(concurrency=1))
        # Another call of the same client has to wait in the time of its request.
        busy = threading.Thread(target=patient.score, args=([IDS], [1]))
        busy.start()
        wait_until(lambda: len(server.completions) == 1)
        patient._pool._limits = SHORT
        with pytest.raises(http.TeacherError, match="no connection became free in time"):
            patient.score([IDS], [1])
        opened.set()
        busy.join(60)
        patient._pool._limits = LIMITS
        assert_all_scored(patient.score(SEQUENCES, FIRSTS))
        assert server.most_at_a_time == 1
    assert not caplog.records


def test_at_failover_the_survivor_has_no_more_requests_than_before() -> None:
    sick = FakeServer().start()
    together = threading.Barrier(2)
    with FakeServer(delay=lambda request: 0.0 * together.wait(60) if request else 0.0) as healthy:
        client = connected(sick, healthy, limits=LIMITS._replace(concurrency=2))
        sick.stop()
        assert len(client.score([IDS] * 12, [1] * 12)) == 12
    assert healthy.most_at_a_time == 2
    assert len(healthy.completions) == 12


# --- rest ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(http, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return clock


def test_a_replica_that_fails_again_after_its_rest_rests_twice_as_long(now: list[float]) -> None:
    health, rests = Health("http://a"), []

    def fail() -> float:
        # As many requests fail at once as were under way: they are one failure.
        for _ in range(5):
            health.failed("it is down", now[0])
        began = now[0]
        while health.resting:
            now[0] += 10
        return now[0] - began

    rests = [fail() for _ in range(8)]
    assert rests == [30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 960.0, 960.0]
    health.answered(now[0])
    assert fail() == 30.0, "an answer ends the series"


def test_only_an_answer_to_what_was_asked_after_a_failure_ends_the_rest(now: list[float]) -> None:
    health = Health("http://a")
    health.failed("it is down", now[0] - 5)
    health.answered(now[0] - 1)
    assert health.resting
    health.answered(now[0] + 1)
    assert not health.resting


def test_a_failure_is_logged_once_for_each_rest(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    health = Health("http://a")
    with caplog.at_level(logging.WARNING):
        for seconds in (0, 1, 2, 100):
            now[0] = 1000.0 + seconds
            health.failed("it is down", now[0])
    wanted = "The teacher server http://a failed: it is down. Requests to it are tried again."
    assert [record.getMessage() for record in caplog.records] == [wanted] * 2


# --- the loop --------------------------------------------------------------------------------------------------------
def test_in_a_notebook_whose_own_loop_runs() -> None:
    async def cell(client: Any) -> list:
        return client.score(SEQUENCES, FIRSTS)

    with FakeServer() as server:
        assert_all_scored(asyncio.run(cell(connected(server))))


def test_all_clients_share_one_thread() -> None:
    with FakeServer() as one, FakeServer() as two:
        for server in (one, two):
            connected(server).score(SEQUENCES, FIRSTS)
    assert [thread.daemon for thread in threading.enumerate() if thread.name == http.THREAD_NAME] == [True]


def test_a_fork_has_requests_of_its_own() -> None:
    """The child has neither its parent's thread nor the turns that requests of the parent have taken."""
    code = (
        "import os, sys\n"
        "from sg_opd_trl.teachers.client import CompletionsClient\n"
        "from sg_opd_trl.teachers.http import RequestLimits\n"
        "client = CompletionsClient([sys.argv[1]], RequestLimits(60.0, 0, 1))\n"
        "client.connect(None)\n"
        "client.prefetch_scores([[3, 5]], [1])\n"
        "child = os.fork()\n"
        "found = client.score([[3, 7, 9]], [1])\n"
        "if child == 0:\n"
        "    os._exit(len(found[0].logps))\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2\n"
        "assert len(client.score([[3, 5]], [1])[0].logps) == 1\n"
        "print('done')\n"
    )
    with FakeServer() as server:
        command = [sys.executable, "-c", code, server.url]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert sorted(request["prompt"] for request in server.completions) == [[3, 5], [3, 7, 9], [3, 7, 9]]


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with FakeServer() as server, FakeServer() as proxy:
        monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert_all_scored(connected(server).score(SEQUENCES, FIRSTS))
        assert not proxy.requests
