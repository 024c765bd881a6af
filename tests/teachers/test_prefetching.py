"""`ServerTeacher` alone: what was begun ahead of time is taken by its own question, or dropped."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sg_opd_trl import ServerTeacher, SGOPDConfigError, TeacherError
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.teachers import Sampling
from teachers.fake_server import FakeServer
from teachers.http_cases import status, under_way, wait_until

PAIRS = [([3, 5], [6, 4, 8]), ([3, 7, 9], [5, 1]), ([3, 5], [6, 4, 8])]
PADDED = TokenBatch.from_lists([list(p) for p, _ in PAIRS], [list(c) for _, c in PAIRS], 0, torch.device("cpu"))
EVERY = torch.ones(len(PAIRS), dtype=torch.bool)
SAMPLING = Sampling(max_new_tokens=6, eos_token_ids=(1,), pad_token_id=0)
PROMPTS = [[3, 5], [3, 7, 9]]


@pytest.fixture(autouse=True)
def nothing_is_under_way_any_more(server: FakeServer) -> Iterator[None]:
    yield
    wait_until(lambda: not under_way() and not server.at_a_time)


def bound(server: FakeServer, **limits: Any) -> ServerTeacher:
    teacher = ServerTeacher(server.url, **({"timeout": 120.0, "max_retries": 0} | limits))
    teacher.client.connect("teacher")
    teacher.vocab_size = 26
    server.requests.clear()
    return teacher


def begin(teacher: ServerTeacher, size: int = 0, vocab_size: int | None = None) -> None:
    teacher.prefetch_scores([list(p) for p, _ in PAIRS], [list(c) for _, c in PAIRS], size, vocab_size)


def test_equal_rows_and_supports_that_need_more_are_as_without(server: FakeServer) -> None:
    teacher = bound(server)
    wanted = teacher.score_support(PADDED, EVERY, 100, 3, 20)
    asked = sorted(map(repr, server.completions))
    assert {request["prompt_logprobs"] for request in server.completions} == {3, 12}, "the case occurs"
    server.requests.clear()
    begin(teacher, 3, 20)
    wait_until(lambda: len(server.completions) == len(PAIRS))
    counted = teacher.tokens_scored
    assert counted == 8, "what nobody has asked for does not count"
    found = teacher.score_support(PADDED, EVERY, 100, 3, 20)
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))
    assert sorted(map(repr, server.completions)) == asked
    assert teacher.tokens_scored == 2 * counted


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        ({}, 2),
        ({"seed": 12}, 4),
        ({"prompts": PROMPTS[::-1]}, 2),
        ({"prompts": [[3, 5], [3, 8]]}, 3),
        ({"sampling": replace(SAMPLING, max_new_tokens=5)}, 4),
        ({"sampling": replace(SAMPLING, top_p=0.9)}, 4),
    ],
)
def test_a_rollout_is_taken_by_its_own_question_only(server: FakeServer, change: dict, asked: int) -> None:
    teacher, question = bound(server), {"prompts": PROMPTS, "sampling": SAMPLING, "seed": 11, "max_tokens": 100}
    wanted = teacher.generate(**(question | change))
    server.requests.clear()
    teacher.prefetch_rollouts(**question)
    wait_until(lambda: len(server.completions) == 2)
    counted = teacher.tokens_generated
    assert teacher.generate(**(question | change)) == wanted
    assert len(server.completions) == asked
    assert teacher.tokens_generated == 2 * counted
    teacher.drop_prefetched()


@pytest.mark.parametrize(("begun", "asked"), [((2, 20), 3), ((0, None), 6), ((2, 26), 6), ((1, 20), 6)])
def test_a_score_is_taken_by_its_own_question_only(server: FakeServer, begun: tuple, asked: int) -> None:
    teacher = bound(server)
    wanted = teacher.score_support(PADDED, EVERY, 100, 2, 20)
    wider = sum(request["prompt_logprobs"] > 2 for request in server.completions)
    server.requests.clear()
    begin(teacher, *begun)
    wait_until(lambda: len(server.completions) == 3)
    found = teacher.score_support(PADDED, EVERY, 100, 2, 20)
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))
    assert len(server.completions) == asked + wider
    teacher.drop_prefetched()


def test_what_cannot_be_sent_is_an_error_of_the_call_that_needs_it(server: FakeServer) -> None:
    teacher = bound(server)
    teacher.client.max_length = 5
    teacher.prefetch_rollouts([[3, 5]], SAMPLING, 1, 100)
    teacher.prefetch_scores([[3, 5, 6], [3]], [[7, 8, 9], [99]])
    assert not server.requests
    assert not under_way()
    with pytest.raises(SGOPDConfigError, match="must take 8 tokens"):
        teacher.generate([[3, 5]], SAMPLING, 1, 100)


def test_an_outage_that_nobody_has_waited_for_is_no_error(server: FakeServer) -> None:
    teacher = bound(server)
    wanted = teacher.score(PADDED, EVERY, 100)
    server.requests.clear()
    server.behave = status(503)
    begin(teacher)
    teacher.prefetch_rollouts(PROMPTS, SAMPLING, 1, 100)
    wait_until(lambda: not under_way())
    assert len(server.completions) == 5
    server.behave = None
    assert torch.equal(teacher.score(PADDED, EVERY, 100), wanted)
    assert len(teacher.generate(PROMPTS, SAMPLING, 1, 100)) == 2
    assert len(server.completions) == 10, "all of them asked again, once"
    assert not teacher.client._pool._prefetched["scores"]._tasks


def test_an_outage_that_lasts_is_a_plain_error(server: FakeServer) -> None:
    teacher, taken = bound(server), threading.Event()
    server.behave = lambda handler, path: taken.wait(120) and status(503)(handler, path)
    begin(teacher)

    def fail_once_they_are_taken() -> None:
        # Besides the requests, the call that needs them and one task of it for each.
        wait_until(lambda: len(under_way()) == 2 * len(PAIRS) + 1)
        taken.set()

    threading.Thread(target=fail_once_they_are_taken).start()
    with pytest.raises(TeacherError, match=r"HTTP 503.*Nothing was updated"):
        teacher.score(PADDED, EVERY, 100)
    assert len(PAIRS) < len(server.completions) <= 2 * len(PAIRS)
    server.behave = None
    teacher.score(PADDED, EVERY, 100)


def test_with_one_connection_to_the_server_no_rollout_is_in_the_way_of_scores(server: FakeServer) -> None:
    teacher = bound(server, concurrency=1)
    teacher.prefetch_rollouts(PROMPTS, SAMPLING, 1, 100)
    assert not under_way()
    teacher.score(PADDED, EVERY, 100)
    assert all("seed" not in request for request in server.completions)


def test_the_first_failure_stops_what_was_begun_besides(server: FakeServer) -> None:
    teacher, held = bound(server), threading.Event()
    odd = PAIRS[1][0] + PAIRS[1][1]
    server.change = lambda path, request, answer: answer["choices"].clear() if request["prompt"] == odd else None
    server.delay = lambda request: 0.0 if request["prompt"] == odd else 0.0 * held.wait(120)
    begin(teacher)
    teacher.prefetch_rollouts(PROMPTS, SAMPLING, 1, 100)
    wait_until(lambda: len(server.completions) == 5)
    with pytest.raises(TeacherError, match="other than one choice"):
        teacher.score(PADDED, EVERY, 100)
    wait_until(lambda: not under_way())
    assert not held.is_set()
    held.set()


def test_what_has_not_begun_is_asked_with_all_connections_by_the_call_that_needs_it(server: FakeServer) -> None:
    """Two of four connections are for rollouts that are prefetched; a step that waits for six has all of them."""
    teacher, prompts = bound(server, concurrency=4), [[3, 5 + i] for i in range(6)]
    opened = threading.Event()
    server.delay = lambda request: 0.0 * opened.wait(120)
    teacher.prefetch_rollouts(prompts, SAMPLING, 11, 100)
    wait_until(lambda: len(server.completions) == 2)
    assert server.most_at_a_time == 2

    def open_once_all_are_taken() -> None:
        wait_until(lambda: server.at_a_time == 4)
        opened.set()

    threading.Thread(target=open_once_all_are_taken).start()
    found = teacher.generate(prompts, SAMPLING, 11, 100)
    assert len(server.completions) == 6
    assert server.most_at_a_time == 4
    assert found == teacher.generate(prompts, SAMPLING, 11, 100)


@pytest.mark.parametrize("drop", ["drop_prefetched", "stop_generating", "prefetch_rollouts"])
def test_rollouts_are_dropped(server: FakeServer, drop: str) -> None:
    teacher, held = bound(server), threading.Event()
    server.behave = lambda handler, path: held.wait(120) and False
    teacher.prefetch_rollouts(PROMPTS, SAMPLING, 1, 100)
    wait_until(lambda: len(server.completions) == 2)
    arguments = ([], SAMPLING, 1, 100) if drop == "prefetch_rollouts" else ()
    getattr(teacher, drop)(*arguments)
    wait_until(lambda: not under_way())
    held.set()
    server.requests.clear()
    assert teacher.generate(PROMPTS, SAMPLING, 1, 100)
    assert len(server.completions) == 2, "they are not taken any more"


def test_the_end_of_the_process_waits_for_nothing() -> None:
    code = (
        "import sys\n"
        "from sg_opd_trl.teachers.client import CompletionsClient\n"
        "client = CompletionsClient([sys.argv[1]])\n"
        "client.connect(None)\n"
        "client.prefetch_scores([[3, 5]], [1])\n"
        "client.prefetch_completions([[3, 5]], [{'max_tokens': 3, 'seed': 1}])\n"
        "print('done')\n"
    )
    root = Path(__file__).resolve().parents[2]
    with FakeServer(delay=lambda request: 0.0 * server.released.wait(600) if request else 0.0) as server:
        command = [sys.executable, "-c", code, server.url]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
        assert not server.released.is_set()
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
