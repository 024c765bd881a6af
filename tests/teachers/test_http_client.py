"""The client of teacher servers against a server that misbehaves: nothing hangs, nothing is lost, nothing leaks."""

import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sg_opd_trl.errors import NonFiniteError, SGOPDConfigError, SGOPDError, TeacherError
from sg_opd_trl.teachers.remote import CompletionsClient, RequestLimits, transport
from sg_opd_trl.teachers.remote.settings import parsed, read_address, read_servers
from teachers.fake_server import SECRET, FakeServer, scripted_completion, scripted_logps, send

TIMEOUT = 0.25
LIMITS = RequestLimits(timeout=TIMEOUT, max_retries=1)
PATIENT = RequestLimits(timeout=5.0, max_retries=5)
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


# --- the two verbs ---------------------------------------------------------------------------------------------------
def test_scores_of_ragged_sequences() -> None:
    with FakeServer() as server:
        found = connected(server).score(SEQUENCES, FIRSTS)
    for ids, first, scores in zip(SEQUENCES, FIRSTS, found, strict=True):
        assert scores.logps == pytest.approx(expected(ids, first), abs=1e-12)
        assert scores.support == []
    asked = server.completions[-1]
    assert (asked["max_tokens"], asked["prompt_logprobs"], asked["temperature"]) == (1, 0, 1.0)
    assert all(isinstance(request["prompt"], list) for request in server.completions), "token ids, never text"


def test_supports_are_the_likeliest_ids_below_the_shared_vocabulary() -> None:
    with FakeServer() as server:
        (found,) = connected(server).score([IDS], [2], top=4, vocab_size=20)
    for position, support in zip(range(2, len(IDS)), found.support, strict=True):
        row = scripted_logps(IDS)[position]
        likeliest = sorted(range(26), key=lambda token: -row[token])[:4]
        # The server sends the token itself too: it does not fill the place of an id that is left out.
        assert [token for _, token in support] == [token for token in likeliest if token < 20]
        assert [logp for logp, _ in support] == pytest.approx([row[token] for _, token in support])
    assert {len(support) for support in found.support} != {4}, "the case does not occur"


def test_completions_and_their_settings() -> None:
    settings = [{"max_tokens": 6, "seed": seed, "stop_token_ids": [1]} for seed in range(len(SEQUENCES))]
    with FakeServer() as server:
        found = connected(server).generate(SEQUENCES, settings)
    assert found == [scripted_completion(ids, seed, 6) for seed, ids in enumerate(SEQUENCES)]
    assert sorted(request["seed"] for request in server.completions) == list(range(len(SEQUENCES)))
    assert all(request["n"] == 1 and request["return_token_ids"] for request in server.completions)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_arrival_never_changes_the_result(seed: int) -> None:
    def delay(request: dict) -> float:
        return (seed * 7 + sum(request.get("prompt", [0])) * 13) % 5 * 0.004

    settings = [{"max_tokens": 6, "seed": number} for number in range(len(SEQUENCES))]
    with FakeServer(delay=delay) as one, FakeServer(delay=lambda request: 0.01 - delay(request) / 4) as two:
        client = connected(one, two, limits=PATIENT)
        scores = client.score(SEQUENCES, FIRSTS)
        assert client.generate(SEQUENCES, settings) == [
            scripted_completion(ids, number, 6) for number, ids in enumerate(SEQUENCES)
        ]
    assert [s.logps for s in scores] == [
        pytest.approx(expected(*both)) for both in zip(SEQUENCES, FIRSTS, strict=True)
    ]
    assert one.completions and two.completions, "both replicas work"


def test_no_more_requests_at_a_time_than_allowed() -> None:
    with FakeServer(delay=lambda request: 0.01) as server:
        client = connected(server, limits=RequestLimits(timeout=5.0, max_retries=0, concurrency=3))
        client.score([IDS] * 12, [1] * 12)
    assert server.most_at_a_time == 3


def test_nothing_to_ask() -> None:
    with FakeServer() as server:
        client = connected(server)
        assert client.score([], []) == []
        assert client.generate([], []) == []


def test_headers_and_kept_connections() -> None:
    with FakeServer() as server:
        client = connected(server, headers={"Authorization": f"Bearer {SECRET}"})
        for _ in range(3):
            client.score([IDS], [1])
        assert len(client.replicas[0].connections._idle) == 1
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
        client.close()
        client.score([IDS], [1])


def test_a_kept_connection_that_the_server_has_closed_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer().start()
    client = connected(server, limits=LIMITS._replace(max_retries=0))
    server.stop()
    server.start()
    assert len(client.score([IDS], [1])) == 1
    server.stop()
    assert not caplog.records


# --- faults: each ends within the timeout and two seconds, with an error that names the setting ----------------------
def stuck(handler: Any, path: str) -> bool:
    time.sleep(TIMEOUT * 4)
    return True


def dripping(handler: Any, path: str) -> bool:
    """A byte now and then: no single wait is ever long."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)
    return True


def dripping_headers(handler: Any, path: str) -> bool:
    for letter in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 100:
        handler.wfile.write(bytes([letter]))
        handler.wfile.flush()
        time.sleep(0.02)
    return True


def status(number: int, body: str = SECRET) -> Callable[[Any, str], bool]:
    return lambda handler, path: send(handler, number, body.encode())


def hung_up(handler: Any, path: str) -> bool:
    handler.close_connection = True
    return True


def cut_off(handler: Any, path: str) -> bool:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices"')
    handler.close_connection = True
    return True


def not_http(handler: Any, path: str) -> bool:
    handler.wfile.write(f"{SECRET}\r\n\r\n".encode())
    handler.close_connection = True
    return True


AT_START = {
    "health 503": (status(503), "HTTP 503"),
    "health 404": (status(404), "HTTP 404"),
    "stuck": (stuck, "no answer in time"),
    "dripping": (dripping, "no answer in time"),
    "dripping headers": (dripping_headers, "no answer in time"),
    "hung up": (hung_up, "the connection was closed"),
    "cut off": (cut_off, "the answer ended early"),
    "not HTTP": (not_http, "the answer is not HTTP"),
    "500": (status(500), "HTTP 500"),
    "429": (status(429), "HTTP 429"),
    "web page": (status(200, f"<html>{SECRET}</html>"), "no JSON object"),
    "deep JSON": (status(200, "[" * 100_000), "no JSON object"),
    "no models": (status(200, '{"data": []}'), "without any"),
    "401": (status(401), "SG_OPD_TEACHER_API_KEY"),
    "403": (status(403), "SG_OPD_TEACHER_API_KEY"),
    "redirect": (status(302), "leads to"),
}


def failure(action: Callable[[], Any], timeout: float = TIMEOUT) -> str:
    """The message of the error that an action ends with in time, after looking for secrets."""
    started = time.monotonic()
    with pytest.raises(SGOPDError) as caught:
        action()
    assert time.monotonic() - started < timeout + 2
    assert isinstance(caught.value, TeacherError | NonFiniteError)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


@pytest.mark.parametrize("fault", AT_START)
def test_faults_at_the_start(fault: str) -> None:
    behave, said = AT_START[fault]
    with FakeServer(behave=behave) as server:
        message = failure(lambda: connected(server))
    assert said in message
    assert "`teacher_model_server_url`" in message


def endless(handler: Any, path: str) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(1000):
        handler.wfile.write(b"400\r\n" + b" " * 1024 + b"\r\n")
    return True


@pytest.mark.parametrize("behave", [endless, status(200, SECRET * 500)], ids=["chunks", "one piece"])
def test_an_answer_without_end(behave: Callable[[Any, str], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_LARGEST", 4096)
    monkeypatch.setattr(transport, "_PIECE", 1024)
    with FakeServer(behave=behave) as server:
        assert "its answer is larger than 0.00390625 MiB" in failure(lambda: connected(server))


def test_a_server_that_is_down() -> None:
    server = FakeServer().start()
    server.stop()
    message = failure(lambda: connected(server))
    assert "the connection was refused" in message
    assert "2 rounds" in message
    for word in (
        "`teacher_model_server_url`",
        "`teacher_request_timeout`=0.25",
        "`teacher_max_retries`=1",
        server.url,
    ):
        assert word in message


def test_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    client = CompletionsClient(["http://no-such-host.invalid:8000"], LIMITS)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror()))
    assert "the host name is not known" in failure(lambda: client.connect(None))


WRONG = {
    "two cut": (lambda c: c.update(prompt_logprobs=c["prompt_logprobs"][:-2]), "4 log-probs for 6 tokens"),
    "one too many": (lambda c: c["prompt_logprobs"].append({}), "7 log-probs for 6 tokens"),
    "null": (lambda c: c["prompt_logprobs"].__setitem__(3, None), "no log-prob of token 4 at position 3"),
    "missing token": (lambda c: c["prompt_logprobs"][3].pop("4"), "no log-prob of token 4 at position 3"),
    "missing key": (lambda c: c["prompt_logprobs"][3]["4"].pop("logprob"), "no number at position 3"),
    "null number": (lambda c: c["prompt_logprobs"][3]["4"].update(logprob=None), "no number at position 3"),
    "text": (lambda c: c["prompt_logprobs"][3]["4"].update(logprob="-1"), "no number at position 3"),
    "truth": (lambda c: c["prompt_logprobs"][3]["4"].update(logprob=True), "no number at position 3"),
    "no log-probs": (lambda c: c.pop("prompt_logprobs"), "without `prompt_logprobs`"),
    "NaN": (lambda c: c["prompt_logprobs"][3]["4"].update(logprob=float("nan")), "not finite or above 0, nan"),
    "infinite": (lambda c: c["prompt_logprobs"][3]["4"].update(logprob=float("-inf")), "above 0, -inf"),
    "vLLM's minus infinity": (lambda c: c["prompt_logprobs"][3]["4"].update(logprob=-9999.0), "above 0, -9999.0"),
    "positive": (lambda c: c["prompt_logprobs"][3]["4"].update(logprob=0.7), "above 0, 0.7 at token 3"),
    "another request's": (lambda c: c.update(index=1), "the choice of another request"),
    "other tokens": (lambda c: c.update(prompt_token_ids=[0, *IDS]), "scores of other tokens"),
    "no end": (lambda c: c.pop("finish_reason"), "without a known end"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_answers(fault: str) -> None:
    change, said = WRONG[fault]
    with FakeServer() as server:
        client = connected(server)
        server.change = choice(change)
        message = failure(lambda: client.score([IDS], [1]))
        assert len(server.completions) == 1, "what is wrong once is wrong again"
    assert said in message
    assert "`teacher_model_server_url`" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a["choices"].insert(0, a["choices"][0] | {"index": 1}), "other than one choice"),
        (lambda a: a.update(choices=[]), "other than one choice"),
        (lambda a: a.pop("choices"), "other than one choice"),
        (lambda a: a.update(model="another"), "an answer of another model"),
    ],
    ids=["out of order", "none", "missing", "another model"],
)
def test_wrong_answers_as_a_whole(change: Callable[[dict], Any], said: str) -> None:
    with FakeServer() as server:
        client = connected(server)
        server.change = lambda path, request, answer: answer | {"changed": change(answer)}
        assert said in failure(lambda: client.score([IDS], [1]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("token_ids"), "without `token_ids`"),
        (lambda c: c.update(token_ids=[]), "not 1 to 4 token ids"),
        (lambda c: c.update(token_ids=[5] * 5), "not 1 to 4 token ids"),
        (lambda c: c.update(token_ids=["5"]), "not 1 to 4 token ids"),
        (lambda c: c.update(token_ids=[-1]), "not 1 to 4 token ids"),
        (lambda c: c.update(token_ids=[5], finish_reason="length"), "cut after 1 of 4 tokens"),
    ],
)
def test_wrong_completions(change: Callable[[dict], Any], said: str) -> None:
    with FakeServer(change=choice(change)) as server:
        client = connected(server)
        assert said in failure(lambda: client.generate([IDS], [{"max_tokens": 4, "seed": 1}]))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (f"Requested prompt logprobs of 32, which is greater than max allowed: 20 {SECRET}", "--max-logprobs -1"),
        ("This model's maximum context length is 512 tokens", "--max-model-len"),
        ("Token id 99 is out of vocabulary", "student's family"),
        (SECRET, "`sg-opd serve-teacher`"),
    ],
)
def test_refused_requests(body: str, said: str) -> None:
    with FakeServer() as server:
        client = connected(server)
        server.behave = status(400, json.dumps({"error": {"message": body}}))
        message = failure(lambda: client.score([IDS], [1], top=8))
    assert said in message
    assert "HTTP 400 (Bad Request)" in message


def test_the_first_failure_ends_the_others() -> None:
    """Requests that are under way are given up, on both sides."""
    started = time.monotonic()
    with FakeServer() as server:
        client = connected(server, limits=RequestLimits(timeout=20.0, max_retries=5))
        server.delay = lambda request: 0.0 if request["prompt"] == IDS else 1.0
        server.change = choice(lambda c: c.pop("prompt_logprobs"))
        with pytest.raises(TeacherError, match="without `prompt_logprobs`"):
            client.score([SEQUENCES[0], SEQUENCES[1], IDS], [1, 1, 1])
        assert time.monotonic() - started < 2.5
        _wait_until(lambda: not _client_threads())


def test_a_waiting_run_can_be_interrupted() -> None:
    # A process that was started in the background of a shell ignores the signal otherwise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _interrupt_a_waiting_run()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_a_waiting_run() -> None:
    with FakeServer() as server:
        client = connected(server, limits=RequestLimits(timeout=20.0, max_retries=5))
        server.delay = lambda request: 3.0
        waiting = client.replicas[0].connections
        main = threading.main_thread().ident
        threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            client.score([IDS] * 4, [1] * 4)
        assert time.monotonic() - started < 2.5
        _wait_until(lambda: not _client_threads())
        assert not waiting._idle
        server.delay = lambda request: 0.0
        assert len(client.score([IDS], [1])[0].logps) == 5


def _client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "(work)" in thread.name]


def _wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 2
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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
        _wait_until(lambda: len(server.completions) >= 3)
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
        _wait_until(lambda: len(server.completions) == 1)
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


# --- the model -------------------------------------------------------------------------------------------------------
def test_a_model_by_its_name_or_by_its_folder() -> None:
    with FakeServer() as server:
        server.models.append({"id": "alias", "root": "folder/teacher"})
        server.models.append({"id": "an-adapter", "root": "folder/adapter", "parent": "teacher"})
        for asked in ("teacher", "folder/teacher"):
            client = CompletionsClient([server.url], LIMITS)
            client.connect(asked)
            assert (client.model, client.max_length) == ("teacher", 512)
        client = CompletionsClient([server.url], LIMITS)
        client.connect("alias")
        assert client.model == "alias"
        assert len(client.score([IDS], [1])) == 1, "the server answers with the first of its names"
        client.connect("an-adapter")
        assert client.model == "an-adapter"
        message = failure(lambda: client.connect(None))
        assert "must serve one model, got 'teacher', 'alias', 'an-adapter'" in message


def test_another_model_is_served() -> None:
    with FakeServer(model="other") as server:
        message = failure(lambda: connected(server))
        assert "must serve 'teacher', got 'other'" in message
        assert "`teacher_model_name_or_path`" in message
        server.models = [{"id": f"<{SECRET}>"}]
        assert "a name that is not shown" in failure(lambda: connected(server))


def test_replicas_of_different_models() -> None:
    with FakeServer(model="one") as one, FakeServer(model="other") as other:
        client = CompletionsClient([one.url, other.url], LIMITS)
        assert f"must serve 'one', got 'other' at {other.url}" in failure(lambda: client.connect(None))


def test_tokenize_where_the_server_tells() -> None:
    with FakeServer(tokenize=lambda text: [len(text), 7]) as tells, FakeServer() as does_not:
        assert connected(tells, does_not).tokenize("abc") == [[3, 7], None]


def test_probe_asks_every_replica_for_scores_and_ids() -> None:
    with FakeServer() as one, FakeServer() as two:
        client = connected(one, two)
        found = client.probe(IDS, 2)
        assert [s.logps for s in found] == [pytest.approx(expected(IDS, 1))] * 2
        assert len(one.completions) == len(two.completions) == 1
        two.change = choice(lambda c: c.pop("token_ids"))
        assert "without `token_ids`" in failure(lambda: client.probe(IDS, 2))


# --- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "shown", "path"),
    [
        ("http://localhost:8000", "http://localhost:8000", ""),
        ("http://localhost:8000/v1/", "http://localhost:8000", ""),
        ("https://host/a/b", "https://host:443", "/a/b"),
        ("http://[::1]:80/v1", "http://[::1]:80", ""),
    ],
)
def test_addresses(text: str, shown: str, path: str) -> None:
    address = read_address(text)
    assert (str(address), address.path) == (shown, path)


@pytest.mark.parametrize(
    "text",
    [
        f"http://me:{SECRET}@host:1",
        f"me:{SECRET}@host",
        f"http://{SECRET}#x@host",
        f"http://me:{SECRET}@[bad",
        f"http://host/v1?key={SECRET}",
        f"ftp://me:{SECRET}@host",
        f"htps://host/{SECRET}",
        f"host/{SECRET}",
        f"http://host/{SECRET} x",
        f"http://host/{SECRET}\x7f",
        f"http://host/{SECRET}\u00e9",
        f"http://ho st/{SECRET}",
    ],
)
def test_urls_with_secrets_are_refused_without_showing_them(text: str) -> None:
    with pytest.raises(SGOPDConfigError, match="`teacher_model_server_url` must") as caught:
        read_address(text)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "value", [f"{SECRET}\r", f"{SECRET}\nX: 1", f"\x00{SECRET}", f"{SECRET}\x85", f"{SECRET}\u2026", SECRET.encode()]
)
def test_headers_that_http_cannot_send_are_refused_without_showing_them(value: Any) -> None:
    with pytest.raises(SGOPDConfigError, match=r"in the value of the header 'X-Key', not shown here") as caught:
        CompletionsClient(["http://a"], LIMITS, {"X-Key": value})
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(SGOPDConfigError, match="in the name of a header, not shown here") as caught:
        CompletionsClient(["http://a"], LIMITS, {f"{SECRET}:": "x"})
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    CompletionsClient(["http://a"], LIMITS, {"Authorization": "Bearer caf\u00e9 1"})


@pytest.mark.parametrize("text", ["", "localhost:8000", "host", "http://", "http://host:port", "ftp://host"])
def test_what_is_no_url(text: str) -> None:
    with pytest.raises(
        SGOPDConfigError, match=r"`teacher_model_server_url` must.*Set for example http://localhost:8000"
    ):
        read_address(text)


def test_spellings_of_the_setting() -> None:
    assert read_servers("http://a") == ["http://a"]
    assert read_servers(parsed('["http://a", "http://b"]')) == ["http://a", "http://b"]
    assert read_servers(parsed('{"math": "http://a", "code": ["http://b", "http://c"]}')) == {
        "math": ["http://a"],
        "code": ["http://b", "http://c"],
    }
    for odd in ([], {}, {"": "http://a"}, [1], 3, {"a": None}, ["http://a", "http://a/v1"], [["http://a"]]):
        with pytest.raises(SGOPDConfigError, match="`teacher_model_server_url` must"):
            read_servers(odd)
    with pytest.raises(SGOPDConfigError, match="JSON that cannot be read"):
        parsed("[http://a]")


def test_limits() -> None:
    for limits in (
        RequestLimits(timeout=0),
        RequestLimits(timeout=float("nan")),
        RequestLimits(max_retries=-1),
        RequestLimits(concurrency=0),
    ):
        with pytest.raises(SGOPDConfigError, match="must be"):
            CompletionsClient(["http://a"], limits)


def test_the_client_needs_neither_torch_nor_an_http_package() -> None:
    code = (
        "import sys, sg_opd_trl.teachers.remote\n"
        "heavy = {'torch', 'transformers', 'trl', 'numpy', 'requests', 'httpx', 'httpx2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
