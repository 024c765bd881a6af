"""A completions server of the standard library, in this process, that answers as vLLM does, or as it is told to."""

import json
import math
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VOCAB = 26
SECRET = "hunter2-canary"


def scripted_logps(ids: list[int]) -> list[list[float]]:
    """Log-probs of every id at every position of a sequence, each a function of the ids before it."""
    rows = []
    for position in range(len(ids)):
        state = sum((place + 1) * token for place, token in enumerate(ids[:position])) % 97
        logits = [math.sin(0.7 * token + state) * 3 for token in range(VOCAB)]
        total = math.log(sum(map(math.exp, logits)))
        rows.append([logit - total for logit in logits])
    return rows


def scripted_completion(ids: list[int], seed: int, longest: int) -> list[int]:
    """A completion that depends on the prompt and the seed."""
    length = 1 + (seed + sum(ids)) % longest
    return [5 + (seed // (place + 1) + sum(ids)) % (VOCAB - 5) for place in range(length)]


def _scripted(ids: list[int], request: dict) -> list[int]:
    return scripted_completion(ids, request["seed"], request["max_tokens"])


class FakeServer:
    """One server; `url` is where it is. Use it as a context, or `start` and `stop` it.

    Args:
        logps: of all ids at all positions of a sequence.
        complete: `(prompt, request) -> completion`.
        model: name that it serves.
        change: `(path, request, answer) -> answer`, or None for no change.
        behave: `(handler, path) -> True` once it has answered by itself, for every request.
    """

    def __init__(
        self,
        logps: Callable[[list[int]], list[list[float]]] = scripted_logps,
        complete: Callable[[list[int], dict], list[int]] | None = None,
        model: str = "teacher",
        change: Callable[[str, dict, dict], Any] | None = None,
        behave: Callable[[BaseHTTPRequestHandler, str], bool] | None = None,
        tokenize: Callable[[str], list[int]] | None = None,
        max_length: int = 512,
        delay: Callable[[dict], float] = lambda request: 0.0,
        host: str = "127.0.0.1",
    ) -> None:
        self.logps, self.model, self.change, self.behave = logps, model, change, behave
        self.complete = complete or (
            lambda ids, request: scripted_completion(ids, request["seed"], request["max_tokens"])
        )
        self.tokenize, self.max_length, self.delay = tokenize, max_length, delay
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.most_at_a_time = self.at_a_time = 0
        self.models = [{"id": model, "root": f"folder/{model}", "max_model_len": max_length}]
        self.host, self.port = host, 0
        self._lock = threading.Lock()
        self._server: Any = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> "FakeServer":
        self._server = _Server((self.host, self.port), _handler_of(self))
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.drop_connections()
        # Only now, so that an answer that was held back finds nobody.
        self._server.released.set()

    def __enter__(self) -> "FakeServer":
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.stop()

    @property
    def released(self) -> threading.Event:
        """Set when it stops: what holds back an answer waits for this."""
        return self._server.released

    @property
    def connected(self) -> int:
        """Connections that were opened to it since its last start."""
        return len(self._server.connections)

    @property
    def completions(self) -> list[dict]:
        return [request for request in self.requests if "max_tokens" in request]

    def answer(self, path: str, request: dict) -> Any:
        if path == "/v1/models":
            return {"object": "list", "data": self.models}
        if path == "/tokenize":
            return {"tokens": self.tokenize(request["prompt"]) if self.tokenize else None}
        ids, top = request["prompt"], request.get("prompt_logprobs")
        written = self.complete(ids, request) if top is None else [5]
        choice = {
            "index": 0,
            "finish_reason": "length" if len(written) == request["max_tokens"] else "stop",
            "text": "not read",
            "token_ids": written,
            "prompt_token_ids": ids,
            "prompt_logprobs": None if top is None else self._entries(ids, top),
        }
        return {"object": "text_completion", "model": self.model, "choices": [choice]}

    def _entries(self, ids: list[int], top: int) -> list[dict | None]:
        entries: list[dict | None] = [None]
        for token, logps in list(zip(ids, self.logps(ids), strict=True))[1:]:
            order = sorted(range(len(logps)), key=lambda i: -logps[i])
            chosen = dict.fromkeys([token, *order[:top]])
            entries.append({str(i): {"logprob": logps[i], "rank": order.index(i) + 1} for i in chosen})
        return entries

    def serve(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        request = json.loads(body) if body else {}
        with self._lock:
            self.requests.append(request)
            self.headers.append(dict(handler.headers))
            self.at_a_time += 1
            self.most_at_a_time = max(self.most_at_a_time, self.at_a_time)
        try:
            if self.behave is not None and self.behave(handler, path):
                return
            time.sleep(self.delay(request))
            answer = self.answer(path, request)
            if self.change is not None:
                changed = self.change(path, request, answer)
                answer = answer if changed is None else changed
            send(handler, 404 if path == "/tokenize" and self.tokenize is None else 200, json.dumps(answer).encode())
        finally:
            with self._lock:
                self.at_a_time -= 1


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> bool:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)
    return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        self.connections: list[Any] = []
        self.released = threading.Event()
        super().__init__(*arguments)

    def get_request(self) -> Any:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def drop_connections(self) -> None:
        """As a process that has ended: nobody is left to answer on connections that are open."""
        for connection in self.connections:
            try:
                connection.shutdown(2)
            except OSError:
                continue

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are part of the tests."""


def _handler_of(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.serve(self, self.path)

        def do_POST(self) -> None:
            server.serve(self, self.path)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    return Handler
