"""One forward of a causal LM on prompts and completions, padded or packed, with a second output if one is requested.

`padded_forward` takes rows as they are, or with all padding behind them (`padding_behind`: in half precision, so that
a row is rounded alike in every layout). `packed_forward` puts them behind one another
without their padding, which is exact where tokens meet in attention alone (`should_pack`): attention is then a
variable-length kernel, or SDPA row by row (`rows_apart`). With SDPA packed rows can also share the beginning of their
prompts (`prefixes_to_share`). Both run a model with TRL's fused head, which gives
log-probs and never builds logits; `trl_seam.fused_forward` picks one of them, among those that are right for the
model (`Layouts`).
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .experts import returns_router_logits
from .head import OutputHead
from .internals import (
    attention_implementation,
    attention_is_looked_up,
    attention_switched,
    inner_model,
    is_recurrent,
)
from .prefixes import WORTHWHILE, Prefixes, shared_prefixes

logger = logging.getLogger(__name__)

Places = np.ndarray
"""Packed positions of one row's tokens, `(n,)` int64: on the host, where a few small steps cost next to nothing."""
Compute = Callable[[Tensor, OutputHead, Tensor], tuple[Tensor, ...]]
"""`(hidden states (N, H), head, log-probs (N,)) -> tensors (N, ...)`, of the N chosen tokens in row-major order.

The hidden states are those that predict the tokens. All three have gradients where the model has.
"""


class HeadRequest(NamedTuple):
    """What to compute from the hidden states inside the model's own forward.

    It travels as an argument of the model (`head_output`), and what it computes is part of what the model returns:
    replicas and shards take their gradients from there, so that nothing else may carry tensors out of a forward.

    Attributes:
        chosen: `(b, t)` bool, completion tokens of the first rows and columns of the forward.
        compute: called once, for these tokens.
        needs_logps: False spares the forward its own log-probs; they are 0 then, and `compute` is given zeros.
    """

    chosen: Tensor
    compute: Compute
    needs_logps: bool = True


class ForwardOutput(NamedTuple):
    """What one forward says of the completions, with gradient where the model has one.

    Attributes:
        logps: `(B, T)` float32, 0 where the mask is 0.
        entropies: `(B, T)` float32, 0 likewise; None if the head gives none.
        auxiliary_loss: 0-dim, how unevenly a mixture of experts is used; None where it was not asked for.
        answer: what the request computed; None without a request.
    """

    logps: Tensor
    entropies: Tensor | None
    auxiliary_loss: Tensor | None
    answer: tuple[Tensor, ...] | None


def padded_forward(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    request: HeadRequest | None = None,
    *,
    auxiliary_loss: bool = False,
    flush_left: bool = False,
) -> ForwardOutput:
    """One forward on padded rows, for arguments as in `pack`, of a model with TRL's fused head.

    `flush_left` moves all padding behind the rows, where causal models never see it.
    """
    rows = (move_left if flush_left else pad)(input_ids, attention_mask, completion_length)
    output = _forward(model, rows, request, auxiliary_loss=auxiliary_loss)
    return output if auxiliary_loss else output._replace(auxiliary_loss=None)


def packed_forward(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    request: HeadRequest | None = None,
    prefixes: Prefixes | None = None,
) -> ForwardOutput:
    """One forward without padding, for arguments as in `pack`, of a model that `should_pack` allows.

    With `prefixes`, those of `prefixes_to_share`, tokens that rows share are computed once.
    """
    packed = pack(input_ids, attention_mask, completion_length, prefixes)
    with _attention(model, packed):
        return _forward(model, packed, request)._replace(auxiliary_loss=None)


def _forward(
    model: nn.Module,
    rows: "PaddedRows | MovedRows | PackedRows",
    request: HeadRequest | None,
    *,
    auxiliary_loss: bool = False,
) -> ForwardOutput:
    inputs = dict(rows.model_inputs)
    if auxiliary_loss or returns_router_logits(model):
        # A model may be set to balance its experts in every forward, whether somebody asks or not.
        inputs["output_router_logits"] = auxiliary_loss
    if request is not None:
        inputs["head_output"] = _bound(request, rows)
        if not request.needs_logps:
            # The fused head projects positions with a label only.
            inputs |= {name: torch.full_like(inputs[name], _IGNORED) for name in _LABELS if name in inputs}
    outputs = model(**inputs, fused_lm_head=True)
    return ForwardOutput(
        logps=rows.unpack(outputs.log_probs),
        entropies=None if outputs.entropy is None else rows.unpack(outputs.entropy),
        auxiliary_loss=outputs.aux_loss,
        answer=None if request is None else outputs.head_output,
    )


def _bound(request: HeadRequest, rows: "PaddedRows | MovedRows | PackedRows") -> Compute:
    """The request as the model's forward calls it, with the values of all its positions.

    Where a token's position is in this forward is settled here: the model and its wrappers know of no layout.
    """
    missing = rows.shape[0] - request.chosen.size(0), rows.shape[1] - request.chosen.size(1)
    chosen = functional.pad(request.chosen, (0, missing[1], 0, missing[0]))

    def head_output(hidden_states: Tensor, head: OutputHead, logps: Tensor) -> tuple[Tensor, ...]:
        return request.compute(rows.pick(hidden_states, chosen), head, rows.pick(logps, chosen))

    return head_output


def scattered(values: Tensor, chosen: Tensor) -> Tensor:
    """Values `(N, ...)` of the chosen tokens back to `(B, T, ...)`, 0 elsewhere: the inverse of `values[chosen]`."""
    if values.dim() == 1:
        # Not an indexed assignment: without any token the result stays connected to the model.
        return values.new_zeros(chosen.shape).masked_scatter(chosen, values)
    result = values.new_zeros(*chosen.shape, *values.shape[1:])
    result[chosen] = values
    return result


# --- the layouts -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layouts:
    """The layouts in which a model gives rows that are run together what each of them gets alone.

    Attributes:
        packed: rows behind one another, where `should_pack` says so too.
        shared: packed rows with the beginnings of their prompts in common, see `prefixes_to_share`.
        padded: prompts padded on the left, as TRL has them; otherwise all padding must stand behind the rows.
        written_together: prompts of unequal length padded on the left and continued; otherwise one length at a time.
        behind: all padding behind the rows, which is looked at where it is used.
        up_to: tokens of the longest row for which that is known; None where longer ones are treated no differently.
    """

    packed: bool = True
    shared: bool = True
    padded: bool = True
    written_together: bool = True
    behind: bool = True
    up_to: int | None = None

    def common(self, later: "Layouts") -> "Layouts":
        """What is right for both, two looks at one model."""
        return Layouts(
            self.packed and later.packed,
            self.shared and later.shared,
            self.padded and later.padded,
            self.written_together and later.written_together,
            self.behind and later.behind,
            later.up_to,
        )

    def of(self, attention_mask: Tensor) -> "Layouts":
        """Those of some rows `(B, W)`: of longer ones than were looked at, what is right for any causal model."""
        if self.up_to is None or attention_mask.size(1) <= self.up_to:
            return self
        # The width too: some models count the columns, whatever is in them.
        longer = int(attention_mask.sum(dim=1).max()) > self.up_to
        if longer:
            _warn_of_longer_rows(self.up_to)
        return replace(self, padded=False, packed=self.packed and not longer)


@cache  # once
def _warn_of_longer_rows(up_to: int) -> None:
    logger.warning(
        "Rows of more than %d tokens have all their padding behind them and are not packed, which is slower: no "
        "prompt that was known before the run was so long, and the model may treat such rows differently.",
        up_to,
    )


def layouts_of(model: nn.Module) -> Layouts:
    """What is known to be right for a model; everything, until `restrict_layouts` has said otherwise."""
    # In the instance, where copies and wrappers of the model find it.
    return vars(inner_model(model)).get(_LAYOUTS, Layouts())


def restrict_layouts(model: nn.Module, layouts: Layouts) -> None:
    """Have all further forwards of a model keep to these layouts, whoever runs them."""
    setattr(inner_model(model), _LAYOUTS, layouts)


_LAYOUTS = "sg_opd_layouts"


def padding_behind(model: nn.Module, device: torch.device, layouts: Layouts | None = None) -> bool:
    """Whether rows that are not packed have all their padding behind them, rather than prompts padded on the left.

    Padding on the left moves a row to other positions. RoPE makes nothing of that but other rounding: in float32 some
    1e-6 nats, and rows stay as TRL has them. In half precision it is some 1e-2 nats, and the log-ratios of two models
    that score a row in different layouts would have a sign where there is none. With the padding behind, a row has the
    positions that it has when it is packed, or alone.

    Args:
        model: plain or wrapped.
        device: of the rows.
        layouts: those that are right for the rows, None for the model's.
    """
    layouts = layouts_of(model) if layouts is None else layouts
    half = computing_dtype(model, device).itemsize < torch.float32.itemsize
    return layouts.behind and (half or not layouts.padded)


def computing_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """The precision of a forward on this device: autocast's where that is on, or else the weights'."""
    kind = device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inner_model(model).dtype
    # TF32's products have the mantissa of float16.
    return torch.float16 if dtype == torch.float32 and kind == "cuda" and _multiplies_in_tf32() else dtype


def _multiplies_in_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    # From 2.9 on PyTorch has a setting with this name, and the old one cannot be read once somebody has set the new.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


_IGNORED = -100  # label of a position that predicts nothing, as transformers has it
_LABELS = ("labels", "shift_labels")


@dataclass(frozen=True)
class PaddedRows:
    """Rows of one width, as TRL keeps them.

    Attributes:
        model_inputs: arguments of the model: `input_ids`, `attention_mask` and `labels`, `(B, P + T)` each.
        shape: `(B, T)`.
    """

    model_inputs: dict[str, Any]
    shape: tuple[int, int]

    def unpack(self, values: Tensor) -> Tensor:
        """`(B, T)` from one value per position that predicts another, `(B, P + T - 1)`."""
        # From the right: virtual tokens of an adapter add positions in front.
        return values[:, -self.shape[1] :]

    def pick(self, values: Tensor, chosen: Tensor) -> Tensor:
        """`(N, ...)` values `(B, P + T - 1, ...)` of the positions that predict the chosen tokens, `(B, T)` bool."""
        return self.unpack(values)[chosen]


def pad(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> PaddedRows:
    """Rows as they are, their completions labelled; arguments as in `pack`."""
    labels = input_ids.masked_fill(attention_mask == 0, _IGNORED)
    labels[:, :-completion_length] = _IGNORED
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return PaddedRows(inputs, (input_ids.size(0), completion_length))


@dataclass(frozen=True)
class MovedRows:
    """Rows moved to the left, so that all padding stands behind them, in `W` columns.

    Nothing here makes the host wait for an accelerator, which a forward could not hide: no shape follows from a value.

    Attributes:
        model_inputs: arguments of the model: `input_ids`, `attention_mask` and `labels`, `(B, W)` each.
        predictors: `(B, T)` int64, which position predicts a token of a completion, from 1 on; 0 where none does.
    """

    model_inputs: dict[str, Any]
    predictors: Tensor

    @property
    def shape(self) -> torch.Size:
        """`(B, T)`."""
        return self.predictors.shape

    def unpack(self, values: Tensor) -> Tensor:
        """Back to `(B, T)` from one value per position that predicts another, `(B, W - 1)`."""
        return functional.pad(self._of_text(values), (1, 0)).gather(1, self.predictors)

    def pick(self, values: Tensor, chosen: Tensor) -> Tensor:
        """`(N, ...)` values `(B, W - 1, ...)` of the positions that predict the chosen tokens, `(B, T)` bool.

        A token that nothing predicts, the first one without a prompt, gets those of its row's first position.
        """
        values = self._of_text(values)
        rows = torch.arange(values.size(0), device=values.device).unsqueeze(1)
        positions = values.size(1) * rows + (self.predictors - 1).clamp(min=0)
        return values.flatten(0, 1)[positions[chosen]]

    def _of_text(self, values: Tensor) -> Tensor:
        # Virtual tokens of an adapter add positions in front.
        return values[:, values.size(1) - self.model_inputs["input_ids"].size(1) + 1 :]


def move_left(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> MovedRows:
    """Rows with all their padding behind them, their completions labelled; arguments as in `pack`."""
    present = attention_mask != 0
    # Stable: tokens keep their order.
    order = (~present).to(torch.int8).argsort(dim=1, stable=True)[:, : _columns(present)]
    labels = input_ids.masked_fill(~present, _IGNORED)
    labels[:, :-completion_length] = _IGNORED
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    inputs = {name: values.gather(1, order) for name, values in inputs.items()}
    # A row's first position predicts its second token.
    predictors = (present.cumsum(dim=1) - 1).masked_fill(~present, 0)
    return MovedRows(inputs, predictors[:, -completion_length:])


def _columns(present: Tensor) -> int:
    """Columns of moved rows: on the CPU those of the longest row, elsewhere all of them.

    Counting would make the host wait for an accelerator before every forward, and micro-batches are trimmed to their
    longest prompt and completion anyway. It also keeps widths the multiples that they were padded to.
    """
    return max(1, int(present.sum(dim=1).max())) if present.device.type == "cpu" else present.size(1)


@dataclass(frozen=True)
class PackedRows:
    """Rows behind one another without their padding, `N` tokens in all.

    Attributes:
        model_inputs: arguments of the model: `input_ids`, `position_ids` (from 0 in each row) and `shift_labels` (the
            label that a position predicts, -100 = none), `(1, N)` each, and where the rows begin, unless they share
            tokens.
        scored: `(N,)` bool, positions that predict a token of a completion.
        targets: `(B, T)` bool, the tokens that they predict, in the same order.
        rows: packed positions of every row's tokens, where rows share some; None where they are behind one another.
    """

    model_inputs: dict[str, Any]
    scored: Tensor
    targets: Tensor
    rows: list[Places] | None = None

    @property
    def shape(self) -> torch.Size:
        """`(B, T)`."""
        return self.targets.shape

    def unpack(self, values: Tensor) -> Tensor:
        """Back to `(B, T)` from one value per packed position, `(1, N)`; 0 where nothing was predicted."""
        return scattered(values[0, self.scored], self.targets)

    def pick(self, values: Tensor, chosen: Tensor) -> Tensor:
        """`(N, ...)` values `(1, W, ...)` of the positions that predict the chosen tokens, `(B, T)` bool.

        A token that nothing predicts, the first one without a prompt, gets those of position 0.
        """
        scored = self.scored.nonzero().flatten()
        positions = scattered(scored, self.targets)
        return values[0, positions[chosen]]


def pack(
    input_ids: Tensor, attention_mask: Tensor, completion_length: int, prefixes: Prefixes | None = None
) -> PackedRows:
    """Put rows behind one another without their padding.

    Args:
        input_ids: `(B, P + T)` token ids; the tokens of a row have no padding between them.
        attention_mask: `(B, P + T)`, 1 = token, 0 = padding; at least one token.
        completion_length: T, the columns at the end whose tokens are scored.
        prefixes: tokens at the beginning of rows that stand there once; attention must be told of them.
    """
    present = attention_mask != 0
    prompt_width = input_ids.size(1) - completion_length
    labels = input_ids.masked_fill(~present, _IGNORED)
    labels[:, :prompt_width] = _IGNORED
    # A position predicts the next column of its own row; the last one predicts nothing.
    shift_labels = functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
    predicting = present & (shift_labels != _IGNORED)
    positions = present.cumsum(dim=1) - 1
    own, rows = present, None
    if prefixes is not None:
        own = present & (positions >= torch.tensor(prefixes.lengths, device=present.device).unsqueeze(1))
        rows = _rows_of(own, prefixes)
    packed_labels = shift_labels[own]
    model_inputs = {
        "input_ids": input_ids[own].unsqueeze(0),
        "position_ids": positions[own].unsqueeze(0),
        "shift_labels": packed_labels.unsqueeze(0),
        **(_row_bounds(present.sum(dim=1)) if rows is None else {}),
    }
    targets = functional.pad(predicting[:, :-1], (1, 0))[:, prompt_width:]
    return PackedRows(model_inputs, scored=packed_labels != _IGNORED, targets=targets, rows=rows)


def _rows_of(own: Tensor, prefixes: Prefixes) -> list[Places]:
    """Packed positions of every row's tokens, those that it shares included.

    Args:
        own: `(B, W)` bool, tokens that are packed, row by row.
        prefixes: the tokens that are in front of them.
    """
    ends = np.cumsum(own.sum(dim=1).tolist())
    rows: dict[int, Places] = {}
    neighbour = np.empty(0, dtype=np.int64)
    for row in prefixes.order:
        start = ends[row - 1] if row else 0
        neighbour = np.concatenate([neighbour[: prefixes.lengths[row]], np.arange(start, ends[row])])
        rows[row] = neighbour
    return [rows[row] for row in range(len(ends)) if len(rows[row])]


def _row_bounds(lengths: Tensor) -> dict[str, Any]:
    """What the kernels take; without it they would find the rows anew from `position_ids` in every layer."""
    lengths = lengths[lengths > 0]
    bounds = functional.pad(lengths.cumsum(dim=0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


# --- where packing is exact and worth it -----------------------------------------------------------------------------
_NATIVE_KERNELS = ("flash_attention_2", "flash_attention_3")
_HUB_KERNELS = ("flash-attn", "flash_attn")
_ROW_LOCAL_LAYERS = {"full_attention", "sliding_attention"}


def should_pack(model: nn.Module, attention_mask: Tensor) -> bool:
    """Whether packed rows cannot see one another in this model, and packing these rows saves work.

    That takes layers that mix tokens through attention alone (recurrent states and convolutions would run on from row
    to row, images bring positions of their own, virtual tokens of prompt tuning would stand before the first row only)
    and attention that keeps rows apart: a variable-length kernel, or SDPA on the CPU, row by row.

    Args:
        model: plain or wrapped, with a fused head.
        attention_mask: `(B, W)`, 1 = token, 0 = padding.
    """
    base = _base(model)
    if base is None or not _mixes_within_rows(base):
        return False
    if _has_variable_length_kernel(base):
        return True
    if not _attends_by_rows(base, attention_mask.device):
        return False
    padding = attention_mask.numel() - int(attention_mask.sum())
    # From this share on packing pays for its bookkeeping; a kernel has none to pay for.
    return padding >= WORTHWHILE * attention_mask.numel()


def prefixes_to_share(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, completion_length: int
) -> Prefixes | None:
    """What these rows, arguments as in `pack`, would share in a packed forward; None where they should not.

    A variable-length kernel knows of no rows that share tokens, and too little shared is not worth the search.
    """
    prompt_width = input_ids.size(1) - completion_length
    if input_ids.size(0) < 2 or not can_share(model, input_ids.device):
        return None
    present = attention_mask[:, :prompt_width] != 0
    prompts = input_ids[:, :prompt_width][present].split(present.sum(dim=1).tolist())
    prefixes = shared_prefixes([prompt.tolist() for prompt in prompts])
    saved = sum(prefixes.lengths)
    return prefixes if saved and saved >= WORTHWHILE * int(attention_mask.sum()) else None


def can_share(model: nn.Module, device: torch.device) -> bool:
    """Whether packed rows of this model may share tokens in a forward that begins here and now.

    Where something is dropped at random each row has to lose its own.
    """
    base = _base(model)
    if base is None or not layouts_of(model).shared or not layouts_of(model).packed:
        return False
    if not _mixes_within_rows(base) or not _attends_by_rows(base, device):
        return False
    return not model.training or largest_dropout(model) == 0.0


def largest_dropout(model: nn.Module) -> float:
    """The largest probability by which a layer of the model drops something in training.

    Not of its configuration, which also speaks of heads that the model has not (`classifier_dropout`).
    """
    return max([0.0, *(p for module in model.modules() for p in dropout_of(module).values())])


def dropout_of(module: nn.Module) -> dict[str, float]:
    """Attributes of a layer that are such a probability."""
    named = {name: value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)}
    return named | ({"p": float(module.p)} if isinstance(module, nn.Dropout) else {})


def _base(model: nn.Module) -> PreTrainedModel | None:
    """The model inside its wrappers; None where virtual tokens come in between."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
        if _adds_virtual_tokens(module):
            return None
    return None


def _adds_virtual_tokens(module: Any) -> bool:
    return hasattr(module, "peft_config") and any(c.is_prompt_learning for c in module.peft_config.values())


def _mixes_within_rows(model: PreTrainedModel) -> bool:
    config: Any = model.config
    if is_recurrent(model) or config.get_text_config() is not config:
        return False
    return not hasattr(config, "layer_types") or set(config.layer_types or ()) <= _ROW_LOCAL_LAYERS


def _has_variable_length_kernel(model: PreTrainedModel) -> bool:
    name = attention_implementation(model.config) or ""
    # Not the `paged|...` names, under which transformers generates.
    from_hub = any(kernel in name for kernel in _HUB_KERNELS) and "|" not in name
    return name in _NATIVE_KERNELS or from_hub


def _attends_by_rows(base: PreTrainedModel, device: torch.device) -> bool:
    if device.type != "cpu" or attention_implementation(base.config) != "sdpa" or not attention_is_looked_up(base):
        return False
    # The second forward of checkpointing runs in the backward, after `rows_apart`: packed rows would see one another.
    checkpointing = (m.gradient_checkpointing for m in base.modules() if hasattr(m, "gradient_checkpointing"))
    return not (torch.is_grad_enabled() and any(checkpointing))


# --- SDPA that keeps packed rows apart -------------------------------------------------------------------------------
IMPLEMENTATION = "sg_opd_rows"
"""Name of our attention in transformers' `AttentionInterface`."""
# Not every architecture hands the bounds that its forward is given through to its attention (Nemotron does not).
_rows: ContextVar["_Plan"] = ContextVar("packed rows")
# Rows share a call down to this share of its longest row: fewer calls for little padding, in attention alone.
_LIKE_LENGTH = 0.8


def _attention(model: nn.Module, packed: PackedRows) -> AbstractContextManager[None]:
    """What a packed forward needs around it: nothing where a variable-length kernel takes the bounds itself."""
    base = _base(model)
    if base is None or not _attends_by_rows(base, packed.scored.device):
        return nullcontext()
    return rows_apart(base, rows_between(packed.model_inputs["cu_seq_lens_q"]) if packed.rows is None else packed.rows)


def rows_between(bounds: Tensor) -> list[Places]:
    """Places of rows that stand behind one another: `(rows + 1,)`, where they begin and the last one ends."""
    return [np.arange(start, end) for start, end in itertools.pairwise(bounds.tolist())]


@contextmanager
def rows_apart(model: PreTrainedModel, rows: list[Places]) -> Iterator[None]:
    """Have an SDPA model attend inside packed rows only; the model is as before afterwards.

    Not for gradient checkpointing, whose second forward runs after the block.

    Args:
        model: whose attention goes through transformers' `AttentionInterface`.
        rows: packed positions of every row's tokens; rows may have their first ones in common.
    """
    token = _rows.set(_plan(rows))
    try:
        with attention_switched(model.config, IMPLEMENTATION):
            yield
    finally:
        _rows.reset(token)


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
    plan = _rows.get()
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


# Without a mask function of that name transformers builds no mask, and hands the rows' bounds through.
AttentionInterface.register(IMPLEMENTATION, _attend)


class _Plan(NamedTuple):
    """How packed tokens go into padded calls and back; None where the order stays as it is.

    A token that rows share goes into the call of each of them, whose keys it is among, and comes back from one.

    `calls` are `(rows, longest row)`; `into` is the packed position of every padded one, `back` the padded position of
    every packed one.
    """

    calls: tuple[tuple[int, int], ...]
    into: Tensor | None
    back: Tensor | None


def _plan(rows: list[Places]) -> _Plan:
    lengths = [len(row) for row in rows]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    calls: list[list[int]] = []
    for row in order:
        if not calls or lengths[row] < _LIKE_LENGTH * lengths[calls[-1][0]]:
            calls.append([])
        calls[-1].append(row)
    tokens = 1 + max(int(row[-1]) for row in rows)
    into, back, padded = [], np.empty(tokens, dtype=np.int64), 0
    for call in calls:
        width = lengths[call[0]]
        for row in call:
            # Padding repeats the row's last token: it stands behind all others, where causal attention ignores it.
            into += [rows[row], rows[row][-1:].repeat(width - lengths[row])]
            back[rows[row]] = np.arange(padded, padded + lengths[row])
            padded += width
    sizes = tuple((len(call), lengths[call[0]]) for call in calls)
    if padded == tokens and order == sorted(order):
        return _Plan(sizes, None, None)
    return _Plan(sizes, torch.from_numpy(np.concatenate(into)), torch.from_numpy(back))


def _take(states: Tensor, positions: Tensor | None) -> Tensor:
    return states if positions is None else states.index_select(0, positions.to(states.device))


def _band(width: int, window: int | None, device: torch.device) -> Tensor | None:
    """Mask of a sliding window that is shorter than the rows, else None."""
    if window is None or width <= window:
        return None
    back = torch.arange(width, device=device).unsqueeze(1) - torch.arange(width, device=device)
    return ((back >= 0) & (back < window)).expand(1, 1, width, width)
