"""A small Hub on this machine, for the real client: it answers what a push asks, and fails as a repository is called.

`me/commit-403` refuses the commit with 403, `me/create-401` the repository itself, `me/auth-403` to write there;
`closes` in place of a number ends the connection without an answer. `me/whole` takes everything.
"""

import base64
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from loopback import answering

COMMIT = "c0ffee" * 6 + "c0ff"


class Hub(ThreadingHTTPServer):
    """What has arrived: files by repository and name, and every request with its headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no news."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    with answering(hub):
        yield hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, body: bytes) -> None:
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        action, repository = self._meant(body)
        failure = re.fullmatch(rf".*/{action}-(\d+|closes)(-\w+)?", repository)
        if failure is not None and failure[1] == "closes":
            self.close_connection = True
            self.connection.close()
        elif failure is not None:
            # As the Hub has it: what it was asked, token and all, comes back.
            self._send(int(failure[1]), {"error": f"refused: {self.headers.get('Authorization')}"})
        else:
            self._send(200, self._result(action, repository, body))

    def _meant(self, body: bytes) -> tuple[str, str]:
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            return "create", f"{asked.get('organization') or 'me'}/{asked['name']}"
        found = re.match(r"/api/(?:models|datasets)/([\w.-]+/[\w.-]+)(?:/(\w+))?", self.path)
        return ((found[2] or "create"), found[1]) if found is not None else ("other", "")

    def _result(self, action: str, repository: str, body: bytes) -> Any:
        if action == "create":
            return {"url": f"{self.server.url}/{repository}", "id": repository, "name": repository}
        if action == "preupload":
            asked = json.loads(body)["files"]
            return {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            }
        if action == "commit":
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[repository][value["path"]] = base64.b64decode(value["content"])
            return {"commitUrl": f"{self.server.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT}
        return {"id": repository, "sha": COMMIT, "siblings": [], "tags": []}

    def _send(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
