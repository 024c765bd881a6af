"""A verifier that compares strings, for answers with one way of writing them."""

import re
from collections.abc import Sequence
from typing import Any

from sg_opd_trl.verifiers.extraction import completion_text, final_text, gold_text, last_box, require_same_length

_SPACING = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;:]|\\\s|~|\s")
_SHORT_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_THOUSANDS = re.compile(r"^-?\d{1,3}(?:,\d{3})+(?:\.\d+)?$")


def normalise(answer: str) -> str:
    r"""Returns an answer with everything removed that changes its looks only.

    Removed are dollar signs, white space and LaTeX spacing, `\left` and `\right`, full stops at the end and the commas
    between thousands; `\dfrac` and `\tfrac` become `\frac`.
    """
    text = _SHORT_FRACTION.sub(r"\\frac", _SPACING.sub("", answer.replace("\\$", "").replace("$", "")))
    text = text.rstrip(".")
    return text.replace(",", "") if _THOUSANDS.match(text) else text


def exact_match_reward(completions: Sequence[Any], solution: Sequence[Any], **kwargs: Any) -> list[float | None]:
    r"""Compares the boxed answer with the gold answer as normalised strings.

    The answer is found as in `extraction`, except that a completion without `\boxed{...}` has none.

    Args:
        completions: strings or lists of chat messages, one per rollout.
        solution: gold answers, one per completion: strings, numbers or `None`.
        **kwargs: other columns of the data set; unused.

    Returns:
        1.0 for an equal answer, 0.0 for a different or missing one, `None` where there is no gold answer.

    Raises:
        VerifierError: If the lengths differ or an entry has a type that cannot be read.
    """
    require_same_length(completions, solution)
    return [_compare(completion, gold) for completion, gold in zip(completions, solution, strict=True)]


def _compare(completion: Any, solution: Any) -> float | None:
    gold = gold_text(solution)
    if gold is None:
        return None
    answer = last_box(final_text(completion_text(completion)))
    if not answer:
        return 0.0
    box = last_box(gold)
    return float(normalise(answer) == normalise(gold if box is None else box))
