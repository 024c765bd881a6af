r"""Which part of a completion is its answer.

The rule, in this order:

1. Only the text after the last `</think>` counts, where there is one.
2. The answer is the content of the last `\boxed{...}` of that text; `\fbox{...}` and `\boxed 5` are boxes, too. Braces
   are matched; `\{` and `\}` do not count. Boxes with nothing but "and", "or" or a comma between are one answer.
3. If the last `\boxed{` never closes, the completion was cut off and has no answer. An earlier box is not taken
   instead: the text was about to replace it.
4. Without any box, a text that ends in "Answer: **73**" answers 73; else math-verify looks for an answer itself ("the
   answer is $12$" gives 12).
"""

import re
from collections.abc import Sequence
from typing import Any

from ..errors import VerifierError
from .notation import closing

_END_OF_THOUGHT = "</think>"
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*(?:\{|(?=[-+]?\.?\d|\\[a-zA-Z]))")
# What a box without braces holds: TeX would take one digit, the writer meant the number.
_UNBRACED = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+|\\[a-zA-Z]+(?:\s*\{[^{}]*\}){0,2}")
_BETWEEN_BOXES = re.compile(
    r"\\(?:text|quad|qquad)(?![a-zA-Z])|\\[()\[\],;: ]|[${}*\s]|(?<![a-zA-Z])[a-zA-Z](?:_\w)?\s*="
)
_TOGETHER = frozenset({",", ";", "and", "or", ",and", ",or", "&"})
_MAX_BETWEEN = 60  # characters between two boxes of one answer
_MAX_BOXES = 32
_STATED = re.compile(
    r"answer\s*(?:is)?\s*:?\s*\**\s*:?\s*(\\?\$?[-+]?\d[\d,]*(?:\.\d+)?\\?%?)\s*\**\s*\.?\s*$", re.IGNORECASE
)
_GSM8K_ANSWER = "####"
# What data sets write where there is no answer to compare with. Repeating it is no answer either.
_SENTINELS = frozenset({"proof", "notfound", "n/a", "none", "null", "nan", "unknown", "-", "?"}) | {
    "not found",
    "see solution",
    "see proof",
}


def completion_text(completion: Any) -> str:
    """Returns the text of a completion.

    Args:
        completion: a string, or a list of chat messages of which the last assistant message counts. The content of a
            message is a string, `None` (a mere tool call) or a list of parts of which those with a `text` count.

    Returns:
        The text; empty if there is no assistant message.

    Raises:
        VerifierError: If the completion has another type.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, list) or not all(isinstance(message, dict) for message in completion):
        raise VerifierError(
            f"`completions` must hold strings or lists of chat messages, got {type(completion).__name__}. "
            "Because the answer is read from text. Set each to a string or to [{'role': 'assistant', 'content': ...}]."
        )
    spoken = [message.get("content") for message in completion if message.get("role") == "assistant"]
    return _content_text(spoken[-1]) if spoken else ""


def _content_text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    raise VerifierError(
        f"the `content` of a message must be a string, a list of parts or None, got {type(content).__name__}. "
        "Because the answer is read from text. Set it to the text of the message."
    )


def final_text(text: str) -> str:
    """Returns what follows the last `</think>`, or the whole text if there is none."""
    return text.rpartition(_END_OF_THOUGHT)[2]


def last_box(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}`.

    Args:
        text: any text.

    Returns:
        The content without surrounding white space; "" if the last box is empty or never closes; `None` if the text
        has no box at all.
    """
    boxes = last_boxes(text)
    return None if boxes is None else boxes[-1]


def last_boxes(text: str) -> list[str] | None:
    r"""Returns the contents of the last boxes that are one answer, such as `\boxed{3}, \boxed{5} and \boxed{7}`.

    Args:
        text: any text.

    Returns:
        At least one content, in the order of the text and none twice in a row; `[""]` if the last box is empty or
        never closes; `None` if the text has no box at all.
    """
    starts = list(_BOX.finditer(text))
    if not starts:
        return None
    contents: list[str] = []
    later = len(text)
    for match in reversed(starts[-_MAX_BOXES:]):
        content, end = _box(text, match.end())
        if contents and not (content and _is_together(text, end, later)):
            break
        later = match.start()
        if not contents or contents[-1] != content:
            contents.append(content)
        if not content:
            break
    return contents[::-1]


def _box(text: str, start: int) -> tuple[str, int]:
    if text[start - 1] != "{":
        match = _UNBRACED.match(text, start)
        return ("", len(text)) if match is None else (match.group(), match.end())
    end = closing(text, start)
    return ("", len(text)) if end is None else (text[start:end].strip(), end + 1)


def _is_together(text: str, end: int, later: int) -> bool:
    return 0 <= later - end <= _MAX_BETWEEN and _BETWEEN_BOXES.sub("", text[end:later]) in _TOGETHER


def answer_parts(text: str) -> list[str] | None:
    """Returns the answer of a completion, in as many parts as it was given in.

    Args:
        text: a completion.

    Returns:
        The contents of its last boxes or the number that it ends in; empty for a box that is empty or never closes;
        `None` where math-verify has to look for an answer.
    """
    final = final_text(text)
    boxes = last_boxes(final)
    if boxes is not None:
        return [box for box in boxes if box]
    stated = _STATED.search(final[-_MAX_BETWEEN * 2 :])
    return None if stated is None else [stated[1]]


def answer_text(text: str) -> str:
    r"""Returns what math-verify is asked to read an answer from.

    Args:
        text: a completion.

    Returns:
        The answer as `\boxed{...}`; "" for a box that is empty or never closes; the text after the last `</think>` if
        it has no box.
    """
    parts = answer_parts(text)
    if parts is None:
        return final_text(text).strip()
    return f"\\boxed{{{', '.join(parts)}}}" if parts else ""


def gold_text(solution: Any) -> str | None:
    r"""Returns what math-verify is asked to read the gold answer from.

    A bare gold answer is wrapped in `$...$`, without which forms such as `(1,2)` or `x+1` are not recognised. A gold
    solution with a box is cut down to its last box, one of GSM8K to what follows its last `####`.

    Args:
        solution: one entry of the column `solution`: a string, an integer, a float or `None`.

    Returns:
        The text, or `None` if there is no gold answer: `None`, empty, a box that is empty or never closes, or a word
        such as "proof" or "N/A" that stands where no answer is known.

    Raises:
        VerifierError: If the entry has another type.
    """
    if solution is None:
        return None
    if not isinstance(solution, str | int | float):
        raise VerifierError(
            f"`solution` must hold strings, numbers or None, got {type(solution).__name__}. Because it is compared "
            "with the answer of one completion. Set it to the gold answer as text, such as '\\frac{1}{2}'."
        )
    text = str(solution).strip()
    box = last_box(text)
    if box is None:
        text = text.rpartition(_GSM8K_ANSWER)[2].strip()
    if _bare(text if box is None else box) in _SENTINELS:
        return None
    if box is not None:
        return f"\\boxed{{{box}}}" if box else None
    signs = _DOLLAR.findall(text)
    if len(signs) == 1:
        text = _DOLLAR.sub(r"\\$", text)  # an amount of money
    elif signs or not text or "\\boxed" in text:
        return text or None
    return f"${text}$"


_DOLLAR = re.compile(r"(?<!\\)\$")
_IN_FONT = re.compile(r"\\(?:text|mathrm|textbf)\s*\{([^{}]*)\}")


def _bare(text: str) -> str:
    return _IN_FONT.sub(r"\1", text).strip("$ .()[]").lower()


def gold_answer(text: str) -> str | None:
    """Returns the answer inside what `gold_text` returned; None if it is a text with formulas somewhere in it."""
    box = last_box(text)
    if box is not None:
        return box
    inner = text.rstrip(".").removeprefix("$").removesuffix("$")
    return None if _DOLLAR.search(inner) or len(inner) + 2 > len(text.rstrip(".")) else inner.strip() or None


def require_same_length(completions: Sequence[Any], solution: Any) -> None:
    """Checks that there is one gold answer per completion.

    Raises:
        VerifierError: If `solution` is no list or has another length than `completions`.
    """
    if not isinstance(solution, list | tuple) or len(solution) != len(completions):
        got = f"{len(solution)} entries" if isinstance(solution, list | tuple) else type(solution).__name__
        raise VerifierError(
            f"`solution` must be a list of {len(completions)} entries, one per completion, got {got}. Because each "
            "completion is judged against its own gold answer. Set entries without one to None."
        )
