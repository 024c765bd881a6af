"""What the package uses of transformers beyond its documented interface, each under a name of ours.

`tests/contract/test_transformers_contract.py` checks every one of them, so that a transformers that moves one fails
there by name and not in a run. No other module but `trl_seam` reads a private name of transformers.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMixin, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

_ROOM = 32  # tokens by which a key-value buffer grows at least


def inner_model(model: nn.Module) -> Any:
    """The transformers model inside wrappers of adapters and of data parallelism, or the model itself.

    Typed as anything: parts of this package keep facts in the instance, which no type declares.
    """
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


# --- attention -------------------------------------------------------------------------------------------------------
def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Name of the attention that models of this configuration run, `sdpa` say; None if none was chosen yet."""
    return config._attn_implementation


@contextmanager
def attention_switched(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Have the model of this configuration look its attention up under another name for the block."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def attention_is_looked_up(model: PreTrainedModel) -> bool:
    """Whether the model takes its attention from transformers' `AttentionInterface`, so that ours can stand in."""
    return bool(model._supports_attention_backend)


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether the model keeps states between tokens that are no key-value cache (Mamba and its kin)."""
    return bool(model._is_stateful)


# --- key-value cache -------------------------------------------------------------------------------------------------
def can_select_rows(cache: Any) -> bool:
    """Whether `select_rows` is all that rows of this cache need to leave it: growing layers on the device itself."""
    if type(cache) is not DynamicCache or cache.offloading:
        return False
    kinds = {type(layer) for layer in cache.layers}
    return bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep the given rows of a cache, in their order; a row may be named more than once."""
    cache.batch_select_indices(rows)


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache, as a model makes one where it is given none, that grows in steps."""
    cache = DynamicCache(config=config)
    give_room(cache)
    return cache


def give_room(cache: DynamicCache) -> None:
    """Have an empty cache grow in steps instead of with every token."""
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]


class RoomyLayer(DynamicLayer):
    """Keys and values in buffers with room to grow: a new token is written, instead of all of them being copied."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens, `(L, heads, tokens, dim)` each; all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.size(-2)
        if self._buffers is None or self._buffers[0].size(-2) < end:
            # By a share of the length, so that the copies add up to a few times the length, not to its square.
            room = end + max(_ROOM, end // 4)
            self._buffers = _grown(self.keys, key_states, room), _grown(self.values, value_states, room)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows; the room behind them stays."""
        if self._buffers is not None:
            length = self.get_seq_length()
            self._buffers = self._buffers[0][indices], self._buffers[1][indices]
            self.keys, self.values = (buffer[..., :length, :] for buffer in self._buffers)


def _grown(old: Tensor | None, states: Tensor, room: int) -> Tensor:
    buffer = states.new_empty(*states.shape[:-2], room, states.size(-1))
    if old is not None and old.numel():
        buffer[..., : old.size(-2), :] = old
    return buffer


# --- decoding --------------------------------------------------------------------------------------------------------
def cache_argument() -> str:
    """What `generate` calls the key-value cache that it hands to a loop and to the model.

    It is `past_key_values` up to transformers 5.23, and `cache` from 5.24 on.
    """
    names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in names else "past_key_values"


def select_rows_of_processors(processors: LogitsProcessorList, kept: Tensor) -> None:
    """Have the processors of a batch go on with the given rows of it.

    The repetition penalty alone knows something about each row: where its prompt begins.
    """
    for processor in processors:
        if isinstance(processor, RepetitionPenaltyLogitsProcessor):
            begins = processor.prompt_ignore_length
            processor.prompt_ignore_length = begins.to(kept.device)[kept] if isinstance(begins, Tensor) else begins


def switches_kernel_to_decode(model: Any) -> bool:
    """Whether `generate` gives a mixture of experts another kernel while it decodes, which rounds differently."""
    # On the CPU it does not.
    return model.device.type != "cpu" and "grouped_mm" in model.get_experts_implementation().values()
