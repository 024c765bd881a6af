"""`teacher_model_server_url` and what goes with it: one form for all of its spellings, and its checks."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..errors import SGOPDConfigError
from ..setting import AUTO, Rule

API_KEY_VARIABLE = "SG_OPD_TEACHER_API_KEY"
"""Environment variable with the key of the teacher servers; settings end up in checkpoints, so it is none of them."""

TIMEOUT, MAX_RETRIES = 600.0, 5
"""Defaults of `teacher_request_timeout` (seconds) and `teacher_max_retries`."""

ADVISED_DEAD_ZONE = 0.05
"""`gate_dead_zone` that keeps the numerical noise of a bfloat16 server away from the gate's signs (our choice)."""

# Here and not in the configuration, which reads them: a `ServerTeacher` made in Python has the same two limits.
TIMEOUT_RULE = Rule(
    above=0,
    why="It is the time in seconds that a request to a teacher server may take, its retries included.",
    way_out=f"Set it to {TIMEOUT:g}, the default.",
)
RETRIES_RULE = Rule(at_least=0, why="It counts how often a request is sent again.")

_PORTS = {"http": 80, "https": 443}
_WAY_OUT = "Set for example http://localhost:8000."
_HEADER_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
_HEADER_VALUE = re.compile(r"[ -~\xa0-\xff]*")
# What a message shows of a URL: scheme and host, not the path, in which some gateways have a key.
_SHOWN = re.compile(r"([\w+.-]+:/*)?[^/\\\s]*")
_UNSENDABLE = re.compile(r"[\x00-\x20\x7f]")


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Attributes:
        scheme: `http` or `https`.
        host: name or number.
        port: of the host.
        path: what comes before `/v1`, without a slash at its end.
    """

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        """For messages: without the path, in which some gateways have a key."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def read_address(text: str) -> Address:
    """The address in a URL; a `/v1` at its end is taken off.

    Raises:
        SGOPDConfigError: something else than a plain http or https URL. What it shows holds no credentials.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise bad_url("something that is not a URL", "It could not be reached.") from None
    if any(mark in text for mark in "@?#"):
        raise SGOPDConfigError(
            "`teacher_model_server_url` must not hold credentials, a query or a fragment, got a URL with one, not "
            f"shown here. Settings are written into checkpoints. Set the environment variable {API_KEY_VARIABLE} for "
            "a key, or pass ServerTeacher(url, headers=...) as `teacher_model`."
        )
    if parts.scheme not in _PORTS or not parts.hostname:
        shown = _SHOWN.match(text)
        raise bad_url(repr(shown[0][:100] if shown else ""), "It says how the server is reached.")
    if port == 0 or not _is_host(parts.hostname):
        shown = _SHOWN.match(text)
        raise bad_url(repr(shown[0][:100] if shown else ""), "No server can have that name or port.")
    if _UNSENDABLE.search(parts.hostname + parts.path) or not parts.path.isascii():
        raise bad_url("one with characters that a URL cannot have, not shown here", "HTTP cannot send it.")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return Address(parts.scheme, parts.hostname, _PORTS[parts.scheme] if port is None else port, path)


def _is_host(name: str) -> bool:
    """Whether the parts of a name are as long as the system that knows hosts allows: 1 to 63 letters, 253 in all."""
    parts = name.removesuffix(".").split(".")
    return ":" in name or (len(name) <= 253 and all(0 < len(part) <= 63 for part in parts))


def api_key() -> str | None:
    """The key in SG_OPD_TEACHER_API_KEY, None without one; a line end, as files have one, is no part of it."""
    return os.environ.get(API_KEY_VARIABLE, "").strip() or None


def check_headers(headers: Mapping[str, str]) -> None:
    """Refuse what HTTP cannot send; a library would show the value, which may be a key, in its error.

    Raises:
        SGOPDConfigError: names the header and does not show its value.
    """
    for name, value in headers.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            shown, part = "a header", "name"
        elif not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            shown, part = f"the header {name!r}", "value"
        else:
            continue
        raise SGOPDConfigError(
            f"`headers` must be of printable Latin-1 characters, got others in the {part} of {shown}, not shown here. "
            f"HTTP cannot send them. Correct the environment variable {API_KEY_VARIABLE}, or the headers that are "
            "given to ServerTeacher."
        )


def bad_url(got: str, reason: str) -> SGOPDConfigError:
    """The message for a value of `teacher_model_server_url` that leads nowhere."""
    return SGOPDConfigError(
        f"`teacher_model_server_url` must be made of http or https URLs, got {got}. {reason} {_WAY_OUT}"
    )


def parsed(value: Any) -> Any:
    """A value from a command line: JSON lists and mappings are strings there."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            raise bad_url("JSON that cannot be read", "A list or a mapping may be given as JSON.") from None
    return value


def read_servers(value: Any) -> dict[str, list[str]] | list[str]:
    """The replicas of one teacher, or those of each teacher by `teacher_id`.

    Raises:
        SGOPDConfigError: another form, an empty one, or a URL that is not one.
    """
    if isinstance(value, Mapping):
        if not value or not all(str(label) for label in value):
            raise bad_url("a mapping without names", "It maps the names in the column `teacher_id` to servers.")
        return {str(label): _replicas(part) for label, part in value.items()}
    return _replicas(value)


def _replicas(value: Any) -> list[str]:
    urls = [value] if isinstance(value, str) else value
    if not isinstance(urls, Sequence) or not urls or not all(isinstance(url, str) for url in urls):
        raise bad_url(
            f"{type(value).__name__} without a URL" if not value else f"{type(value).__name__} of other things",
            "It is a URL, a list of the replicas of one teacher, or a mapping from `teacher_id` to either.",
        )
    addresses = [read_address(url) for url in urls]
    if len(set(addresses)) < len(addresses):
        raise bad_url("one URL twice in a list", "Replicas are different servers with the same model.")
    return list(urls)


def server_problems(config: Any) -> Iterator[str]:
    """What is wrong with a configuration's server settings beyond their ranges, one message each."""
    timeout, retries = config.teacher_request_timeout, config.teacher_max_retries
    url = config.teacher_model_server_url
    if url is None:
        for name, value, usual in (
            ("teacher_request_timeout", timeout, TIMEOUT),
            ("teacher_max_retries", retries, MAX_RETRIES),
        ):
            if value != usual:
                yield (
                    f"`{name}` must go with `teacher_model_server_url`, got {value!r} without it. It would do "
                    "nothing. Leave it out, or set the URL; a ServerTeacher in Python has arguments of its own."
                )
        return
    try:
        read_servers(url)
    except SGOPDConfigError as error:
        yield str(error)
    if config.temperature != 1:
        yield temperature_problem(config.temperature)
    if config.sign_gated_extrapolation and config.gate_dead_zone == AUTO:
        yield dead_zone_problem()


def temperature_problem(temperature: Any) -> str:
    """The message for a temperature under which a server's scores would be of another distribution."""
    return (
        f"`temperature={temperature}` is not supported with a teacher server: vLLM scores given tokens at temperature "
        "1 whatever it is asked for. Set temperature=1, or use a teacher in this process."
    )


def dead_zone_problem() -> str:
    """The message for a dead zone that would have to be measured with a server's numerics."""
    return (
        f"`gate_dead_zone={AUTO!r}` is not supported with a teacher server: how much another engine with other "
        "weights differs from the student by rounding alone cannot be measured from here. Set "
        f"gate_dead_zone={ADVISED_DEAD_ZONE:g}, which suits a server in bfloat16, or another number."
    )


def limit_problems(timeout: Any, retries: Any) -> Iterator[str]:
    """What is wrong with the two limits of a request."""
    for problem in (
        TIMEOUT_RULE.problem("teacher_request_timeout", timeout, TIMEOUT),
        RETRIES_RULE.problem("teacher_max_retries", retries, MAX_RETRIES, whole=True),
    ):
        if problem is not None:
            yield problem
