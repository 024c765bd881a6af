"""One row of a data set: questions become prompts, answers become golds."""

from collections.abc import Mapping
from typing import Any


def is_empty_prompt(prompt: Any) -> bool:
    """Whether a prompt (string or chat) is missing or says nothing."""
    if isinstance(prompt, str):
        return not prompt.strip()
    return not prompt or all(not message.get("content") for message in prompt if isinstance(message, Mapping))


def is_empty_gold(gold: Any) -> bool:
    """Whether a row has no gold answer."""
    return gold is None or (isinstance(gold, str) and not gold.strip()) or gold == []


def as_gold(gold: Any) -> Any:
    """The gold answer as it is given, numbers as text."""
    return str(gold) if isinstance(gold, (int, float)) else gold


def as_prompt(question: Any, instruction: str | None, system_prompt: str | None, always_chat: bool) -> Any:
    """A question (string or chat, None stays None) as the prompt that is trained on.

    Args:
        question: as the data set has it.
        instruction: appended to the last message on a new line.
        system_prompt: first message of a chat that has none.
        always_chat: whether a string becomes a chat without a system prompt too.
    """
    if question is None:
        return None
    if isinstance(question, str):
        text = _with_instruction(question, instruction) if instruction else question
        if not always_chat and system_prompt is None:
            return text
        messages = [{"role": "user", "content": text}]
    else:
        messages = [dict(message) for message in question]
        if instruction:
            messages[-1]["content"] = _with_instruction(messages[-1]["content"], instruction)
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _with_instruction(content: Any, instruction: str) -> Any:
    """Content is a string, or a list of typed parts as multimodal templates have it."""
    return (
        f"{content}\n{instruction}" if isinstance(content, str) else [*content, {"type": "text", "text": instruction}]
    )
