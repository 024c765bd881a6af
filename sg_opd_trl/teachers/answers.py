"""What a completions server answered, checked down to each number.

No message quotes an answer, neither text nor token ids: it may hold anything, a key that was sent to it too. Counts,
lengths and log-probs are numbers and are shown.
"""

import json
import re
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

from ..errors import NonFiniteTeacherError, SGOPDError, TeacherError
from .urls import API_KEY_VARIABLE

T = TypeVar("T")

# vLLM sends this in place of minus infinity.
_MINUS_INFINITY = -9999.0
# Rounding of a log-softmax can end a hair above 0; more than this is a broken score.
_POSITIVE_TOLERANCE = 1e-3
# An id as JSON has it for a key, each in one way: two spellings would be one token twice.
_ID = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)


class ServedModel(NamedTuple):
    """A model that a server lists.

    Attributes:
        name: what requests call it.
        root: path or Hub id that it was loaded from, None where the server does not say.
        max_length: longest prompt and completion together, None where the server does not say.
    """

    name: str
    root: str | None
    max_length: int | None


class SequenceScores(NamedTuple):
    """Scores of one sequence from its first scored token on.

    Attributes:
        logps: one per token.
        support: per token the likeliest tokens in falling order, as `(log-prob, id)`; empty if none were asked for.
    """

    logps: list[float]
    support: list[list[tuple[float, int]]]


class Outage(Exception):
    """A failure that another try, or another replica, may not have.

    Args:
        reason: what happened, as the end of a sentence; our words, not the server's.
        final: the error, where only another replica may do better.
        wait: seconds before which the server will not do better by its own word.
    """

    def __init__(self, reason: str, final: TeacherError | None = None, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.final, self.wait = reason, final, wait


def wrong_answer(where: str, what: str, way_out: str) -> TeacherError:
    """The message for an answer that cannot be used."""
    return TeacherError(
        f"`teacher_model_server_url` must name a vLLM server with the teacher, got {what} from {where}. It cannot be "
        f"used, and nothing was updated. {way_out}"
    )


def read_answer(read: Callable[[bytes, str], T], body: bytes, where: str) -> T:
    """What an answer says, read by `read`; of the form that nobody thought of, an error all the same.

    Raises:
        Outage: another try, or another replica, may do better.
        TeacherError: it cannot be used.
    """
    try:
        return read(body, where)
    except (SGOPDError, Outage):
        raise
    except Exception as error:  # noqa: BLE001  # a server decides what is read, and must not end a run in a traceback
        what = f"an answer that cannot be read ({type(error).__name__})"
        raise wrong_answer(where, what, "Serve the teacher with vLLM, as `sg-opd serve-teacher` does.") from None


def read_json(body: bytes, where: str) -> dict:
    """The JSON object in a body.

    Raises:
        Outage: something else, such as the web page of a proxy before this replica alone.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        what = "an answer that is no JSON object"
        raise Outage(what, final=wrong_answer(where, what, "Point it at vLLM itself, not at a web page."))
    return value


def read_models(body: bytes, where: str) -> list[ServedModel]:
    """The models that a server lists.

    Raises:
        TeacherError: it lists none, or not in the form of the API.
    """
    entries = read_json(body, where).get("data")
    entries = entries if isinstance(entries, list) else []
    models = [
        ServedModel(entry["id"], _text(entry.get("root")), _context(entry, where))
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    ]
    if not models:
        raise wrong_answer(where, "a list of models without any", "Start it with the teacher: `sg-opd serve-teacher`.")
    return models


class CompletionAnswer:
    """The one choice of a completion, for a prompt of token ids.

    Args:
        body: of the response.
        where: address for messages.
        names: that the model may be called by.
        prompt: token ids that were sent.

    Raises:
        TeacherError: another form, another model or another prompt.
        Outage: no JSON, or a completion that the server gave up.
    """

    def __init__(self, body: bytes, where: str, names: frozenset[str], prompt: Sequence[int]) -> None:
        answer = read_json(body, where)
        self.where = where
        self.prompt = prompt
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._wrong("a completion with other than one choice")
        self.choice: dict[str, Any] = choices[0]
        if self.choice.get("index") != 0:
            raise self._wrong("the choice of another request")
        model = answer.get("model")
        if not isinstance(model, str) or model not in names:
            raise wrong_answer(
                where, "an answer of another model", "Set `teacher_model_name_or_path` to the name that it serves."
            )
        if self.choice.get("finish_reason") in ("abort", "error"):
            # It does so when it is shut down.
            raise Outage("it gave up the request")
        if self.choice.get("finish_reason") not in ("stop", "length"):
            raise self._wrong("a completion without a known end")
        echoed = self.choice.get("prompt_token_ids")
        if echoed is not None and echoed != list(prompt):
            raise self._wrong("scores of other tokens than those that were sent")

    def scores(self, first: int, top: int, vocab_size: int) -> SequenceScores:
        """Log-probs of the prompt's own tokens from position `first` on, with the `top` likeliest below `vocab_size`.

        A position at which fewer of them were sent has a shorter support.

        Raises:
            TeacherError: too few positions, or one that lacks its token.
            NonFiniteTeacherError: a number that is no log-prob.
        """
        entries = self.choice.get("prompt_logprobs")
        if not isinstance(entries, list):
            raise self._wrong("an answer without `prompt_logprobs`")
        if len(entries) != len(self.prompt):
            raise self._wrong(f"{len(entries)} log-probs for {len(self.prompt)} tokens")
        logps, support = [], []
        for position in range(1, len(entries)):
            entry, token = entries[position], self.prompt[position]
            own = entry.get(str(token)) if isinstance(entry, dict) else None
            if own is None:
                raise self._wrong(f"no log-prob of token {token} at position {position}")
            if position >= first:
                logps.append(self._logp(own, position))
                if top:
                    found = ((self._logp(value, position), self._id(key)) for key, value in entry.items())
                    # The token itself is sent too, where it is not among them, and is then the last.
                    likeliest = sorted(found, key=_falling)[:top]
                    support.append([(logp, token) for logp, token in likeliest if token < vocab_size])
        return SequenceScores(logps, support)

    def completion(self, longest: int) -> list[int]:
        """The generated token ids.

        Raises:
            TeacherError: none, more than allowed, or something else than ids.
        """
        ids = self.choice.get("token_ids")
        if not isinstance(ids, list):
            raise self._wrong("a completion without `token_ids`")
        if not 0 < len(ids) <= longest or not all(type(token) is int and token >= 0 for token in ids):
            raise self._wrong(f"a completion that is not 1 to {longest} token ids")
        if self.choice["finish_reason"] == "length" and len(ids) < longest:
            raise wrong_answer(
                self.where,
                f"a completion cut after {len(ids)} of {longest} tokens",
                "Start the server with a larger --max-model-len.",
            )
        return ids

    def _logp(self, value: Any, position: int) -> float:
        logp = value.get("logprob") if isinstance(value, dict) else None
        if isinstance(logp, bool) or not isinstance(logp, int | float):
            raise self._wrong(f"a log-prob that is no number at position {position}")
        # The bounds first: a whole number of hundreds of digits is in neither, and has no float.
        if not _MINUS_INFINITY < logp <= _POSITIVE_TOLERANCE:
            raise NonFiniteTeacherError(
                f"The teacher gave a log-prob that is not finite or above 0, {_shown(logp)} at token {position} of a "
                f"sequence, from the server {self.where} in `teacher_model_server_url`. Nothing was updated. Check "
                "the weights that it serves, or start it with --dtype float32 or bfloat16 and --logprobs-mode "
                "processed_logprobs."
            )
        return float(logp)

    def _id(self, key: str) -> int:
        if not _ID.fullmatch(key):
            raise self._wrong("log-probs of something else than token ids")
        return int(key)

    def _wrong(self, what: str) -> TeacherError:
        return wrong_answer(
            self.where, what, "Serve the teacher with vLLM 0.10.2 or later, as `sg-opd serve-teacher` does."
        )


def _shown(number: int | float) -> str:
    """A number for a message, however many digits it has."""
    try:
        return str(float(number))
    except OverflowError:
        return "a whole number beyond all floats"


def _falling(entry: tuple[float, int]) -> tuple[float, int]:
    return -entry[0], entry[1]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _context(entry: dict, where: str) -> int | None:
    """The longest sequence that a server says it takes; None where it says nothing."""
    value = entry.get("max_model_len")
    if value is None or (type(value) is int and value > 0):
        return value
    raise wrong_answer(where, "a `max_model_len` that is no count", "Point it at vLLM itself.")


# Words in the body of HTTP 400 or 422 -> the way out.
_TOO_MANY_LOGPROBS = (
    "max_logprobs", "max logprobs", "logprobs of", "requested sample logprobs", "requested prompt logprobs"
)  # fmt: skip
_ADVICE = {
    _TOO_MANY_LOGPROBS: "It allows fewer log-probs at a position than asked for. Start it with --max-logprobs -1, or "
    "lower `distillation_topk`.",
    ("context length", "max_model_len", "maximum model length", "longer than"): "The sequence and the one token that "
    "scoring adds are longer than it takes. Start it with a larger --max-model-len, or lower `max_completion_length`.",
    (
        "out of vocabulary",
        "out-of-vocab",
    ): "It lacks some of the student's token ids. Serve a teacher of the student's family.",
}
_WAYS_OUT = {
    401: f"It asks for a key. Set the environment variable {API_KEY_VARIABLE}.",
    403: f"It does not take this key, or none. Set the environment variable {API_KEY_VARIABLE}.",
    404: "It has no such path or model. Point `teacher_model_server_url` at vLLM, without /v1/completions at its end.",
    405: "It does not take such requests. Point `teacher_model_server_url` at vLLM's own address.",
    413: "The request is too large for it or for a proxy before it. Raise that limit.",
}
_OTHERWISE = "It does not take the request. Serve the teacher with vLLM, as `sg-opd serve-teacher` does."
_REDIRECTED = "It sends the request elsewhere, which is not followed. Set the URL that it leads to."


class RefusedRequest(TeacherError):
    """A request that a server will not take another time either.

    Attributes:
        too_many_logprobs: whether it asks for more log-probs at a position than the server allows.
    """

    too_many_logprobs = False


def refused(where: str, status: int, body: bytes) -> RefusedRequest:
    """The error for an answer whose status says that the request is refused; its text is searched and not shown."""
    text = body.decode("utf-8", errors="replace").lower() if status in (400, 422) else ""
    found = next((words for words in _ADVICE if any(word in text for word in words)), None)
    if found is not None:
        way_out = _ADVICE[found]
    else:
        way_out = _REDIRECTED if 300 <= status < 400 else _WAYS_OUT.get(status, _OTHERWISE)
    error = RefusedRequest(
        f"`teacher_model_server_url` must name a server that takes the teacher's requests, got {status_text(status)} "
        f"from {where}. Nothing was updated. {way_out}"
    )
    error.too_many_logprobs = found is _TOO_MANY_LOGPROBS
    return error


def status_text(status: int) -> str:
    """`HTTP 404 (Not Found)`, with the standard's words and not the server's."""
    known = {int(entry): entry.phrase for entry in HTTPStatus}
    return f"HTTP {status} ({known[status]})" if status in known else f"HTTP {status}"
