"""The replicas of one model behind vLLM's completions API."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import TeacherError
from .answers import CompletionAnswer, SequenceScores, ServedModel, read_json, read_models, shown_names
from .http import Ahead, Connections, Question, RefusedRequest, Replica, Request, RequestLimits, ask, ask_all
from .urls import check_headers, read_address

COMPLETIONS = "/v1/completions"
_ANY_ID = 2**63


@dataclass(frozen=True)
class _ScoresReader:
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
class _CompletionReader:
    """Reads a completion of at most `longest` tokens."""

    names: frozenset[str]
    prompt: tuple[int, ...]
    longest: int

    def __call__(self, body: bytes, where: str) -> list[int]:
        return CompletionAnswer(body, where, self.names, self.prompt).completion(self.longest)


class CompletionsClient:
    """The replicas of one model behind vLLM's completions API.

    Answers are put in their places by the request that they belong to: the order in which they come means nothing.

    Args:
        urls: of the replicas.
        limits: of each request.
        headers: of each request, for authorization.

    Attributes:
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
        connections = [Connections(read_address(url), headers or {}) for url in urls]
        self.replicas = [Replica(one, self.limits.concurrency) for one in connections]
        self.model = ""
        self.root: str | None = None
        self.max_length: int | None = None
        self._names: frozenset[str] = frozenset()
        everywhere = self.limits.concurrency * len(self.replicas)
        self._scores_ahead = Ahead(self.replicas, self.limits, everywhere)
        # Half of one server's places at most, so that scores, which a step waits for, always find a free one.
        self._completions_ahead = Ahead(self.replicas, self.limits, self.limits.concurrency // 2)

    # --- before the run ------------------------------------------------------------------------------------------
    def connect(self, expected: str | None) -> None:
        """Find the model on every replica.

        Args:
            expected: its name, or the path or Hub id that it was loaded from; None for the only one served.

        Raises:
            TeacherError: a replica that does not answer, or does not have it.
        """
        found = [_chosen(models, expected, where) for models, where in self._of_each(Request("GET", "/v1/models"))]
        self.model, self.root, _ = found[0][0]
        for replica, (model, _) in zip(self.replicas, found, strict=True):
            if model.name != self.model:
                raise _another_model([model], self.model, replica.address)
        self._names = frozenset().union(*(names for _, names in found))
        lengths = [model.max_length for model, _ in found if model.max_length is not None]
        self.max_length = min(lengths, default=None)

    def _of_each(self, request: Request) -> list[tuple[list[ServedModel], str]]:
        def read(body: bytes, where: str) -> tuple[list[ServedModel], str]:
            return read_models(body, where), where

        return [ask([replica], 0, request, read, self.limits) for replica in self.replicas]

    def tokenize(self, text: str) -> list[list[int] | None]:
        """Token ids of a text by each replica, None where it does not tell."""
        request = Request("POST", "/tokenize", _encoded(model=self.model, prompt=text, add_special_tokens=False))

        def read(body: bytes, where: str) -> list[int] | None:
            tokens = read_json(body, where).get("tokens")
            return tokens if isinstance(tokens, list) else None

        def answer(replica: Replica) -> list[int] | None:
            try:
                return ask([replica], 0, request, read, self.limits)
            except RefusedRequest:
                # A proxy that lets completions through and nothing else.
                return None

        return [answer(replica) for replica in self.replicas]

    def probe(self, ids: Sequence[int], top: int) -> list[SequenceScores]:
        """Scores of one sequence by each replica, which must send the ids of what it generates too."""

        def read(body: bytes, where: str) -> SequenceScores:
            answer = CompletionAnswer(body, where, self._names, ids)
            answer.completion(1)
            return answer.scores(1, top, _ANY_ID)

        return [ask([replica], 0, self._scoring(ids, top), read, self.limits) for replica in self.replicas]

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
            NonFiniteError: a number that is no log-prob.
        """
        return self._answers(self._about_scores(sequences, firsts, top, vocab_size), self._scores_ahead)

    def generate(self, prompts: Sequence[Sequence[int]], settings: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """One completion per prompt, as token ids.

        Args:
            prompts: token ids.
            settings: of each request, `max_tokens` and `seed` among them.

        Raises:
            TeacherError: as in `score`.
        """
        return self._answers(self._about_completions(prompts, settings), self._completions_ahead)

    # --- ahead of time -------------------------------------------------------------------------------------------
    def prefetch_scores(
        self, sequences: Sequence[Sequence[int]], firsts: Sequence[int], top: int = 0, vocab_size: int = _ANY_ID
    ) -> None:
        """Begin what `score` will be asked for with the same arguments, in whichever order and company."""
        self._scores_ahead.ask(self._about_scores(sequences, firsts, top, vocab_size))

    def prefetch_completions(self, prompts: Sequence[Sequence[int]], settings: Sequence[Mapping[str, Any]]) -> None:
        """Begin what `generate` will be asked for with the same arguments, in whichever order and company.

        With one place at a server nothing is begun: scores would wait behind every completion.
        """
        if self.limits.concurrency > 1:
            self._completions_ahead.ask(self._about_completions(prompts, settings))

    def drop_scores(self) -> None:
        """Stop scores that were begun and not taken."""
        self._scores_ahead.drop()

    def drop_completions(self) -> None:
        """Stop completions that were begun and not taken."""
        self._completions_ahead.drop()

    def close(self) -> None:
        """Close idle connections; a later request opens new ones."""
        for replica in self.replicas:
            replica.connections.close()

    def _answers(self, questions: Sequence[Question], ahead: Ahead) -> list[Any]:
        try:
            return ask_all(self.replicas, questions, self.limits, ahead)
        except BaseException:
            # The run ends here, and so does what nobody will take.
            self.drop_scores()
            self.drop_completions()
            raise

    def _about_scores(
        self, sequences: Sequence[Sequence[int]], firsts: Sequence[int], top: int, vocab_size: int
    ) -> list[Question]:
        return [
            Question(self._scoring(ids, top), _ScoresReader(self._names, tuple(ids), first, top, vocab_size))
            for ids, first in zip(sequences, firsts, strict=True)
        ]

    def _about_completions(
        self, prompts: Sequence[Sequence[int]], settings: Sequence[Mapping[str, Any]]
    ) -> list[Question]:
        fixed = {"model": self.model, "n": 1, "return_token_ids": True}
        return [
            Question(
                Request("POST", COMPLETIONS, _encoded(**fixed, prompt=list(ids), **own)),
                _CompletionReader(self._names, tuple(ids), own["max_tokens"]),
            )
            for ids, own in zip(prompts, settings, strict=True)
        ]

    def _scoring(self, ids: Sequence[int], top: int) -> Request:
        fixed = {"model": self.model, "max_tokens": 1, "temperature": 1.0, "return_token_ids": True}
        return Request("POST", COMPLETIONS, _encoded(**fixed, prompt=list(ids), prompt_logprobs=top))


def _chosen(models: Sequence[ServedModel], expected: str | None, where: str) -> tuple[ServedModel, set[str]]:
    """The model that is meant, and all names that one server has for it; it answers with the first of them."""
    named = [model for model in models if expected is None or model.name == expected]
    named = named or [model for model in models if model.root == expected]
    sources = {model.root or model.name for model in named}
    if len(sources) != 1:
        raise _another_model(models, expected, where)
    return named[0], {model.name for model in models if (model.root or model.name) in sources}


def _another_model(models: Sequence[ServedModel], expected: str | None, where: str) -> TeacherError:
    wanted = "one model" if expected is None else repr(expected)
    return TeacherError(
        f"The teacher server must serve {wanted}, got {shown_names(models)} at {where}. Another model would teach "
        "something else. Set `teacher_model_name_or_path` to the name of the one that is meant, or correct "
        "`teacher_model_server_url`."
    )


def _encoded(**value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
