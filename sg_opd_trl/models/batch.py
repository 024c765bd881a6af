"""Token batches: trim them, sort them, and score them in groups under a token budget.

A model is never run on columns that are padding for a whole batch, nor on rows whose scores nobody uses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor
from torch.nn import functional

from .prefixes import plan_by_prompt, rows_by_prompt


@dataclass(frozen=True)
class TokenBatch:
    """Prompts, padded on the left, and completions, padded on the right.

    Attributes:
        prompt_ids: `(B, P)` token ids.
        prompt_mask: `(B, P)`, 1 = token, 0 = padding.
        completion_ids: `(B, T)` token ids.
        completion_mask: `(B, T)`, 1 = the model sees the token, 0 = padding.
        multiple: widths are trimmed to multiples of it.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    multiple: int = 1

    @classmethod
    def from_lists(
        cls,
        prompts: list[list[int]],
        completions: list[list[int]],
        pad_token_id: int,
        device: torch.device,
        multiple: int = 1,
    ) -> "TokenBatch":
        """Pad lists of token ids; every width is at least 1."""
        prompt_ids, prompt_mask = pad_rows(prompts, pad_token_id, left=True, multiple=multiple)
        completion_ids, completion_mask = pad_rows(completions, pad_token_id, left=False, multiple=multiple)
        return cls(
            prompt_ids=prompt_ids.to(device),
            prompt_mask=prompt_mask.to(device),
            completion_ids=completion_ids.to(device),
            completion_mask=completion_mask.to(device),
            multiple=multiple,
        )

    def __len__(self) -> int:
        return self.prompt_ids.size(0)

    def select(self, rows: Tensor) -> "TokenBatch":
        """The given rows, trimmed to their own longest prompt and completion."""
        prompt_mask, completion_mask = self.prompt_mask[rows], self.completion_mask[rows]
        prompt_width, width = longest(prompt_mask, self.multiple), longest(completion_mask, self.multiple)
        return TokenBatch(
            prompt_ids=self.prompt_ids[rows][:, -prompt_width:],
            prompt_mask=prompt_mask[:, -prompt_width:],
            completion_ids=self.completion_ids[rows][:, :width],
            completion_mask=completion_mask[:, :width],
            multiple=self.multiple,
        )

    def joined(self) -> tuple[Tensor, Tensor]:
        """Input ids and attention mask of prompt and completion, `(B, P + T)` each."""
        input_ids = torch.cat([self.prompt_ids, self.completion_ids], dim=1)
        return input_ids, torch.cat([self.prompt_mask, self.completion_mask], dim=1)

    def lengths(self) -> Tensor:
        """Tokens of each row, `(B,)`."""
        return self.prompt_mask.sum(1) + self.completion_mask.sum(1)

    def prompts(self) -> list[list[int]]:
        """Token ids of each row's prompt."""
        return _without_padding(self.prompt_ids, self.prompt_mask)


def _without_padding(ids: Tensor, mask: Tensor) -> list[list[int]]:
    rows = zip(ids.tolist(), (mask != 0).tolist(), strict=True)
    return [list(compress(row, present)) for row, present in rows]


def pad_rows(rows: list[list[int]], padding: int, *, left: bool, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Pad lists of token ids to one width of at least 1, a multiple of `multiple`.

    Returns:
        Token ids and mask (1 = token), `(B, width)` int64 each.
    """
    width = round_up(max([1, *map(len, rows)]), multiple)
    ids = torch.full((len(rows), width), padding, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, columns] = torch.tensor(row, dtype=torch.long)
        mask[i, columns] = 1
    return ids, mask


def round_up(width: int, multiple: int) -> int:
    """The smallest multiple that is not below the width."""
    return -(-width // multiple) * multiple


def longest(mask: Tensor, multiple: int = 1) -> int:
    """Tokens of the longest row of a `(B, W)` mask, rounded up; at least 1, so that no width is ever 0."""
    return round_up(max(1, int(mask.sum(1).max())) if mask.numel() else 1, multiple)


# --- scoring in groups -----------------------------------------------------------------------------------------------
ScoreFunction = Callable[[Tensor, Tensor, int], Tensor]
"""`(input_ids, attention_mask, completion_length) -> log-probs` of the last `completion_length` tokens."""
PartScore = Callable[[TokenBatch, Tensor], tuple[Tensor, ...]]
"""`(batch, numbers of its rows (n,)) -> scores (n, T, ...)` of its completions."""
Kind = tuple[Sequence[int], torch.dtype]
"""Sizes of a token's scores, `()` for a number, and their dtype."""


def score_rows(
    score: ScoreFunction,
    batch: TokenBatch,
    rows: Tensor,
    max_tokens: int,
    agree_on_calls: Callable[[int], int] = lambda calls: calls,
    *,
    by_prompt: bool = False,
) -> Tensor:
    """Log-probs of the completions of some rows.

    Args:
        score: the model's forward on one trimmed batch.
        batch: all rows.
        rows: `(B,)` bool, the rows whose scores are used.
        max_tokens: budget of one forward, padding included.
        agree_on_calls: number of forwards over all ranks, see `score_parts`.
        by_prompt: see there.

    Returns:
        `(B, T)` float32; 0 in rows and at positions that were not scored.
    """

    def score_part(part: TokenBatch, numbers: Tensor) -> tuple[Tensor, ...]:
        return (score(*part.joined(), part.completion_ids.size(1)),)

    kinds: list[Kind] = [((), torch.float32)]
    return score_parts(score_part, kinds, batch, rows, max_tokens, agree_on_calls, by_prompt=by_prompt)[0]


def score_parts(
    score: PartScore,
    kinds: Sequence[Kind],
    batch: TokenBatch,
    rows: Tensor,
    max_tokens: int,
    agree_on_calls: Callable[[int], int] = lambda calls: calls,
    *,
    by_prompt: bool = False,
) -> list[Tensor]:
    """Scores of any kind of the completions of some rows, from as few forwards as the budget allows.

    Args:
        score: scores of one trimmed batch.
        kinds: of each tensor that `score` returns: they are known before any forward, and without one.
        batch: all rows.
        rows: `(B,)` bool, the rows whose scores are used.
        max_tokens: budget of one forward, padding included.
        agree_on_calls: number of forwards over all ranks, for a model whose shards must run the same number of times.
            The missing calls are run on one token, and their result is dropped.
        by_prompt: whether rows of one prompt should be in one forward, which then computes the prompt once.

    Returns:
        `(B, T, ...)` of each kind; 0 in rows and at positions that were not scored.
    """
    shape, device = batch.completion_ids.shape, batch.completion_ids.device
    results = [torch.zeros(*shape, *sizes, dtype=dtype, device=device) for sizes, dtype in kinds]
    indices = rows.nonzero().flatten()
    lengths = batch.lengths()[indices].tolist()
    shared = None
    if by_prompt:
        prompts = batch.prompts()
        shared = plan_by_prompt([prompts[row] for row in indices.tolist()], lengths, max_tokens)
    groups = list(plan_batches(lengths, max_tokens) if shared is None else shared)
    # Before the first forward: ranks that are still asked would answer the others' forwards with another collective.
    calls = agree_on_calls(len(groups))
    for group in groups:
        numbers = indices[group]
        part = batch.select(numbers)
        counted = part.completion_mask != 0
        for result, scores in zip(results, score(part, numbers), strict=True):
            kept = counted.view(*counted.shape, *[1] * (scores.dim() - 2))
            result[numbers, : counted.size(1)] = scores.to(result.dtype).masked_fill(~kept, 0)
    for _ in range(calls - len(groups)):
        score(_one_token(batch), indices.new_zeros(1))
    return results


def plan_batches(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Group row indices by length so that rows times longest row stays within `max_tokens`.

    Longest rows come first: running out of memory shows at once. A row longer than the budget is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _one_token(batch: TokenBatch) -> TokenBatch:
    """A prompt of one token and a completion of one: the cheapest forward there is."""
    prompt_ids, completion_ids = batch.prompt_ids[:1, -1:], batch.completion_ids[:1, :1]
    one = torch.ones_like(prompt_ids)
    return TokenBatch(prompt_ids, one, completion_ids, one)


# --- TRL's generation batches and micro-batches ----------------------------------------------------------------------
def token_batch(rollouts: dict, multiple: int) -> TokenBatch:
    """The token ids and masks of TRL's rollouts."""
    return TokenBatch(
        prompt_ids=rollouts["prompt_ids"],
        prompt_mask=rollouts["prompt_mask"],
        completion_ids=rollouts["completion_ids"],
        completion_mask=rollouts["completion_mask"],
        multiple=multiple,
    )


def loss_mask(inputs: dict) -> Tensor:
    """Tokens that count, `(B, T)`: the completion's, but for those that `tool_mask` takes out.

    TRL's own takes out what tools wrote. Ours is merged into it: special tokens of `special_token_mask`, and ids that
    some model lacks.
    """
    if "tool_mask" in inputs:
        return inputs["completion_mask"] * inputs["tool_mask"]
    return inputs["completion_mask"]


def sort_windows(slices: list[dict], window: int, *, by_prompt: bool = False) -> list[dict]:
    """Order rows by length inside each optimizer step, so that rows of a micro-batch have like lengths.

    Rows never leave their optimizer step, and micro-batches keep their number of rows, so that weights stay the same.

    Args:
        slices: micro-batches of one generation batch: tensors and lists with one entry per row, or 0-dim tensors.
        window: micro-batches of one optimizer step.
        by_prompt: whether a forward that has several rows of one prompt computes the prompt once: these are kept
            together then, unless that saves next to nothing.
    """
    windows = (slices[start : start + window] for start in range(0, len(slices), window))
    return [part for window in windows for part in _sorted(window, by_prompt=by_prompt)]


def _sorted(slices: list[dict], *, by_prompt: bool) -> list[dict]:
    rows = len(slices[0]["prompt_mask"])
    lengths = torch.cat([part["prompt_mask"].sum(1) + part["completion_mask"].sum(1) for part in slices])
    order = lengths.argsort(descending=True, stable=True)
    if by_prompt:
        prompts = [prompt for part in slices for prompt in _without_padding(part["prompt_ids"], part["prompt_mask"])]
        groups = rows_by_prompt(prompts, lengths.tolist())
        if groups is not None:
            order = torch.tensor([row for group in groups for row in group], device=lengths.device)

    def entry(name: str) -> list:
        values = [part[name] for part in slices]
        if isinstance(values[0], Tensor) and values[0].dim() > 0:
            return list(torch.cat(values)[order].split(rows))
        if isinstance(values[0], list):
            flat = [item for value in values for item in value]
            return [[flat[i] for i in chosen] for chosen in order.split(rows)]
        return values

    columns = {name: entry(name) for name in slices[0]}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(slices))]


_PROMPT_ENTRIES = ("prompt_ids", "prompt_mask")


def trim_micro_batch(inputs: dict, multiple: int = 1) -> dict:
    """Trim every per-token entry of a micro-batch to its own longest prompt and completion.

    TRL pads all rows to the longest row of the whole generation batch, so that a micro-batch of short rows would pay
    for a long one it does not hold.

    Args:
        inputs: TRL's micro-batch: `prompt_*` entries are `(B, P)`, other per-token entries `(B, T)`; entries of any
            other shape pass unchanged.
        multiple: widths stay multiples of it.
    """
    full_width = inputs["completion_ids"].size(1)
    prompt_width = longest(inputs["prompt_mask"], multiple)
    width = longest(inputs["completion_mask"], multiple)

    def trimmed(name: str, value: object) -> object:
        if name in _PROMPT_ENTRIES:
            return inputs[name][:, -prompt_width:]
        if isinstance(value, Tensor) and value.dim() >= 2 and value.size(1) == full_width:
            return value[:, :width]
        return value

    return {name: trimmed(name, value) for name, value in inputs.items()}


def joined_rows(batch: TokenBatch, below: TokenBatch | None = None) -> tuple[Tensor, Tensor, int]:
    """Both batches as the rows of one forward, the last prompt token of all rows in the same column.

    Args:
        batch: the first rows.
        below: the rows under them, or None.

    Returns:
        Input ids and attention mask, `(rows, P + T)`, and T, the width of the wider completions.
    """
    input_ids, mask = batch.joined()
    width = batch.completion_ids.size(1)
    if below is None:
        return input_ids, mask, width
    below_ids, below_mask = below.joined()
    prompt_widths = batch.prompt_ids.size(1), below.prompt_ids.size(1)
    widths = width, below.completion_ids.size(1)

    def aligned(upper: Tensor, lower: Tensor) -> Tensor:
        parts = zip((upper, lower), prompt_widths, widths, strict=True)
        return torch.cat([functional.pad(part, (max(prompt_widths) - p, max(widths) - t)) for part, p, t in parts])

    return aligned(input_ids, below_ids), aligned(mask, below_mask), max(widths)
