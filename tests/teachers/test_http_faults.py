"""The client of teacher servers against a server that misbehaves: nothing hangs and nothing leaks."""

import gzip
import json
import logging
import signal
import socket
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from sg_opd_trl.errors import NonFiniteError, TeacherError
from sg_opd_trl.teachers.answers import CompletionAnswer, read_answer
from sg_opd_trl.teachers.client import CompletionsClient
from teachers.fake_server import SECRET, FakeServer, send
from teachers.http_cases import (
    IDS,
    LIMITS,
    PATIENT,
    SEQUENCES,
    SHORT,
    choice,
    connected,
    cut_off,
    failure,
    hung_up,
    status,
    stuck,
    under_way,
    wait_until,
)


# --- faults: each ends, with an error that names the setting ---------------------------------------------------------
def dripping(beginning: bytes) -> Callable[[Any, str], bool]:
    """A byte now and then for as long as the server is there: no single wait is ever long."""

    def behave(handler: Any, path: str) -> bool:
        handler.wfile.write(beginning)
        while not handler.server.released.wait(0.02):
            handler.wfile.write(b" ")
        return True

    return behave


def not_http(handler: Any, path: str) -> bool:
    handler.wfile.write(f"{SECRET}\r\n\r\n".encode())
    handler.close_connection = True
    return True


AT_START = {
    "health 503": (status(503), "HTTP 503"),
    "health 404": (status(404), "HTTP 404"),
    "hung up": (hung_up, "the connection was closed"),
    "cut off": (cut_off, "the answer ended early"),
    "not HTTP": (not_http, "the answer is not HTTP"),
    "500": (status(500), "HTTP 500"),
    "429": (status(429), "HTTP 429"),
    "web page": (status(200, f"<html>{SECRET}</html>"), "no JSON object"),
    "deep JSON": (status(200, "[" * 100_000), "no JSON object"),
    "long status": (status(10**3), "not HTTP"),
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


@pytest.mark.parametrize(
    "behave",
    [
        stuck,
        dripping(b"HTTP/1.1 200 OK\r\nX-Long: "),
        dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
        dripping(b"HTTP/1.1 503 Busy\r\nContent-Length: 100000\r\n\r\n"),
    ],
    ids=["stuck", "dripping headers", "dripping body", "dripping reason"],
)
def test_a_server_that_never_comes_to_an_end(behave: Callable[[Any, str], bool]) -> None:
    """It goes on until the test is over, so that it is the deadline that ends the request."""
    with FakeServer(behave=behave) as server:
        message = failure(lambda: connected(server, limits=SHORT))
        assert "no answer in time" in message
        assert "`teacher_request_timeout`=0.25" in message


def endless(handler: Any, path: str) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not handler.server.released.is_set():
        handler.wfile.write(b"10000\r\n" + b" " * 2**16 + b"\r\n")
    return True


def until_it_closes(handler: Any, path: str) -> bool:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while not handler.server.released.is_set():
        handler.wfile.write(b" " * 2**16)
    return True


def announced(handler: Any, path: str) -> bool:
    """Never sent: whoever reads it waits until the test is over."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
    return handler.server.released.wait(60)


@pytest.mark.parametrize("behave", [endless, until_it_closes, announced])
def test_an_answer_that_is_larger_than_what_was_asked(behave: Callable[[Any, str], bool]) -> None:
    with FakeServer() as server:
        client = connected(server)
        server.behave = behave
        # 1 MiB, and 256 bytes for each of five log-probs of each token.
        most = {2**11: 3.5, 2**12: 6}
        for length, mib in most.items():
            message = failure(lambda length=length: client.score([[3] * length], [1], top=4))
            assert f"its answer is larger than {mib:g} MiB, the most for what was asked" in message
        message = failure(lambda: client.generate([[3] * 2**12], [{"max_tokens": 2**12, "seed": 1}]))
        assert "its answer is larger than 3 MiB" in message
        assert "larger than 1 MiB" in failure(lambda: client.connect(None))


def test_the_largest_answers_that_a_server_can_mean_are_read() -> None:
    """Every number with all its digits, a rank in a large vocabulary, and the text of a long token."""
    ids, top = [5] * 200, 20
    with FakeServer() as server:
        client = connected(server)
        entry = {"logprob": -12.345678901234567, "rank": 151642, "decoded_token": "long " * 20}
        many = {str(150_000 + other): entry for other in range(top)}
        server.change = choice(lambda c: c.update(prompt_logprobs=[None, *([{"5": entry, **many}] * (len(ids) - 1))]))
        (found,) = client.score([ids], [1], top=top)
        assert len(found.logps) == len(found.support) == len(ids) - 1


def test_an_answer_that_says_at_length_why_a_request_is_refused() -> None:
    with FakeServer() as server:
        client = connected(server)
        server.behave = status(400, "maximum context length is 512" + SECRET * 2**20)
        assert "--max-model-len" in failure(lambda: client.score([IDS], [1]))


def test_a_server_that_is_down() -> None:
    server = FakeServer().start()
    server.stop()
    message = failure(lambda: connected(server, limits=LIMITS._replace(max_retries=1)))
    assert "the connection was refused" in message
    assert "2 rounds" in message
    for word in (
        "`teacher_model_server_url`",
        "`teacher_request_timeout`=60",
        "`teacher_max_retries`=1",
        server.url,
    ):
        assert word in message


def test_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    client = CompletionsClient(["http://no-such-host.invalid:8000"], LIMITS)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror()))
    assert "the host name is not known" in failure(lambda: client.connect(None))
    for odd in ("http://999.1.1.1:8000", "http://\u2024.example"):
        assert "the host name is not known" in failure(lambda odd=odd: CompletionsClient([odd], LIMITS).connect(None))


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
    "400 digits": (lambda c: c["prompt_logprobs"][3]["4"].update(logprob=10**400), "a whole number beyond all floats"),
    "-400 digits": (lambda c: c["prompt_logprobs"][3]["4"].update(logprob=-(10**400)), "beyond all floats at token 3"),
    "NaN as text": (lambda c: c["prompt_logprobs"][3]["4"].update(logprob="NaN"), "no number at position 3"),
    "list": (lambda c: c["prompt_logprobs"][3]["4"].update(logprob=[-1.0]), "no number at position 3"),
    "no entry": (lambda c: c["prompt_logprobs"][3].update({"4": -1.0}), "no number at position 3"),
    "list of entries": (lambda c: c["prompt_logprobs"].__setitem__(3, [4, -1.0]), "no log-prob of token 4"),
    "mapping": (lambda c: c.update(prompt_logprobs={"3": {}}), "without `prompt_logprobs`"),
    "unknown end": (lambda c: c.update(finish_reason=["stop"]), "without a known end"),
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
        (lambda a: a.update(choices=[None]), "other than one choice"),
        (lambda a: a.update(choices={"0": {}}), "other than one choice"),
        (lambda a: a.update(model="another"), "an answer of another model"),
        (lambda a: a.update(model=["teacher"]), "an answer of another model"),
        (lambda a: a.update(model=None), "an answer of another model"),
    ],
    ids=["out of order", "none", "missing", "null", "mapping", "another model", "list", "no model"],
)
def test_wrong_answers_as_a_whole(change: Callable[[dict], Any], said: str) -> None:
    with FakeServer() as server:
        client = connected(server)
        server.change = lambda path, request, answer: answer | {"changed": change(answer)}
        assert said in failure(lambda: client.score([IDS], [1]))


@pytest.mark.parametrize("key", ["9" * 5000, "04", "+4", "\u0664", "4 ", "-1", "4.0", ""])
def test_supports_of_something_else_than_ids(key: str) -> None:
    """An id that is spelt twice would be one token twice."""
    with FakeServer() as server:
        client = connected(server)
        server.change = choice(lambda c: c["prompt_logprobs"][3].update({key: {"logprob": -0.1}}))
        assert "something else than token ids" in failure(lambda: client.score([IDS], [1], top=3))


@pytest.mark.parametrize("tokens", [["5", "6"], [5, None], [5.0], [True], "56", {"0": 5}, [[5]], 7])
def test_token_ids_that_are_none(tokens: Any) -> None:
    with FakeServer(tokenize=lambda text: tokens) as server:
        client = connected(server)
        assert "token ids that are no numbers at /tokenize" in failure(lambda: client.tokenize("56"))


@pytest.mark.parametrize("length", [-5, 0, "512", 512.0, True, [512]])
def test_a_context_that_is_no_count(length: Any) -> None:
    with FakeServer() as server:
        server.models[0]["max_model_len"] = length
        assert "`max_model_len` that is no count" in failure(lambda: connected(server))
        server.models[0]["max_model_len"] = None
        assert connected(server).max_length is None
        server.models[0]["max_model_len"] = 10**400
        assert connected(server).max_length == 10**400


def test_whatever_is_changed_in_an_answer_ends_in_an_error_of_ours_or_changes_nothing() -> None:
    """Every value at every place of an answer in turn: no traceback, and no score that the server did not send."""
    values = [
        None,
        True,
        -1,
        10**400,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x" * 500,
        "NaN",
        [],
        [[]],
        {},
        {"4": {}},
    ]
    request = {"prompt": IDS, "prompt_logprobs": 2, "max_tokens": 1}
    text = json.dumps(FakeServer().answer("/v1/completions", request))

    def read(body: bytes, where: str) -> Any:
        return CompletionAnswer(body, where, frozenset(["teacher"]), IDS).scores(1, 2, 26)

    whole = read_answer(read, text.encode(), "there")
    refused = 0
    for path in places(json.loads(text)):
        for value in values:
            body = json.dumps(changed(json.loads(text), path, value)).encode()
            try:
                found = read_answer(read, body, "there")
            except (TeacherError, NonFiniteError) as error:
                refused += 1
                assert len(str(error)) < 1000
                assert "cannot be read (" not in str(error), "a form that nobody thought of"
            else:
                assert found == whole or path[-1] in ("rank", "logprob"), (path, value)
    assert refused > 100


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to all values inside one; of long lists to the first and the last."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    chosen = [pair for pair in inside if not isinstance(value, list) or pair[0] in (0, len(value) - 1)]
    return [found for key, part in chosen for found in [(*path, key), *places(part, (*path, key))]]


def changed(answer: Any, path: tuple, value: Any) -> Any:
    part = answer
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return answer


def test_a_form_that_nobody_thought_of_is_an_error_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError(SECRET)

    with FakeServer() as server:
        client = connected(server)
        monkeypatch.setattr("sg_opd_trl.teachers.client.CompletionAnswer", broken)
        assert "an answer that cannot be read (KeyError)" in failure(lambda: client.score([IDS], [1]))


# --- bytes that are no answer ----------------------------------------------------------------------------------------
def raw(data: bytes) -> Callable[[Any, str], bool]:
    def behave(handler: Any, path: str) -> bool:
        handler.wfile.write(data)
        handler.close_connection = True
        return True

    return behave


OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
NO_ANSWERS = {
    "chunk of -5": OK + CHUNKED + b"-5\r\nabc\r\n0\r\n\r\n",
    "chunk of 400 digits": OK + CHUNKED + b"f" * 400 + b"\r\nabc",
    "chunk that never comes": OK + CHUNKED + b"f" * 19 + b"\r\nabc",
    "length of -5": OK + b"Content-Length: -5\r\n\r\nabc",
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
    "length of 400 digits": OK + b"Content-Length: " + b"9" * 400 + b"\r\n\r\nabcde",
    "length in other digits": OK + "Content-Length: \u0663\r\n\r\nabc".encode(),
    "many headers": OK + b"X: y\r\n" * 100_000,
    "a long header": OK + b"X: " + b"y" * 10**7,
    "only 100 Continue": b"HTTP/1.1 100 Continue\r\n\r\n" * 1000,
    "another protocol": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "a part": b"HTTP/1.1 206 Part\r\nContent-Length: 0\r\n\r\n",
    "compressed chunks": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "gzip bomb": OK + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n" + gzip.compress(b" " * 10**8),
    "cut-off JSON": OK + b'Connection: close\r\n\r\n{"model": "teacher", "choices": [{"index"',
    "two JSONs": OK + b"Connection: close\r\n\r\n{}{}",
    "no UTF-8": OK + b'Connection: close\r\n\r\n{"\xff": 1}',
    "a number of 5000 digits": OK + b'Connection: close\r\n\r\n{"model": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("kind", NO_ANSWERS)
def test_bytes_that_are_no_answer(kind: str) -> None:
    with FakeServer() as server:
        client = connected(server)
        server.behave = raw(NO_ANSWERS[kind])
        tracemalloc.start()
        message = failure(lambda: client.score([IDS], [1]))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert "`teacher_model_server_url`" in message
    assert len(message) < 600
    assert most < 64 * 2**20


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("token_ids"), "without `token_ids`"),
        (lambda c: c.update(token_ids=[]), "not 1 to 4 token ids"),
        (lambda c: c.update(token_ids=[5] * 5), "not 1 to 4 token ids"),
        (lambda c: c.update(token_ids=["5"]), "not 1 to 4 token ids"),
        (lambda c: c.update(token_ids=[-1]), "not 1 to 4 token ids"),
        (lambda c: c.update(token_ids=[5.0]), "not 1 to 4 token ids"),
        (lambda c: c.update(token_ids=[True]), "not 1 to 4 token ids"),
        (lambda c: c.update(token_ids={"0": 5}), "without `token_ids`"),
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
    with FakeServer() as server:
        client = connected(server, limits=PATIENT)
        server.delay = lambda request: 0.0 if request["prompt"] == IDS else 0.0 * server.released.wait(60)
        server.change = choice(lambda c: c.pop("prompt_logprobs"))
        with pytest.raises(TeacherError, match="without `prompt_logprobs`"):
            client.score([SEQUENCES[0], SEQUENCES[1], IDS], [1, 1, 1])
        wait_until(lambda: not under_way())
        assert not server.released.is_set()


def test_a_waiting_run_can_be_interrupted() -> None:
    # A process that was started in the background of a shell ignores the signal otherwise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _interrupt_a_waiting_run()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_a_waiting_run() -> None:
    with FakeServer() as server:
        client = connected(server, limits=PATIENT)
        server.delay = lambda request: 0.0 * server.released.wait(60)
        main = threading.main_thread().ident

        def interrupt() -> None:
            wait_until(lambda: len(server.completions) == 4)
            signal.pthread_kill(main, signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            client.score([IDS] * 4, [1] * 4)
        wait_until(lambda: not under_way())
        assert not server.released.is_set()
        server.delay = lambda request: 0.0
        assert len(client.score([IDS], [1])[0].logps) == 5


# --- what a server sends decides nothing and is shown nowhere --------------------------------------------------------
@pytest.mark.parametrize("number", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(number: int) -> None:
    with FakeServer() as server, FakeServer() as target:
        client = connected(server)
        server.behave = lambda handler, path: send(handler, number, b"", Location=target.url + path)
        assert "Set the URL that it leads to" in failure(lambda: client.score([IDS], [1]))
        assert not target.requests


def test_no_cookie_is_sent_back() -> None:
    with FakeServer() as server:
        client = connected(server)
        body = json.dumps({"object": "list", "data": server.models}).encode()
        server.behave = lambda handler, path: send(handler, 200, body, **{"Set-Cookie": f"a={SECRET}; Path=/"})
        for _ in range(2):
            client.connect(None)
    assert not any("Cookie" in headers for headers in server.headers)


def test_no_log_says_what_a_server_sent(caplog: pytest.LogCaptureFixture) -> None:
    """Not even that of the HTTP library, of which others in this process keep theirs."""

    def odd_words(handler: Any, path: str) -> bool:
        handler.send_response_only(503, SECRET)
        handler.send_header("X-Key", SECRET)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    with caplog.at_level(logging.DEBUG), FakeServer() as server:
        client = connected(server)
        for behave in (odd_words, not_http, cut_off, status(200), status(400), status(302)):
            server.behave = behave
            failure(lambda: client.score([IDS], [1]))
        for name in ("httpcore2.connection", "httpcore2.http11"):
            logging.getLogger(name).debug("of another user")
    assert "HTTP 503 (Service Unavailable)" in caplog.text
    assert SECRET not in caplog.text
    assert [record.getMessage() for record in caplog.records if "httpcore2" in record.name] == ["of another user"] * 2
