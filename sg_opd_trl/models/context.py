"""What a model makes of lengths: positions that it has, and where it begins to treat rows differently."""

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SGOPDConfigError
from .internals import inner_model

# Names of configuration fields after which a model treats longer rows differently.
_BOUNDS = re.compile(r"window(?!_layers)|chunk|local_attention|original_max_position_embeddings")
# Kinds of RoPE whose frequencies follow the longest row once it passes the original context.
_FOLLOWS_LENGTH = ("dynamic", "longrope")
# Kinds of RoPE that are added to a model whose `max_position_embeddings` stays what it was trained with.
_EXTENDS = ("linear", "dynamic", "yarn")
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")


def bounds_of(config: Any) -> list[int]:
    """Lengths from which a model of this configuration may treat rows differently: windows, chunks, RoPE's context."""
    found = set(_integers(config.get_text_config().to_dict(), named=False))
    if follows_length(config):
        found.update(filter(None, [positions_of(config)]))
    return sorted(found)


def positions_of(config: Any) -> int | None:
    """Tokens that the model has positions for; None where nothing says."""
    settings = config.get_text_config().to_dict()
    limits = [settings.get(name) for name in _LIMITS]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def extended_positions(config: Any) -> int | None:
    """Tokens up to which the model is meant to be used: its positions, as far as RoPE scaling stretches them."""
    positions = positions_of(config)
    if positions is None:
        return None
    stretched = [
        int(rope["factor"] * (rope.get("original_max_position_embeddings") or positions))
        for rope in _ropes(config)
        if rope.get("rope_type", rope.get("type")) in _EXTENDS and rope.get("factor")
    ]
    return max([positions, *stretched])


def _integers(settings: Any, *, named: bool) -> Iterator[int]:
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from _integers(value, named=bool(_BOUNDS.search(str(key))))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _integers(value, named=named)
    elif named and isinstance(settings, int) and not isinstance(settings, bool) and settings > 0:
        yield settings


def follows_length(config: Any) -> bool:
    """Whether RoPE frequencies change with the longest row."""
    return any(rope.get("rope_type", rope.get("type")) in _FOLLOWS_LENGTH for rope in _ropes(config))


def rope_stays_up_to(config: Any) -> int | None:
    """Tokens up to which RoPE frequencies do not change with the longest row; None where they never do."""
    bounds = set()
    for rope in _ropes(config):
        kind = rope.get("rope_type", rope.get("type"))
        if kind in _FOLLOWS_LENGTH:
            # What it was trained with at first says when "longrope" begins; "dynamic" begins at the positions it has.
            first = rope.get("original_max_position_embeddings") if kind == "longrope" else None
            bounds.add(first or positions_of(config))
    return min((bound for bound in bounds if bound), default=None)


def _ropes(config: Any) -> list[dict]:
    settings = config.get_text_config().to_dict()
    ropes = [settings.get("rope_scaling") or {}, settings.get("rope_parameters") or {}]
    # One entry per kind of layer, in some models.
    return ropes + [nested for rope in ropes for nested in rope.values() if isinstance(nested, dict)]


# --- rows that are too long ------------------------------------------------------------------------------------------
def keeps_a_table(model: nn.Module) -> bool:
    """Whether a model keeps something for each of its positions (vectors, a mask): one more ends in an index error.

    RoPE keeps nothing. Whether a weight is such a table is seen where the same model with more positions is built,
    without memory: its tables have another size.
    """
    base = inner_model(model)
    longer = copy.deepcopy(base.config)
    settings = longer.get_text_config()
    for name in _LIMITS:
        if hasattr(settings, name) and isinstance(getattr(settings, name), int):
            setattr(settings, name, getattr(settings, name) + 1)
    return _sizes(type(base), base.config) != _sizes(type(base), longer)


def _sizes(kind: Any, config: Any) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = kind(copy.deepcopy(config))
    return {name: x.shape for name, x in itertools.chain(model.named_parameters(), model.named_buffers())}


def check_rows_fit(model: nn.Module, attention_mask: Tensor) -> None:
    """Refuse rows `(B, W)` that are too long for the model that is about to read them.

    Raises:
        SGOPDConfigError: longer than its table of positions, or so long that the RoPE of all rows would follow the
            longest; names the row, its length and the settings.
    """
    _check_rope_stays(model, attention_mask)
    table = _table(model, attention_mask.size(1))
    if table is None:
        return
    lengths = attention_mask.sum(dim=1)
    _refuse_longer(table, int(lengths.argmax()), int(lengths.max()), 0, type(inner_model(model)).__name__)


def check_prompts_fit(model: nn.Module, prompts: Sequence[Sequence[int]], completion: int, role: str) -> None:
    """Refuse prompts whose completions would pass the table of positions of the model that is about to write them.

    Raises:
        SGOPDConfigError: names the row, its length and the settings.
    """
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths, default=0)
    table = _table(model, longest + completion)
    if table is not None:
        _refuse_longer(table, lengths.index(longest), longest, completion, f"the {role}")


def _refuse_longer(table: int, row: int, length: int, completion: int, reader: str) -> None:
    if length + completion <= table:
        return
    what = f"prompt of {length} tokens and completion of up to {completion}" if completion else f"{length} tokens"
    raise SGOPDConfigError(
        f"Rows must fit into the {table} positions that {reader} has a table of, got row {row} of the batch with "
        f"{what}. It would end in an index error, and nothing was updated. Lower `max_completion_length` or "
        "`max_prompt_tokens`, drop such rows, or use a model with a longer context."
    )


def _check_rope_stays(model: nn.Module, attention_mask: Tensor) -> None:
    base = inner_model(model)
    known = vars(base).setdefault(_KNOWN, {})
    if "rope" not in known:
        known["rope"] = rope_stays_up_to(base.config)
    bound = known["rope"]
    if bound is None or attention_mask.size(1) <= bound:
        return
    lengths = attention_mask.sum(dim=1)
    longest = int(lengths.max())
    # One row alone has what plain logits of it have.
    if longest > bound and len(lengths) > 1:
        raise SGOPDConfigError(
            f"Rows must fit into the {bound} tokens up to which the RoPE of {type(base).__name__} stays as it is, got "
            f"row {int(lengths.argmax())} of the batch with {longest} tokens. All rows beside it would get other "
            "log-probs than each of them alone, and nothing was updated. Lower `max_completion_length` or "
            "`max_prompt_tokens`, drop such rows, or set a rope_type of fixed frequencies."
        )


def _table(model: nn.Module, width: int) -> int | None:
    """Size of the model's table of positions if something this wide can pass it; None where there is none."""
    base = inner_model(model)
    known = vars(base).setdefault(_KNOWN, {})
    # In every forward: reading a configuration takes longer than comparing two numbers.
    if "positions" not in known:
        known["positions"] = positions_of(base.config)
    positions = known["positions"]
    if positions is None or width <= positions:
        return None
    if "table" not in known:
        known["table"] = keeps_a_table(base)
    return positions if known["table"] else None


_KNOWN = "sg_opd_positions"
