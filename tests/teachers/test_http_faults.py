"""The client of teacher servers against a server that misbehaves: nothing hangs and nothing leaks."""

import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from sg_opd_trl.errors import TeacherError
from sg_opd_trl.teachers import http as transport
from sg_opd_trl.teachers.client import CompletionsClient
from sg_opd_trl.teachers.http import RequestLimits
from teachers.fake_server import SECRET, FakeServer
from teachers.http_cases import (
    IDS,
    LIMITS,
    SEQUENCES,
    choice,
    connected,
    cut_off,
    failure,
    hung_up,
    status,
    stuck,
    wait_until,
)


# --- faults: each ends within the timeout and two seconds, with an error that names the setting ----------------------
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
        wait_until(lambda: not _client_threads())


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
        wait_until(lambda: not _client_threads())
        assert not waiting._idle
        server.delay = lambda request: 0.0
        assert len(client.score([IDS], [1])[0].logps) == 5


def _client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "(work)" in thread.name]
