"""What a configuration says of lengths: positions that a model has, and where it begins to treat rows differently."""

import re
from collections.abc import Iterator
from typing import Any

# Names of configuration fields after which a model treats longer rows differently.
_BOUNDS = re.compile(r"window(?!_layers)|chunk|local_attention|original_max_position_embeddings")
# Kinds of RoPE whose frequencies follow the longest row once it passes the original context.
_FOLLOWS_LENGTH = ("dynamic", "longrope")


def bounds_of(config: Any) -> list[int]:
    """Lengths from which a model of this configuration may treat rows differently: windows, chunks, RoPE's context."""
    found = set(_integers(config.get_text_config().to_dict(), named=False))
    if follows_length(config):
        found.update(filter(None, [positions_of(config)]))
    return sorted(found)


def positions_of(config: Any) -> int | None:
    """Tokens that the model has positions for; None where nothing says."""
    settings = config.get_text_config().to_dict()
    limits = [settings.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


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
    settings = config.get_text_config().to_dict()
    ropes = [settings.get("rope_scaling") or {}, settings.get("rope_parameters") or {}]
    # One entry per kind of layer, in some models.
    ropes += [nested for rope in ropes for nested in rope.values() if isinstance(nested, dict)]
    return any(rope.get("rope_type", rope.get("type")) in _FOLLOWS_LENGTH for rope in ropes)
