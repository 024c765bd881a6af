"""The replicas of one model behind vLLM's completions API."""

import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import TeacherError
from .answers import (
    CompletionAnswer,
    RefusedRequest,
    SequenceScores,
    ServedModel,
    read_json,
    read_models,
    wrong_answer,
)
from .http import Request, RequestLimits, RequestPool
from .urls import check_headers, read_address

_ANY_ID = 2**63
# The largest answer to a request (our choice): what there is once, and for each log-prob or id. vLLM sends about 90
# bytes for a log-prob with its rank and text; what is larger than this allows is no answer of its.
_ONCE_BYTES, _ENTRY_BYTES = 2**20, 256
# What a message quotes of the models that a server lists: so many names that look like one.
_NAME, _NAMES_SHOWN = re.compile(r"[A-Za-z0-9_./:@+-]{1,100}"), 5
_SCORES, _COMPLETIONS = "scores", "completions"


class CompletionsClient:
    """The replicas of one model behind vLLM's completions API.

    Answers are put in their places by the request that they belong to: the order in which they come means nothing.

    Args:
        urls: of the replicas.
        limits: of each request.
        headers: of each request, for authorization.

    Attributes:
        addresses: of the replicas, for messages.
        model: what requests call the model; set by `connect`.
        root: path or Hub id that it was loaded from, None if unknown; set by `connect`.
        max_length: longest prompt and completion together, None if unknown; set by `connect`.

    Raises:
        SGOPDConfigError: a URL that is none, a header that HTTP cannot send, or limits out of range.
    """

    def __init__(
        self, urls: Sequence[str], limits: RequestLimits | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self.limits = limits or RequestLimits()
        self.limits.check()
        check_headers(headers or {})
        self._secrets = {word for value in (headers or {}).values() for word in value.split()}
        addresses = [read_address(url) for url in urls]
        self.addresses = [str(address) for address in addresses]
        self.model = ""
        self.root: str | None = None
        self.max_length: int | None = None
        self._names: frozenset[str] = frozenset()
        prefetch = {
            _SCORES: self.limits.concurrency * len(addresses),
            # Half of what one server takes, so that scores, which a step waits for, never queue behind them.
            _COMPLETIONS: self.limits.concurrency // 2,
        }
        self._pool_of = functools.cache(lambda process: RequestPool(addresses, headers or {}, self.limits, prefetch))

    # --- before the run ------------------------------------------------------------------------------------------
    def connect(self, expected: str | None) -> None:
        """Find the model on every replica.

        Args:
            expected: its name, or the path or Hub id that it was loaded from; None for the only one served.

        Raises:
            TeacherError: a replica that does not answer, or does not have it.
        """
        request = Request("GET", "/v1/models", read_models, _ONCE_BYTES)
        found = [
            self._chosen(self._pool.ask_one(replica, request), expected, address)
            for replica, address in enumerate(self.addresses)
        ]
        self.model, self.root, _ = found[0][0]
        for (model, _), address in zip(found, self.addresses, strict=True):
            if model.name != self.model:
                raise self._another_model("the same model as the first replica", address, [model])
        self._names = frozenset().union(*(names for _, names in found))
        lengths = [model.max_length for model, _ in found if model.max_length is not None]
        self.max_length = min(lengths, default=None)

    def _chosen(self, models: Sequence[ServedModel], expected: str | None, where: str) -> tuple[ServedModel, set[str]]:
        """The model that is meant, and all names that one server has for it; it answers with the first of them."""
        named = [model for model in models if expected is None or model.name == expected]
        named = named or [model for model in models if model.root == expected]
        roots = {model.root or model.name for model in named}
        if len(roots) != 1:
            raise self._another_model("one model" if expected is None else repr(expected), where, models)
        return named[0], {model.name for model in models if (model.root or model.name) in roots}

    def _another_model(self, wanted: str, where: str, served: Sequence[ServedModel]) -> TeacherError:
        # Names that look like some, and none in which a key comes back that was sent.
        names = [
            repr(model.name)
            for model in served
            if _NAME.fullmatch(model.name) and not any(secret in model.name for secret in self._secrets)
        ]
        got = "another one" if len(served) == 1 else f"{len(served)} models"
        listed = f": {', '.join(names[:_NAMES_SHOWN])}" if names else ""
        return TeacherError(
            f"The teacher server must serve {wanted}, got {got} at {where}, whose names {where}/v1/models "
            f"tells{listed}. Another model would teach something else. Set `teacher_model_name_or_path` to the name "
            "of the one that is meant, or correct `teacher_model_server_url`."
        )

    def tokenize(self, text: str) -> list[list[int] | None]:
        """Token ids of a text by each replica, None where it does not tell."""
        body = _encoded(model=self.model, prompt=text, add_special_tokens=False)
        # No tokenizer makes more than one id of a byte, but for a few at the ends.
        request = Request("POST", "/tokenize", _read_tokens, _largest(len(text.encode()), 1), body)

        def answer(replica: int) -> list[int] | None:
            try:
                return self._pool.ask_one(replica, request)
            except RefusedRequest:
                # A proxy that lets completions through and nothing else.
                return None

        return [answer(replica) for replica in range(len(self.addresses))]

    def probe(self, ids: Sequence[int], top: int) -> list[SequenceScores]:
        """Scores of one sequence by each replica, which must send the ids of what it generates too."""

        def read(body: bytes, where: str) -> SequenceScores:
            answer = CompletionAnswer(body, where, self._names, ids)
            answer.completion(1)
            return answer.scores(1, top, _ANY_ID)

        request = self._scoring(ids, top)._replace(read=read)
        return [self._pool.ask_one(replica, request) for replica in range(len(self.addresses))]

    # --- the two verbs -------------------------------------------------------------------------------------------
    def score(
        self, sequences: Sequence[Sequence[int]], firsts: Sequence[int], top: int = 0, vocab_size: int = _ANY_ID
    ) -> list[SequenceScores]:
        """Log-probs of the tokens of sequences under the model, at temperature 1.

        Args:
            sequences: token ids, at least two each.
            firsts: position of the first token of each that is scored, at least 1.
            top: number of likeliest tokens at each position besides; 0 for none.
            vocab_size: ids from here on are not among them.

        Raises:
            TeacherError: no answer within the limits, or one that cannot be used.
            NonFiniteTeacherError: a number that is no log-prob.
        """
        return self._ask(self._score_requests(sequences, firsts, top, vocab_size), _SCORES)

    def generate(self, prompts: Sequence[Sequence[int]], settings: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """One completion per prompt, as token ids.

        Args:
            prompts: token ids.
            settings: of each request, `max_tokens` and `seed` among them.

        Raises:
            TeacherError: as in `score`.
        """
        return self._ask(self._completion_requests(prompts, settings), _COMPLETIONS)

    # --- prefetching ---------------------------------------------------------------------------------------------
    def prefetch_scores(
        self, sequences: Sequence[Sequence[int]], firsts: Sequence[int], top: int = 0, vocab_size: int = _ANY_ID
    ) -> None:
        """Begin what `score` will be asked for with the same arguments, in whichever order and company."""
        self._pool.prefetch(self._score_requests(sequences, firsts, top, vocab_size), _SCORES)

    def prefetch_completions(self, prompts: Sequence[Sequence[int]], settings: Sequence[Mapping[str, Any]]) -> None:
        """Begin what `generate` will be asked for with the same arguments, in whichever order and company.

        With one request at a time nothing is begun: scores would wait behind every completion.
        """
        if self.limits.concurrency > 1:
            self._pool.prefetch(self._completion_requests(prompts, settings), _COMPLETIONS)

    def drop_scores(self) -> None:
        """Stop scores that were begun and not taken."""
        self._pool.cancel(_SCORES)

    def drop_completions(self) -> None:
        """Stop completions that were begun and not taken."""
        self._pool.cancel(_COMPLETIONS)

    def close(self) -> None:
        """Close idle connections; a later request opens new ones."""
        self._pool.close()

    @property
    def _pool(self) -> RequestPool:
        # A fork has its parent's memory and none of its threads: it begins anew, with connections of its own.
        return self._pool_of(os.getpid())

    # --- requests ------------------------------------------------------------------------------------------------
    def _ask(self, requests: Sequence[Request], queue: str) -> list[Any]:
        try:
            return self._pool.ask_all(requests, queue)
        except BaseException:
            # The run ends here, and so does what nobody will take.
            self.drop_scores()
            self.drop_completions()
            raise

    def _score_requests(
        self, sequences: Sequence[Sequence[int]], firsts: Sequence[int], top: int, vocab_size: int
    ) -> list[Request]:
        return [
            self._scoring(ids, top)._replace(read=_ReadScores(self._names, tuple(ids), first, top, vocab_size))
            for ids, first in zip(sequences, firsts, strict=True)
        ]

    def _scoring(self, ids: Sequence[int], top: int) -> Request:
        fixed = {"max_tokens": 1, "temperature": 1.0}
        return self._request(ids, read_json, _largest(len(ids), 1 + top), fixed | {"prompt_logprobs": top})

    def _completion_requests(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[Mapping[str, Any]]
    ) -> list[Request]:
        return [
            self._request(
                ids,
                _ReadCompletion(self._names, tuple(ids), own["max_tokens"]),
                _largest(len(ids) + own["max_tokens"], 1),
                {"n": 1, **own},
            )
            for ids, own in zip(prompts, settings, strict=True)
        ]

    def _request(
        self, prompt: Sequence[int], read: Callable[[bytes, str], Any], largest: int, settings: Mapping[str, Any]
    ) -> Request:
        body = _encoded(model=self.model, return_token_ids=True, prompt=list(prompt), **settings)
        return Request("POST", "/v1/completions", read, largest, body)


@dataclass(frozen=True)
class _ReadScores:
    """Reads the scores of a sequence; the names that the model may have, then as in `CompletionsClient.score`."""

    names: frozenset[str]
    ids: tuple[int, ...]
    first: int
    top: int
    vocab_size: int

    def __call__(self, body: bytes, where: str) -> SequenceScores:
        answer = CompletionAnswer(body, where, self.names, self.ids)
        return answer.scores(self.first, self.top, self.vocab_size)


@dataclass(frozen=True)
class _ReadCompletion:
    """Reads a completion of at most `longest` tokens."""

    names: frozenset[str]
    prompt: tuple[int, ...]
    longest: int

    def __call__(self, body: bytes, where: str) -> list[int]:
        return CompletionAnswer(body, where, self.names, self.prompt).completion(self.longest)


def _read_tokens(body: bytes, where: str) -> list[int] | None:
    tokens = read_json(body, where).get("tokens")
    if tokens is None:
        return None
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise wrong_answer(where, "token ids that are no numbers at /tokenize", "Point it at vLLM itself.")
    return tokens


def _largest(tokens: int, entries: int) -> int:
    """Bytes of the largest answer about so many tokens, with so many numbers for each."""
    return _ONCE_BYTES + _ENTRY_BYTES * tokens * entries


def _encoded(**value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
