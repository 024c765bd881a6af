"""How TRL calls a reward function, for those who call one themselves."""

from collections.abc import Callable, Sequence
from typing import Any

# TRL passes its own values under these names; a column of the data set with one of them never arrives.
_NOT_PASSED_ON = ("prompt", "completion", "completion_ids")


def reward_arguments(
    examples: Sequence[dict[str, Any]],
    completions: list[Any],
    completion_ids: list[list[int]],
    trainer_state: Any,
    *,
    log_extra: Callable[..., None],
    log_metric: Callable[..., None],
) -> dict[str, Any]:
    """The keyword arguments of one call, as TRL's trainers give them.

    Args:
        examples: rows of the data set, one per completion, all with the same columns.
        completions: texts, or lists of one message where the prompts are chats.
        completion_ids: the same as token ids.
        trainer_state: of transformers.
        log_extra: receives a column for the completions table.
        log_metric: receives a number.

    Returns:
        Prompts, completions, the columns of the data set as lists, and the rest by its name.
    """
    columns = {name: [example[name] for example in examples] for name in examples[0] if name not in _NOT_PASSED_ON}
    return {
        "prompts": [example["prompt"] for example in examples],
        "completions": completions,
        "completion_ids": completion_ids,
        "trainer_state": trainer_state,
        "log_extra": log_extra,
        "log_metric": log_metric,
        **columns,
    }
