"""Rollouts of the caller's own function: one per prompt, ids that exist, and none without a token that counts.

TRL takes what `rollout_func` returns as it comes. A list that is too short is blamed on the reward function, and a
completion without a token ends the run with an index that is out of range.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from .errors import DataError

# One entry per rollout; whatever else a function returns goes to the reward functions.
_LISTS = ("prompt_ids", "completion_ids", "logprobs")
_OPTIONAL = "env_mask"


def checked_rollouts(function: Callable[..., Mapping[str, Any]], end: int, size: int) -> Callable[..., dict[str, Any]]:
    """A `rollout_func` whose rollouts can be trained on.

    Args:
        function: the caller's; `(prompts, trainer) -> {"prompt_ids", "completion_ids", "logprobs", ...}`.
        end: id of an end token. It stands where a rollout has no token at all, with `env_mask` 0: the verifier judges
            an empty text, and no loss, weight or metric counts the row.
        size: of the student's vocabulary.

    Returns:
        The function; it raises `DataError`, which names the rollout and what is wrong with it.
    """

    @wraps(function)
    def checked(prompts: Sequence[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        written = dict(function(prompts, *args, **kwargs))
        for name in (*_LISTS, _OPTIONAL):
            # What is missing altogether is TRL's to tell.
            rows = written.get(name)
            if rows is not None and len(rows) != len(prompts):
                raise DataError(
                    f"`rollout_func` must return one rollout per prompt, got {len(rows)} entries in `{name}` for "
                    f"{len(prompts)} prompts. A prompt is there once for each of its rollouts; return them in order."
                )
        if "completion_ids" not in written:
            return written
        _check_ids(written, size)
        return _without_empty(written, end)

    return checked


def _check_ids(written: Mapping[str, Any], size: int) -> None:
    for name in ("prompt_ids", "completion_ids"):
        for row, ids in enumerate(written.get(name, ())):
            beyond = [token for token in ids if not 0 <= int(token) < size]
            if beyond:
                raise DataError(
                    f"`rollout_func` must return ids of the student's vocabulary, 0 to {size - 1}, got "
                    f"{int(beyond[0])} in `{name}` of rollout {row}. Write its text with the student's tokenizer."
                )


def _without_empty(written: dict[str, Any], end: int) -> dict[str, Any]:
    empty = [row for row, ids in enumerate(written["completion_ids"]) if len(ids) == 0]
    if not empty:
        return written
    ids, logprobs = list(written["completion_ids"]), written.get("logprobs")
    mask = written.get(_OPTIONAL)
    mask = [[1] * len(row) for row in ids] if mask is None else list(mask)
    logprobs = None if logprobs is None else list(logprobs)
    for row in empty:
        ids[row], mask[row] = [end], [0]
        if logprobs is not None:
            logprobs[row] = [0.0]
    return written | {"completion_ids": ids, "logprobs": logprobs, _OPTIONAL: mask}
