"""The output head of a causal LM outside of its forward: logits of chosen tokens, or of all of them tile by tile.

Logits of all positions and all tokens never exist at once. Gradients of the head are summed in float32, whatever the
dtype of its weights: many small terms would be lost in a bfloat16 sum.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: Numbers in the largest tensor of one tile.
TILE_ELEMENTS = 2**25

LossOfLogits = Callable[[Tensor, slice], Tensor]
"""`(logits (n, V) float32 with gradient, the positions they belong to) -> losses (n,)`."""


def _as_it_is(*parameters: Tensor | None) -> AbstractContextManager:
    return nullcontext()


@dataclass(frozen=True)
class OutputHead:
    """What turns hidden states into logits.

    Attributes:
        weight: `(V, H)`.
        bias: `(V,)` or None.
        temperature: the logits are divided by it.
        scale: the logits are multiplied by it before anything else.
        softcap: bound of the logits, None = off.
        full_precision: whether the projection runs in float32, whatever the model's dtype is.
        dtype: of the projection; None: that of autocast or of the hidden states.
        gathered: context in which a weight that is sharded otherwise is whole.
    """

    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    full_precision: bool = False
    dtype: torch.dtype | None = None
    gathered: Callable[..., AbstractContextManager] = _as_it_is

    def resolved(self, hidden_states: Tensor) -> "OutputHead":
        """The head with the dtype that its projection has here and now; autograd runs outside of autocast."""
        if self.dtype is not None:
            return self
        kind = hidden_states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype
        return replace(self, dtype=torch.float32 if self.full_precision else dtype)

    def cast(self) -> "OutputHead":
        """The resolved and gathered head with weights of its dtype, for many tiles: autocast would cast in each."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return replace(self, weight=self.weight.to(self.dtype), bias=bias, gathered=_as_it_is)

    def logits(self, projected: Tensor) -> Tensor:
        """Float32 logits as they enter the softmax, from what the projection gave."""
        logits = projected.float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature


# --- chosen tokens ---------------------------------------------------------------------------------------------------
def support_logits(hidden_states: Tensor, head: OutputHead, ids: Tensor) -> Tensor:
    """Logits of chosen tokens at each position, without those of all others.

        z_v = softcap(scale * (h . W[v] + b[v])) / temperature

    Args:
        hidden_states: `(N, H)`, with gradient.
        head: of the same model, with gradient.
        ids: `(N, S)` int64 token ids.

    Returns:
        `(N, S)` float32 with gradient to hidden states and head; no tensor of `N * S * H` numbers is built.
    """
    head = head.resolved(hidden_states)
    return head.logits(_ChosenProducts.apply(hidden_states, head.weight, head.bias, ids, head))


def support_log_probs(hidden_states: Tensor, head: OutputHead, ids: Tensor, token: Tensor, logps: Tensor) -> Tensor:
    """Log-probs of chosen tokens under the whole vocabulary, from one token whose log-prob is known.

        log p(v) = z_v - z_y + log p(y)

    Args:
        hidden_states: `(N, H)`, with gradient.
        head: of the same model, with gradient.
        ids: `(N, K)` int64, the chosen tokens.
        token: `(N,)` int64, y.
        logps: `(N,)` log p(y), with gradient.

    Returns:
        `(N, K)` float32, with gradient.
    """
    logits = support_logits(hidden_states, head, torch.cat([ids, token.unsqueeze(1)], dim=1))
    return logits[:, :-1] - logits[:, -1:] + logps.unsqueeze(1)


class _ChosenProducts(torch.autograd.Function):
    """`h . W[id] + b[id]` for some ids of each position.

    Autograd would keep a vector of the head for every token, `(N, S, H)`; the backward looks them up anew instead.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, head: OutputHead
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.head = head
        products = hidden.new_zeros(ids.shape, dtype=head.dtype)
        with head.gathered(weight, bias), torch.autocast(hidden.device.type, enabled=False):
            for tile in tiles(*_rows_of_vectors(ids, hidden)):
                vectors = weight[ids[tile]].to(head.dtype)
                products[tile] = torch.bmm(vectors, hidden[tile].to(head.dtype).unsqueeze(2)).squeeze(2)
            return products if bias is None else products + bias[ids].to(head.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        hidden, weight, bias, ids = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype, flat = ctx.head.dtype, gradient.float()
        to_hidden = torch.zeros_like(hidden) if needs_hidden else None
        with ctx.head.gathered(weight, bias):
            to_weight = _zeros(weight) if needs_weight else None
            to_bias = _zeros(bias).index_add_(0, ids.flatten(), flat.flatten()) if needs_bias else None
            for tile in tiles(*_rows_of_vectors(ids, hidden)):
                if to_hidden is not None:
                    vectors = weight[ids[tile]].to(dtype)
                    to_hidden[tile] = torch.bmm(gradient[tile].unsqueeze(1), vectors).squeeze(1).to(hidden.dtype)
                if to_weight is not None:
                    vectors = flat[tile].unsqueeze(2) * hidden[tile].to(dtype).unsqueeze(1)
                    # Adds up: the same token stands at many positions.
                    to_weight.index_add_(0, ids[tile].flatten(), vectors.flatten(0, 1))
        return to_hidden, _like(to_weight, weight), _like(to_bias, bias), None, None


def _rows_of_vectors(ids: Tensor, hidden: Tensor) -> tuple[int, int]:
    """Number of positions, and how many of them one tile of `(n, S, H)` holds."""
    return ids.size(0), max(1, TILE_ELEMENTS // max(1, ids.size(1) * hidden.size(1)))


# --- whole distributions ---------------------------------------------------------------------------------------------
def tiled_token_losses(
    hidden_states: Tensor,
    head: OutputHead,
    vocab_size: int,
    token_loss: LossOfLogits,
    tile_elements: int | None = None,
) -> Tensor:
    """Losses of the distributions over the whole vocabulary, which exist for one tile of positions at a time.

    The backward computes each tile anew: one more projection instead of `N * V` numbers in memory.

    Args:
        hidden_states: `(N, H)`, with gradient.
        head: of the same model, with gradient.
        vocab_size: V, the first ids, those that take part.
        token_loss: loss of each position of a tile from its logits `(n, V)`; differentiated through the logits alone.
        tile_elements: largest `n * V`.

    Returns:
        `(N,)` float32 with gradient to hidden states and head; no tensor of `N * V` numbers is built.
    """
    head = head.resolved(hidden_states)
    rows = max(1, (tile_elements or TILE_ELEMENTS) // vocab_size)
    return _TiledLosses.apply(hidden_states, head.weight, head.bias, head, vocab_size, token_loss, rows)


class _TiledLosses(torch.autograd.Function):
    """A loss per position from all of its logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead,
        vocab_size: int,
        token_loss: LossOfLogits,
        rows: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.vocab_size, ctx.token_loss, ctx.rows = head, vocab_size, token_loss, rows
        losses = hidden.new_zeros(hidden.size(0), dtype=torch.float32)
        with head.gathered(weight, bias):
            whole = head.cast()  # once, not in every tile
            for tile in tiles(hidden.size(0), rows):
                losses[tile] = token_loss(project(hidden[tile], whole, vocab_size), tile)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        hidden, weight, bias = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head, known = ctx.head, slice(0, ctx.vocab_size)
        to_hidden = torch.zeros_like(hidden) if needs_hidden else None
        with head.gathered(weight, bias):
            to_weight = _zeros(weight) if needs_weight else None
            to_bias = _zeros(bias) if needs_bias else None
            whole = head.cast()
            matrix, offset = whole.weight[known], None if whole.bias is None else whole.bias[known]
            for tile in tiles(hidden.size(0), ctx.rows):
                products = _products(hidden[tile], matrix, offset, head.dtype)
                upstream = _gradient_of_products(products, head, ctx.token_loss, tile, gradient[tile])
                if to_hidden is not None:
                    to_hidden[tile] = (upstream @ matrix).to(hidden.dtype)
                if to_weight is not None:
                    _add_product(to_weight[known], upstream.t(), hidden[tile].to(head.dtype))
                if to_bias is not None:
                    to_bias[known] += upstream.sum(dim=0, dtype=torch.float32)
        return to_hidden, _like(to_weight, weight), _like(to_bias, bias), None, None, None, None


def _gradient_of_products(
    products: Tensor, head: OutputHead, token_loss: LossOfLogits, tile: slice, gradient: Tensor
) -> Tensor:
    """Autograd of one tile, from the loss to what the projection gave; a backward runs without gradient otherwise."""
    with torch.enable_grad():
        products = products.detach().requires_grad_()
        losses = token_loss(head.logits(products), tile)
    return torch.autograd.grad(losses, products, gradient)[0]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to a float32 total, unrounded in between."""
    if total.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


# --- without gradient ------------------------------------------------------------------------------------------------
@torch.no_grad()
def project(hidden_states: Tensor, head: OutputHead, vocab_size: int) -> Tensor:
    """Float32 logits `(n, V)` of the first V ids without gradient, for one tile of a frozen model."""
    head = head.resolved(hidden_states)
    with head.gathered(head.weight, head.bias):
        bias = None if head.bias is None else head.bias[:vocab_size]
        return head.logits(_products(hidden_states, head.weight[:vocab_size], bias, head.dtype))


def likeliest_tokens(
    hidden_states: Tensor, head: OutputHead, ids: Tensor, size: int, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest tokens of a frozen model at each position, and the log-probs of given ones, in one pass.

    Args:
        hidden_states: `(N, H)`.
        head: of the same model.
        ids: `(N,)`, the given token of each position.
        size: K.
        vocab_size: ids from here on are not chosen.

    Returns:
        Log-probs `(N,)` of the given tokens, ids `(N, K)` of the likeliest, and their log-probs `(N, K)`, all float32
        under the whole vocabulary.
    """
    count, width = ids.numel(), head.weight.size(0)
    logps = hidden_states.new_zeros(count, dtype=torch.float32)
    support = logps.new_zeros(count, size)
    support_ids = ids.new_zeros(count, size)
    head = head.resolved(hidden_states)
    with torch.no_grad(), head.gathered(head.weight, head.bias):
        whole = head.cast()
        for tile in tiles(count, max(1, TILE_ELEMENTS // width)):
            log_probs = project(hidden_states[tile], whole, width).log_softmax(dim=-1)
            logps[tile] = log_probs.gather(1, ids[tile].unsqueeze(1)).squeeze(1)
            support[tile], support_ids[tile] = log_probs[:, :vocab_size].topk(size, dim=-1)
    return logps, support_ids, support


# --- tiles and dtypes ------------------------------------------------------------------------------------------------
def tiles(count: int, rows: int) -> list[slice]:
    """Positions `0 .. count - 1` in tiles of at most `rows`."""
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _products(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, dtype: Any) -> Tensor:
    with torch.autocast(hidden_states.device.type, enabled=False):
        hidden_states = hidden_states.to(weight.device, dtype)
        return functional.linear(hidden_states, weight.to(dtype), None if bias is None else bias.to(dtype))


def _zeros(parameter: Tensor) -> Tensor:
    """A float32 buffer for a gradient that many tiles add to."""
    return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.to(parameter.dtype)
