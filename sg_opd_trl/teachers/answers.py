"""What a completions server answered, checked down to each number. Messages never quote an answer."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import NonFiniteError, TeacherError

# vLLM sends this in place of minus infinity.
_MINUS_INFINITY = -9999.0
# Rounding of a log-softmax can end a hair above 0; more than this is a broken score.
_POSITIVE_TOLERANCE = 1e-3
_SHOWABLE = re.compile(r"[\w./:@+-]{1,120}")


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


class Aborted(Exception):
    """The server gave up a completion that it had begun, as it does when it is shut down."""


def wrong_answer(where: str, what: str, way_out: str) -> TeacherError:
    """The message for an answer that cannot be used."""
    return TeacherError(
        f"`teacher_model_server_url` must name a vLLM server with the teacher, got {what} from {where}. It cannot be "
        f"used, and nothing was updated. {way_out}"
    )


def read_json(body: bytes, where: str) -> dict:
    """The JSON object in a body.

    Raises:
        TeacherError: something else, a web page for instance.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise wrong_answer(
            where,
            "an answer that is no JSON object",
            "Point it at vLLM itself, not at a web page.",
        )
    return value


def read_models(body: bytes, where: str) -> list[ServedModel]:
    """The models that a server lists.

    Raises:
        TeacherError: it lists none, or not in the form of the API.
    """
    entries = read_json(body, where).get("data")
    entries = entries if isinstance(entries, list) else []
    models = [
        ServedModel(entry["id"], _text(entry.get("root")), _count(entry.get("max_model_len")))
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    ]
    if not models:
        raise wrong_answer(where, "a list of models without any", "Start it with the teacher: `sg-opd serve-teacher`.")
    return models


def shown_names(models: Sequence[ServedModel]) -> str:
    """The names of models, those that look like names."""
    names = [repr(model.name) if _SHOWABLE.fullmatch(model.name) else "a name that is not shown" for model in models]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class CompletionAnswer:
    """The one choice of a completion, for a prompt of token ids.

    Args:
        body: of the response.
        where: address for messages.
        names: that the model may be called by.
        prompt: token ids that were sent.

    Raises:
        TeacherError: another form, another model or another prompt.
        Aborted: the server gave up.
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
        if answer.get("model") not in names:
            raise wrong_answer(
                where, "an answer of another model", "Set `teacher_model_name_or_path` to the name that it serves."
            )
        if self.choice.get("finish_reason") in ("abort", "error"):
            raise Aborted
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
            NonFiniteError: a number that is no log-prob.
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
        if not math.isfinite(logp) or logp <= _MINUS_INFINITY or logp > _POSITIVE_TOLERANCE:
            raise NonFiniteError(
                f"The teacher gave a log-prob that is not finite or above 0, {float(logp)} at token {position} of a "
                f"sequence, from the server {self.where} in `teacher_model_server_url`. Nothing was updated. Check "
                "the weights that it serves, or start it with --dtype float32 or bfloat16 and --logprobs-mode "
                "processed_logprobs."
            )
        return float(logp)

    def _id(self, key: str) -> int:
        if not key.isascii() or not key.isdigit():
            raise self._wrong("log-probs of something else than token ids")
        return int(key)

    def _wrong(self, what: str) -> TeacherError:
        return wrong_answer(
            self.where, what, "Serve the teacher with vLLM 0.10.2 or later, as `sg-opd serve-teacher` does."
        )


def _falling(entry: tuple[float, int]) -> tuple[float, int]:
    return -entry[0], entry[1]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
