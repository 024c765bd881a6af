"""Ids that the tokenizer, the student, the teachers and the reference all have, and what becomes of others.

Models of one family pad their embeddings to different sizes. A padded row is a token like any other to the sampler,
but nothing was ever trained on it and another model may not have it: it is not sampled, and where a sampler cannot be
told so it is left out of the loss and counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..scoring import TokenBatch


class SharedVocabulary:
    """What a run may sample and score.

    Args:
        tokenizer: the student's.
        vocab_sizes: of the student, the teacher and a reference of its own.

    Attributes:
        unusable: ids that some model has and the tokenizer or another model has not, in order.
    """

    def __init__(self, tokenizer: Any, vocab_sizes: Sequence[int]) -> None:
        smallest = min(vocab_sizes)
        usable = {token for token in tokenizer.get_vocab().values() if token < smallest}
        self.unusable = [token for token in range(max(vocab_sizes)) if token not in usable]

    def without_unusable(self, settings: Mapping[str, Any] | None) -> dict[str, Any]:
        """Fields of a `GenerationConfig` that keep unusable ids, and those suppressed anyway, from being sampled."""
        settings = dict(settings or {})
        if self.unusable:
            settings["suppress_tokens"] = sorted({*(settings.get("suppress_tokens") or ()), *self.unusable})
        return settings

    def leave_out(self, rollouts: dict, gather: Callable[[Tensor], Tensor]) -> tuple[dict, int]:
        """Take unusable ids, and all that a rollout holds after one, out of a generation batch's loss.

        Whatever follows such an id could only be scored in a context that another model does not know.

        Args:
            rollouts: TRL's, `(B, T)` entries.
            gather: over ranks, which all call this.

        Returns:
            The rollouts with `tool_mask` and `num_items_in_batch` as they are without these tokens, and how many were
            left out over all ranks.
        """
        counted = rollouts["completion_mask"]
        if "tool_mask" in rollouts:
            counted = counted * rollouts["tool_mask"]
        usable = self._usable_part(rollouts["completion_ids"], rollouts["completion_mask"])
        totals = gather(torch.stack([counted.sum(), (counted * usable).sum()]).unsqueeze(0)).sum(dim=0)
        before, after = totals.tolist()
        if before == after:
            return rollouts, 0
        return rollouts | {"tool_mask": counted * usable, "num_items_in_batch": totals[1]}, before - after

    def cut(self, batch: TokenBatch, pad_token_id: int) -> TokenBatch:
        """The part of each completion that every model can score."""
        if not self.unusable:
            return batch
        usable = self._usable_part(batch.completion_ids, batch.completion_mask)
        return replace(
            batch,
            completion_ids=batch.completion_ids.masked_fill(usable == 0, pad_token_id),
            completion_mask=batch.completion_mask * usable,
        )

    def usable(self, completion_ids: list[int]) -> list[int]:
        """The part of one completion that every model can score."""
        lacking = set(self.unusable)
        end = next((place for place, token in enumerate(completion_ids) if token in lacking), len(completion_ids))
        return completion_ids[:end]

    def _usable_part(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`(B, T)`, 1 up to a row's first unusable token."""
        unusable = torch.isin(ids, torch.tensor(self.unusable, dtype=ids.dtype, device=ids.device)) & (mask != 0)
        return (unusable.cumsum(dim=1) == 0).to(mask.dtype)
