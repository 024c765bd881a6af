"""How TRL calls a reward function, for those who call one themselves."""

from collections.abc import Callable, Sequence
from typing import Any

# TRL passes its own values under these names; a column of the data set with one of them never arrives.
# Attributes of a tokenizer that say how to read a response, the newer one first.
_RESPONSE_SCHEMAS = ("response_template", "response_schema")
_NOT_PASSED_ON = ("prompt", "completion", "completion_ids")


def read_completions(
    tokenizer: Any,
    prompts: Sequence[Any],
    completion_ids: Sequence[list[int]],
    render: Callable[[list], Sequence[list[int]]],
) -> list[Any]:
    """Completions as TRL hands the student's to reward functions, so that the same ids always get the same verdict.

    Args:
        tokenizer: of the student; one with a response schema reads an answer apart from the thinking before it.
        prompts: what each completion answers, strings or chats.
        completion_ids: token ids of each.
        render: prompts -> token ids; only asked where a schema needs the words before the answer.

    Returns:
        Texts, or lists of one message where the prompts are chats.
    """
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True) if completion_ids else []
    messages = [{"role": "assistant", "content": text} for text in texts]
    if messages and any(getattr(tokenizer, name, None) is not None for name in _RESPONSE_SCHEMAS):
        from ..trl_seam import parse_response  # here: an evaluation does without TRL otherwise

        before = render(list(prompts))
        messages = [
            parse_response(tokenizer, ids, prefix=own) for own, ids in zip(before, completion_ids, strict=True)
        ]
    # A prompt that is a string is answered by one.
    triples = zip(prompts, texts, messages, strict=True)
    return [text if isinstance(prompt, str) else [message] for prompt, text, message in triples]


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
