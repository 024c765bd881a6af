"""Attention of packed rows where no variable-length kernel is at hand: transformers' own SDPA, rows of like length in
one call, so that the rest of the model runs without padding."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

IMPLEMENTATION = "sg_opd_rows"
# Not every architecture hands the bounds that its forward is given through to its attention (Nemotron does not).
_bounds: ContextVar[tuple[int, ...]] = ContextVar("bounds of packed rows")
# Rows share a call down to this share of its longest row: fewer calls for little padding, in attention alone.
_LIKE_LENGTH = 0.8


class _Plan(NamedTuple):
    """How packed tokens go into padded calls and back; None where the order stays as it is.

    `calls` are `(rows, longest row)`; `into` is the packed position of every padded one, `back` the padded position of
    every packed one.
    """

    calls: tuple[tuple[int, int], ...]
    into: Tensor | None
    back: Tensor | None


@lru_cache(maxsize=8)
def _plan(bounds: tuple[int, ...]) -> _Plan:
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    calls: list[list[int]] = []
    for row in order:
        if not calls or lengths[row] < _LIKE_LENGTH * lengths[calls[-1][0]]:
            calls.append([])
        calls[-1].append(row)
    into, back, padded = [], torch.empty(bounds[-1], dtype=torch.long), 0
    for rows in calls:
        width = lengths[rows[0]]
        for row in rows:
            # Padding repeats the row's last token: it stands behind all others, where causal attention ignores it.
            into.append(torch.arange(width).clamp(max=lengths[row] - 1) + bounds[row])
            back[bounds[row] : bounds[row + 1]] = torch.arange(lengths[row]) + padded
            padded += width
    sizes = tuple((len(rows), lengths[rows[0]]) for rows in calls)
    if padded == bounds[-1] and order == sorted(order):
        return _Plan(sizes, None, None)
    return _Plan(sizes, torch.cat(into), back)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: `(1, heads, N, size)` each -> `(1, N, heads, size)`."""
    plan = _plan(_bounds.get())
    padded = [_take(states[0].transpose(0, 1), plan.into) for states in (query, key, value)]
    results, start = [], 0
    for rows, width in plan.calls:
        call = slice(start, start + rows * width)
        queries, keys, values = (states[call].unflatten(0, (rows, width)).transpose(1, 2) for states in padded)
        band = _band(width, sliding_window, query.device)
        options["is_causal"] = band is None
        results.append(sdpa_attention_forward(module, queries, keys, values, band, **options)[0].flatten(0, 1))
        start += rows * width
    return _take(torch.cat(results), plan.back).unsqueeze(0), None


def _take(states: Tensor, positions: Tensor | None) -> Tensor:
    return states if positions is None else states.index_select(0, positions.to(states.device))


def _band(width: int, window: int | None, device: torch.device) -> Tensor | None:
    """Mask of a sliding window that is shorter than the rows, else None."""
    if window is None or width <= window:
        return None
    back = torch.arange(width, device=device).unsqueeze(1) - torch.arange(width, device=device)
    return ((back >= 0) & (back < window)).expand(1, 1, width, width)


@contextmanager
def rows_apart(model: PreTrainedModel, bounds: Tensor) -> Iterator[None]:
    """Have an SDPA model attend inside packed rows only; the model is as before afterwards.

    Not for gradient checkpointing, whose second forward runs after the block.

    Args:
        model: whose attention goes through transformers' `AttentionInterface`.
        bounds: `(rows + 1,)`, where the rows begin and the last one ends.
    """
    config = model.config
    before, token = config._attn_implementation, _bounds.set(tuple(bounds.tolist()))
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before
        _bounds.reset(token)


# Without a mask function of that name transformers builds no mask, and hands the rows' bounds through.
AttentionInterface.register(IMPLEMENTATION, _attend)
