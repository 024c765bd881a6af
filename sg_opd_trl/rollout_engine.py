"""Settings of the engine that writes the student's rollouts (`use_vllm`), checked before it starts."""

from collections.abc import Iterator
from typing import Any

from .data import PROMPTS_RENDERED, first_prompts
from .errors import SGOPDConfigError


def engine_problems(config: Any, longest_prompt: int = 1, source: str = "a prompt of one token") -> Iterator[str]:
    """What is wrong with a colocated engine's context: a prompt with a full completion must fit in.

    Args:
        config: of the run.
        longest_prompt: in tokens.
        source: where that length comes from, for the message.
    """
    # Other methods have no rollouts; in server mode the context is the server's own.
    if not getattr(config, "use_vllm", False) or config.vllm_mode != "colocate":
        return
    room, needed = config.vllm_max_model_length, longest_prompt + (config.max_completion_length or 0)
    if room is not None and needed > room:
        yield (
            f"`vllm_max_model_length` must be at least {needed}, got {room}: {source} and `max_completion_length` "
            f"take {needed} tokens. vLLM would cut completions short and refuse longer prompts. Raise it, or lower "
            "`max_completion_length` or `max_prompt_tokens`."
        )


def check_prompt_room(config: Any, longest_prompt: int | None, source: str) -> None:
    """Refuse what `engine_problems` finds; nothing if the longest prompt is not known.

    Raises:
        SGOPDConfigError: names the length that is needed.
    """
    for problem in engine_problems(config, longest_prompt, source) if longest_prompt is not None else ():
        raise SGOPDConfigError(problem)


def check_rollout_engine(trainer: Any) -> None:
    """Hold the first prompts of the data set against the engine's context.

    Raises:
        SGOPDConfigError: they do not fit.
    """
    if not trainer.args.use_vllm or trainer.environment_factories:
        return
    prompts = trainer.tokenize_prompts(first_prompts(trainer.train_dataset))
    longest = max(map(len, prompts), default=0)
    check_prompt_room(trainer.args, longest, f"the longest of the first {PROMPTS_RENDERED} prompts")
