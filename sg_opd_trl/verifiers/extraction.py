r"""Which part of a completion is its answer.

The rule, in this order:

1. Only the text after the last `</think>` counts, where there is one.
2. The answer is the content of the last `\boxed{...}` of that text. Braces are matched; `\{` and `\}` do not count.
3. If the last `\boxed{` never closes, the completion was cut off and has no answer. An earlier box is not taken
   instead: the text was about to replace it.
4. Without any `\boxed{`, math-verify looks for an answer itself ("the answer is $12$" gives 12).
"""

import re
from collections.abc import Sequence
from typing import Any

from ..errors import VerifierError

_END_OF_THOUGHT = "</think>"
_BOX = re.compile(r"\\boxed\s*\{")
# Words that math-verify would read as a product of letters, so that "\\text{True}" would be wrong for "True".
_TRUTH_WORDS = frozenset({"true", "false", "yes", "no"})
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


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
        has no `\boxed{` at all.
    """
    starts = [match.end() for match in _BOX.finditer(text)]
    if not starts:
        return None
    end = _closing_brace(text, starts[-1])
    return "" if end is None else text[starts[-1] : end].strip()


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for match in _BRACE.finditer(text, start):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
        if depth == 0:
            return match.start()
    return None


def answer_text(text: str) -> str:
    r"""Returns what math-verify is asked to read an answer from.

    Args:
        text: a completion.

    Returns:
        The last box as `\boxed{...}`; "" for a box that is empty or never closes; the text after the last `</think>`
        if it has no box.
    """
    final = final_text(text)
    box = last_box(final)
    if box is None:
        return final.strip()
    return f"\\boxed{{{box}}}" if box else ""


def gold_text(solution: Any) -> str | None:
    r"""Returns what math-verify is asked to read the gold answer from.

    A bare gold answer is wrapped in `$...$`, without which forms such as `(1,2)` or `x+1` are not recognised. A gold
    solution with a box is cut down to its last box.

    Args:
        solution: one entry of the column `solution`: a string, an integer, a float or `None`.

    Returns:
        The text, or `None` if there is no gold answer (`None`, empty, a box that is empty or never closes) or it is a
        word such as True or No, which is no mathematical expression.

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
    if box is not None:
        return f"\\boxed{{{box}}}" if box else None
    if text.strip("$").lower() in _TRUTH_WORDS:
        return None
    if not text or "$" in text or "\\boxed" in text:
        return text or None
    return f"${text}$"


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
