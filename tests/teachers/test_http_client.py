"""The client of teacher servers: what it asks, which model it finds, and its settings."""

import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest

from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.teachers import http
from sg_opd_trl.teachers.client import CompletionsClient
from sg_opd_trl.teachers.http import RequestLimits
from sg_opd_trl.teachers.urls import parsed, read_address, read_servers
from teachers.fake_server import SECRET, FakeServer, scripted_completion, scripted_logps
from teachers.http_cases import (
    FIRSTS,
    IDS,
    LIMITS,
    PATIENT,
    SEQUENCES,
    choice,
    connected,
    expected,
    failure,
)


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


def test_as_many_requests_at_a_time_as_allowed_and_no_more() -> None:
    together = threading.Barrier(3)

    def meet(request: dict) -> float:
        """Answers wait for one another: with fewer at a time none would come."""
        return 0.0 * together.wait(timeout=120) if "prompt" in request else 0.0

    with FakeServer(delay=meet) as server:
        client = connected(server, limits=RequestLimits(timeout=60.0, max_retries=0, concurrency=3))
        client.score([IDS] * 12, [1] * 12)
    assert server.most_at_a_time == 3


def test_nothing_to_ask() -> None:
    with FakeServer() as server:
        client = connected(server)
        assert client.score([], []) == []
        assert client.generate([], []) == []


def test_headers_and_kept_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_IDLE_SECONDS", 600.0)
    with FakeServer() as server:
        client = connected(server, headers={"Authorization": f"Bearer {SECRET}"})
        for _ in range(3):
            client.score([IDS], [1])
        assert server.connected == 1
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
        client.close()
        client.score([IDS], [1])
        assert server.connected == 2


def test_a_header_comes_as_it_was_given() -> None:
    with FakeServer() as server:
        connected(server, headers={"X-Key": "caf\u00e9 1 "})
    assert server.headers[0]["X-Key"] == "caf\u00e9 1"
    assert server.headers[0]["Accept-Encoding"] == "identity", "a small answer is no large one"


def test_a_kept_connection_that_the_server_has_closed_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer().start()
    client = connected(server)
    server.stop()
    server.start()
    assert len(client.score([IDS], [1])) == 1
    server.stop()
    assert not caplog.records


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
        names = f"{server.url}, whose names {server.url}/v1/models tells"
        assert f"must serve one model, got 3 models at {names}" in failure(lambda: client.connect(None))


def test_another_model_is_served() -> None:
    with FakeServer(model="other") as server:
        message = failure(lambda: connected(server))
        assert f"must serve 'teacher', got another one at {server.url}" in message
        assert "/v1/models tells: 'other'. Another model" in message
        assert "`teacher_model_name_or_path`" in message
        server.models = [{"id": SECRET, "root": SECRET}]
        key = {"Authorization": f"Bearer {SECRET}"}
        assert "must serve 'teacher', got another one" in failure(lambda: connected(server, headers=key))


@pytest.mark.parametrize("name", ["a" * 101, "two words", "line\nbreak", "\x1b[31m", "\ud800", "caf\u00e9", ""])
def test_what_does_not_look_like_a_name_is_not_quoted(name: str) -> None:
    with FakeServer() as server:
        server.models = [{"id": name, "root": None}]
        assert "/v1/models tells. Another model" in failure(lambda: connected(server))
        server.models += [{"id": f"model-{number}", "root": None} for number in range(9)]
        message = failure(lambda: connected(server))
    assert "got 10 models" in message
    assert "tells: 'model-0', 'model-1', 'model-2', 'model-3', 'model-4'. Another model" in message
    assert message.isascii()


def test_replicas_of_different_models() -> None:
    with FakeServer(model="one") as one, FakeServer(model="other") as other:
        client = CompletionsClient([one.url, other.url], LIMITS)
        message = failure(lambda: client.connect(None))
        assert f"must serve the same model as the first replica, got another one at {other.url}" in message


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


@pytest.mark.parametrize(
    "text",
    [
        *("", "localhost:8000", "host", "http://", "http://host:port", "ftp://host", "http://gpu..cluster"),
        *("http://.gpu", f"http://{'g' * 64}", f"http://{'gpu.' * 63}cluster", "http://host:0", "http://host:65536"),
        *("http://host:-5", "http://[::1", "http://."),
    ],
)
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


@pytest.mark.parametrize(("module", "light"), [("client", set()), ("urls", {"httpx2"})])
def test_neither_torch_nor_transformers_is_needed(module: str, light: set) -> None:
    """By the settings of servers, which a command line reads before it does anything, not even an HTTP library."""
    code = (
        f"import sys, sg_opd_trl.teachers.{module}\n"
        f"heavy = { ({'torch', 'transformers', 'trl', 'numpy', 'requests'} | light)!r} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
