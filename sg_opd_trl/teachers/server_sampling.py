"""Sampling settings of this package -> those of a completion request."""

from collections.abc import Mapping
from typing import Any

from ..errors import SGOPDConfigError
from .base import Sampling

# Fields of `transformers.GenerationConfig` -> those of a request.
_REQUEST_FIELDS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
_SUPPRESSED = "suppress_tokens"
# A logit this much lower is never drawn; vLLM takes none beyond.
_NEVER = -100.0


def request_settings(sampling: Sampling, vocab_size: int) -> dict[str, Any]:
    """The sampling settings of a completion request.

    Every one that a server has a default for is there: it may have taken its own from the model's files.

    Args:
        sampling: of the trainer.
        vocab_size: ids from here on cannot be named to the server.

    Raises:
        SGOPDConfigError: a field of `generation_kwargs` that vLLM has nothing for.
    """
    given = dict(sampling.generation_kwargs)
    check_generation_kwargs(given)
    suppressed = given.pop(_SUPPRESSED, None) or ()
    settings = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(sampling.eos_token_ids),
        # The teacher's own end tokens end nothing: the student's do.
        "ignore_eos": True,
    }
    settings |= {_REQUEST_FIELDS[name]: value for name, value in given.items()}
    settings["min_p"] = settings["min_p"] or 0.0
    bias = {str(token): _NEVER for token in suppressed if token < vocab_size}
    return settings | ({"logit_bias": bias} if bias else {})


def check_generation_kwargs(given: Mapping[str, Any]) -> None:
    """Refuse fields that a server would not sample by.

    Raises:
        SGOPDConfigError: names them.
    """
    odd = sorted(given.keys() - _REQUEST_FIELDS.keys() - {_SUPPRESSED})
    if odd:
        raise SGOPDConfigError(
            f"`generation_kwargs` must hold {', '.join([*_REQUEST_FIELDS, _SUPPRESSED])} and nothing else with a "
            f"teacher server that generates, got {odd}. The teacher samples as the student does, and vLLM has no such "
            "setting. Leave them out, or set teacher_sampling_enable=False."
        )
