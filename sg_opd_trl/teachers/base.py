"""The two verbs of every teacher."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..scoring import TokenBatch


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


class Teacher(Protocol):
    """What the trainer asks of a teacher.

    Attributes:
        identity: JSON-ready facts that tell this teacher from another.
        vocab_size: rows of its embedding; it cannot score ids from there on.
    """

    identity: dict
    vocab_size: int

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

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int, max_tokens: int) -> list[list[int]]:
        """One completion per prompt, as token ids; the caller's random state is left alone."""

    def stop_generating(self) -> None:
        """Called once no rollout will be asked for any more; frees what only generation needs."""
