"""Completions of a causal language model in this process, for rollouts and for evaluation."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from .decoding import OnEnded, UnsupportedDecoding, decode_live_rows
from .errors import NonFiniteError
from .scoring import pad_rows

_LOGGER = logging.getLogger(__name__)


def generate_completions(
    model: Any,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    *,
    role: str = "student",
    synced_gpus: bool = False,
    on_ended: OnEnded | None = None,
) -> list[list[int]]:
    """One completion per prompt; equal prompts should follow one another, so that they share a prefill.

    What the own decoding loop does not support (beams, stop strings, static caches, ...) runs in that of `generate`.

    Args:
        model: unwrapped model, with or without a PEFT adapter.
        prompts: token ids of each prompt.
        config: how to sample, with `eos_token_id` and `pad_token_id`; the model's own fills what is left open.
        role: what an error calls the model.
        synced_gpus: whether the model is sharded, so that all ranks must run the same number of forwards.
        on_ended: is told of rows that end with an end token while others go on; only the own loop can tell.

    Returns:
        Token ids of each completion, up to and including its first end token.

    Raises:
        NonFiniteError: logits that are NaN or infinite.
    """
    if not prompts:
        return []
    ids, mask = (x.to(model.device) for x in pad_rows(list(prompts), config.pad_token_id or 0, left=True))
    arguments = {"input_ids": ids, "attention_mask": mask, "generation_config": config}
    try:
        output = _generate(model, arguments, synced_gpus, on_ended)
    except RuntimeError as error:
        # The sampler's own words for logits that are NaN or infinite.
        if "probability tensor" not in str(error):
            raise
        raise NonFiniteError(
            f"The {role}'s logits are not finite while it writes a completion. Nothing was updated. Check the "
            f"{role}'s weights, or load it in float32 or bfloat16."
        ) from error
    return [cut_after_eos(row, config.eos_token_id) for row in output[:, ids.size(1) :].tolist()]


def cut_after_eos(ids: list[int], eos_token_ids: int | Sequence[int] | None) -> list[int]:
    """The completion up to and including its first end token."""
    ends = {eos_token_ids} if isinstance(eos_token_ids, int) else set(eos_token_ids or ())
    length = next((position + 1 for position, token in enumerate(ids) if token in ends), len(ids))
    return ids[:length]


def _generate(model: Any, arguments: dict[str, Any], synced_gpus: bool, on_ended: OnEnded | None) -> Tensor:
    if not synced_gpus and not _has_adapter_of_rows(model):
        try:
            return model.generate(**arguments, custom_generate=partial(decode_live_rows, on_ended=on_ended))
        except UnsupportedDecoding as reason:
            _LOGGER.info("Completions are left to the decoding loop of `generate`: %s.", reason)
    return model.generate(**arguments, synced_gpus=synced_gpus or None)


def _has_adapter_of_rows(model: Any) -> bool:
    """Whether an adapter prepares inputs for all rows before the first forward, each prompt as often as it occurs."""
    configs = model.peft_config.values() if hasattr(model, "peft_config") else ()
    return any(config.is_prompt_learning or config.to_dict().get("alora_invocation_tokens") for config in configs)
