"""Settings of the engine that writes the student's rollouts (`use_vllm`), checked before it starts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .data import first_rows
from .errors import SGOPDConfigError

if TYPE_CHECKING:
    from .config import SGOPDConfig

_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
_PROMPTS = 8


def engine_problems(config: "SGOPDConfig") -> Iterator[str]:
    """What is wrong with a configuration's vLLM settings, one message each; nothing without `use_vllm`."""
    if not config.use_vllm:
        return
    room, needed = _room(config), config.max_completion_length
    if room is not None and needed is not None and room <= needed:
        yield _no_room(room, needed + 1, "a prompt of one token and `max_completion_length`")
    if not config.vllm_importance_sampling_correction:
        return
    mode = config.vllm_importance_sampling_mode
    if mode not in _MODES:
        yield (
            f"`vllm_importance_sampling_mode` must be one of {', '.join(_MODES)}, got {mode!r}. It says what happens "
            "to tokens that vLLM and the student see differently. Set it to 'token_truncate', the default."
        )
    yield from _wrong_bounds(config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max)


def _wrong_bounds(lowest: float | None, highest: float | None) -> Iterator[str]:
    # The negated comparisons are true for NaN as well.
    if highest is not None and not highest >= 1:
        yield (
            f"`vllm_importance_sampling_clip_max` must be at least 1, got {highest}. The ratio is 1 where vLLM and "
            "the student agree, and a smaller cap would shrink every token. Set it to 5.0, the default."
        )
    if lowest is not None and not 0 <= lowest <= 1:
        yield (
            f"`vllm_importance_sampling_clip_min` must be in [0, 1], got {lowest}. The ratio is 1 where vLLM and the "
            "student agree, and a larger bound would change every token. Leave it out."
        )


def check_prompt_room(config: Any, longest_prompt: int | None, source: str) -> None:
    """Refuse a colocated engine whose context a prompt with a full completion does not fit in.

    Args:
        config: of the run.
        longest_prompt: in tokens, None if it is not known.
        source: where that length comes from, for the message.

    Raises:
        SGOPDConfigError: names the length that is needed.
    """
    room = _room(config)
    if room is None or longest_prompt is None:
        return
    needed = longest_prompt + (config.max_completion_length or 0)
    if needed > room:
        raise SGOPDConfigError(_no_room(room, needed, f"{source} and `max_completion_length`"))


def check_rollout_engine(trainer: Any) -> None:
    """Hold the first prompts of the data set against the engine's context.

    Raises:
        SGOPDConfigError: they do not fit.
    """
    if _room(trainer.args) is None or trainer.environment_factories:
        return
    prompts = trainer.tokenize_prompts([row["prompt"] for row in first_rows(trainer.train_dataset)[:_PROMPTS]])
    check_prompt_room(trainer.args, max(map(len, prompts), default=0), f"the longest of the first {_PROMPTS} prompts")


def _room(config: Any) -> int | None:
    """The engine's context where the settings decide about it; in server mode it is the server's own."""
    colocated = getattr(config, "use_vllm", False) and config.vllm_mode == "colocate"
    return config.vllm_max_model_length if colocated else None


def _no_room(room: int, needed: int, source: str) -> str:
    return (
        f"`vllm_max_model_length` must be at least {needed}, got {room}: {source} take {needed} tokens. "
        "vLLM would cut completions short and refuse longer prompts. Raise it, or lower `max_completion_length` or "
        "`max_prompt_tokens`."
    )
