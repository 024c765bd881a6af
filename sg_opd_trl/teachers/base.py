"""What a teacher is: it scores completions and writes rollouts.

All scores are log-probs in nats at the temperature of the run, of tokens of the student's vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ..models.batch import TokenBatch
from ..models.head import OutputHead


@dataclass(frozen=True)
class Sampling:
    """How a teacher writes a rollout.

    Attributes:
        max_new_tokens: longest completion, in tokens.
        eos_token_ids: ids that end a completion; the first of them is part of it.
        pad_token_id: id that fills shorter rows.
        temperature: of the logits.
        top_p: nucleus, 1 = off.
        top_k: number of candidates, 0 = off.
        min_p: smallest probability relative to the largest, None = off.
        repetition_penalty: 1 = off.
        generation_kwargs: further fields of `transformers.GenerationConfig`; they win over the ones above.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)


class SupportScores(NamedTuple):
    """Scores of the completions' own tokens and of further tokens at each position; 0 where nothing was scored.

    Attributes:
        logps: `(B, T)` float32, of the completions' own tokens.
        support_ids: `(B, T, K)` int64, tokens of the support, the likeliest first where the scorer chose them.
        support_logps: `(B, T, K)` float32, their log-probs under the whole vocabulary.
    """

    logps: Tensor
    support_ids: Tensor
    support_logps: Tensor


class HiddenScores(NamedTuple):
    """Scores of the completions' own tokens, and what the whole distribution can be computed from.

    Attributes:
        logps: `(B, T)` float32, of the completions' own tokens; 0 where nothing was scored.
        hidden_states: `(B, T, H)` in the model's dtype, what the head projects; 0 where nothing was scored. H is the
            widest of several models'; narrower ones are filled up with zeros.
        heads: `(B,)` int64, which of `Teacher.output_heads()` a row belongs to.
    """

    logps: Tensor
    hidden_states: Tensor
    heads: Tensor


class Teacher(Protocol):
    """What the trainer asks of a teacher.

    Attributes:
        identity: JSON-ready facts that tell this teacher from another.
        vocab_size: rows of its embedding; it cannot score ids from there on.
    """

    identity: dict
    vocab_size: int

    @property
    def distillation_modes(self) -> frozenset[str]:
        """The values of `distillation_mode` that it can serve.

        `sampled_token` takes `score`, `topk_logits` and `asymmetric` take `score_support`, `full_logits` takes
        `score_hidden` and `output_heads`.
        """

    @property
    def tokens_scored(self) -> int:
        """Completion tokens scored so far by this process, dummies left out."""

    @property
    def tokens_generated(self) -> int:
        """Tokens generated so far by this process, dummies left out."""

    def score(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Tensor:
        """Log-probs of the completions' own tokens.

        Args:
            batch: token ids, `(B, P)` prompts and `(B, T)` completions.
            rows: `(B,)` bool, rows that are scored.
            max_tokens: budget of one forward, padding included.

        Returns:
            `(B, T)` float32, 0 where nothing was scored.

        Raises:
            TeacherError: an id the teacher lacks.
            NonFiniteError: a score that is NaN, infinite or positive.
        """

    def score_support(
        self, batch: TokenBatch, rows: Tensor, max_tokens: int, size: int, vocab_size: int
    ) -> SupportScores:
        """Log-probs of the completions' own tokens and of the likeliest tokens at their positions.

        Args:
            batch: token ids, `(B, P)` prompts and `(B, T)` completions.
            rows: `(B,)` bool, rows that are scored.
            max_tokens: budget of one forward, padding included.
            size: K, number of tokens at each position.
            vocab_size: ids from here on are not chosen (another model lacks them).

        Returns:
            The K likeliest tokens of each position, see `SupportScores`.

        Raises:
            TeacherError: an id the teacher lacks.
            NonFiniteError: a score that is NaN, infinite or positive.
        """

    def score_hidden(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> HiddenScores:
        """Log-probs of the completions' own tokens and the hidden states that predict them.

        Args:
            batch: token ids, `(B, P)` prompts and `(B, T)` completions.
            rows: `(B,)` bool, rows that are scored.
            max_tokens: budget of one forward, padding included.

        Returns:
            Hidden states for `output_heads`, see `HiddenScores`.

        Raises:
            TeacherError: an id the teacher lacks.
            NonFiniteError: a log-prob that is NaN, infinite or positive.
        """

    def output_heads(self) -> list[OutputHead]:
        """The heads that turn the hidden states of `score_hidden` into logits; each has a number, its place here."""

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int, max_tokens: int) -> list[list[int]]:
        """One completion per prompt; the caller's random state is left alone.

        Args:
            prompts: token ids of each prompt.
            sampling: how to sample.
            seed: of the draws.
            max_tokens: budget of one batch, longest completions included.

        Returns:
            Token ids of each completion, up to and including its first end token.
        """

    def stop_generating(self) -> None:
        """Called once no rollout will be asked for any more; frees what only generation needs."""


@runtime_checkable
class PrefetchingTeacher(Protocol):
    """A teacher that can work ahead while the student works: a server, say.

    Prefetching changes when work is done, never its result. A prefetched result is used by a call with exactly the
    arguments that it was begun for; any other call does its own work. Tokens are counted, and errors raised, by the
    call that needs the result.
    """

    def prefetch_rollouts(self, prompts: list[list[int]], sampling: Sampling, seed: int, max_tokens: int) -> None:
        """Begin what `Teacher.generate` will return for these arguments, in place of rollouts begun before."""

    def prefetch_scores(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        size: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        """Begin the scores of some completions, besides those begun before.

        Args:
            prompt_ids: token ids of each row's prompt, without padding.
            completion_ids: of each row's completion.
            size: K of `Teacher.score_support`; 0 begins what `Teacher.score` needs.
            vocab_size: ids from here on are not chosen; None with a size of 0.
        """

    def drop_prefetched_scores(self) -> None:
        """Stop the scores that were begun and that no call has needed yet."""

    def drop_prefetched(self) -> None:
        """Stop everything that was begun and that no call has needed yet."""
