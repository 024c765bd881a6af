"""The verifiers as TRL reward functions: `math_reward` judges mathematics, `exact_match_reward` compares strings."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .extraction import (
    answer_parts,
    answer_text,
    completion_text,
    final_text,
    gold_answer,
    gold_text,
    last_box,
    require_same_length,
)
from .judge import Judge, Judgement, NoVerdictReason
from .kinds import Outcome, Question, Settled, decide

# One for the process: its child takes a second to start, and its cache serves every trainer. Nothing starts here.
_JUDGE = Judge()
_NO_GOLD = Judgement(None, "gold")
# Why there is no verdict -> the metric that counts such completions.
_NO_VERDICT: dict[NoVerdictReason, str] = {
    "gold": "verifier/no_verdict_gold",
    "timeout": "verifier/no_verdict_timeout",
    "wall_timeout": "verifier/no_verdict_wall_timeout",
    "memory": "verifier/no_verdict_memory",
    "crash": "verifier/no_verdict_crash",
    "unsure": "verifier/no_verdict_unsure",
}
# Signs of an answer in several parts; the comma in 1,000 is none.
_SEVERAL = re.compile(r",(?!\d{3}(?!\d))|;|\\pm|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])")

# `\left(` is spacing, `\leftarrow` is not: hence the look-aheads.
_SPACING = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;:]|\\\s|~|\s")
_SHORT_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
# Groups of three only: "1,2" is a pair and keeps its comma.
_THOUSANDS = re.compile(r"^-?\d{1,3}(?:,\d{3})+(?:\.\d+)?$")


def math_reward(
    completions: Sequence[Any],
    solution: Sequence[Any],
    *,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""Judges the final answer of each completion against its gold answer with math-verify.

    The answer is the last `\boxed{...}` after the last `</think>`; `extraction` states the rule in full. It is judged
    in a child process within `Judge`'s default limits, with the same result from every thread.

    Logged: the column `answer` (the extracted answer); `verifier/timeouts` and `verifier/abstained`, the shares of the
    completions whose judging ran out of time and of those without a verdict for whatever reason; the numbers of the
    latter by reason, `verifier/no_verdict_gold`, `_timeout` (processor time), `_wall_timeout`, `_memory` and `_crash`.

    Args:
        completions: strings or lists of chat messages, one per rollout.
        solution: gold answers, one per completion: strings, numbers or `None`.
        log_extra: TRL's function to log a column of the completions table.
        log_metric: TRL's function to log a number.
        **kwargs: other columns of the data set; unused.

    Returns:
        Per completion 1.0 (right), 0.0 (wrong, or no answer given) or `None`: no gold answer, a gold answer that
        cannot be parsed, judging that ran out of time or memory, or a child that died twice at this answer.

    Raises:
        VerifierError: If the lengths differ, an entry has a type that cannot be read, or math-verify is missing.

    Example:
        >>> math_reward([r"So it is \boxed{0.5}", r"It is \boxed{2}"], [r"\frac{1}{2}", "3"])
        [1.0, 0.0]
    """
    require_same_length(completions, solution)
    texts = [completion_text(completion) for completion in completions]
    judgements = _judge(texts, [gold_text(gold) for gold in solution])
    if log_extra is not None:
        log_extra("answer", [_shown(text, item) for text, item in zip(texts, judgements, strict=True)])
    if log_metric is not None and judgements:
        reasons = Counter(item.reason for item in judgements)
        log_metric("verifier/timeouts", (reasons["timeout"] + reasons["wall_timeout"]) / len(judgements))
        log_metric("verifier/abstained", sum(item.verdict is None for item in judgements) / len(judgements))
        for reason, name in _NO_VERDICT.items():
            log_metric(name, float(reasons[reason]))
    return [None if item.verdict is None else float(item.verdict) for item in judgements]


def exact_match_reward(
    completions: Sequence[Any],
    solution: Sequence[Any],
    *,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""Compares the boxed answer with the gold answer as normalised strings, for answers with one way of writing them.

    The answer is found as in `extraction`, except that a completion without `\boxed{...}` has none.

    Logged: `verifier/abstained`, the share of the completions without a verdict, and `verifier/no_verdict_gold`, their
    number: there is no other reason than a missing gold answer.

    Args:
        completions: strings or lists of chat messages, one per rollout.
        solution: gold answers, one per completion: strings, numbers or `None`.
        log_metric: TRL's function to log a number.
        **kwargs: other columns of the data set; unused.

    Returns:
        1.0 for an equal answer, 0.0 for a different or missing one, `None` where there is no gold answer.

    Raises:
        VerifierError: If the lengths differ or an entry has a type that cannot be read.
    """
    require_same_length(completions, solution)
    verdicts = [_compare(completion, gold) for completion, gold in zip(completions, solution, strict=True)]
    if log_metric is not None and verdicts:
        log_metric("verifier/abstained", verdicts.count(None) / len(verdicts))
        log_metric(_NO_VERDICT["gold"], float(verdicts.count(None)))
    return verdicts


def normalise(answer: str) -> str:
    r"""Returns an answer with everything removed that changes its looks only.

    Removed are dollar signs, white space and LaTeX spacing, `\left` and `\right`, full stops at the end and the commas
    between thousands; `\dfrac` and `\tfrac` become `\frac`.
    """
    text = _SHORT_FRACTION.sub(r"\\frac", _SPACING.sub("", answer.replace("\\$", "").replace("$", "")))
    text = text.rstrip(".")
    return text.replace(",", "") if _THOUSANDS.match(text) else text


def _judge(texts: Sequence[str], golds: Sequence[str | None]) -> list[Judgement]:
    plans = [[] if gold is None else _outcomes(gold, text) for gold, text in zip(golds, texts, strict=True)]
    judgements = _ask(plans)
    # Where math-verify had to look for the answer, what it found is judged as if it stood in a box.
    again = {
        place: [_as_math(decide(right, judgement.answer))]
        for place, (gold, text, judgement) in enumerate(zip(golds, texts, judgements, strict=True))
        if gold is not None and judgement.answer and answer_parts(text) is None and (right := gold_answer(gold))
    }
    for place, judgement in zip(again, _ask(list(again.values())), strict=True):
        judgements[place] = judgement._replace(answer=judgements[place].answer)
    return judgements


def _ask(plans: list[list[Outcome]]) -> list[Judgement]:
    # One request for the whole batch: most pairs are settled by their text, the rest is asked of the child together.
    questions = [outcome for plan in plans for outcome in plan if isinstance(outcome, Question)]
    found = iter(_JUDGE.judge([(question.gold, question.answer) for question in questions]))
    judged = [[_judgement(outcome, found) for outcome in plan] for plan in plans]
    return [_together(parts) if parts else _NO_GOLD for parts in judged]


def _outcomes(gold: str, text: str) -> list[Outcome]:
    """What there is to find out about one completion; all of it must be right."""
    right, parts = gold_answer(gold), answer_parts(text)
    if parts == []:
        return [Settled(False)]
    if right is None or parts is None:
        return [Question(gold, answer_text(text))]
    # Several boxes are one answer to a question with several answers. For a single one each of them must be right.
    said = [", ".join(parts)] if len(parts) > 1 and _SEVERAL.search(right) else parts
    return [_as_math(decide(right, part)) for part in said]


def _as_math(outcome: Outcome) -> Outcome:
    if isinstance(outcome, Settled):
        return outcome
    return outcome._replace(gold=f"${outcome.gold}$", answer=f"\\boxed{{{outcome.answer}}}")


def _judgement(outcome: Outcome, found: Iterator[Judgement]) -> Judgement:
    if isinstance(outcome, Settled):
        return Judgement(outcome.verdict, "unsure" if outcome.verdict is None else "")
    judgement = next(found)
    if judgement.verdict is None:
        return judgement
    verdict = outcome.equal if judgement.verdict else outcome.different
    return judgement._replace(verdict=verdict, reason="unsure" if verdict is None else "")


def _together(parts: list[Judgement]) -> Judgement:
    """One judgement of several boxes: the first wrong one, else the first without verdict, else the first."""
    return min(parts, key=lambda part: {False: 0, None: 1, True: 2}[part.verdict])


def _shown(text: str, judgement: Judgement) -> str:
    parts = answer_parts(text)
    return judgement.answer if parts is None else ", ".join(parts)


def _compare(completion: Any, solution: Any) -> float | None:
    gold = gold_text(solution)
    if gold is None:
        return None
    answer = last_box(final_text(completion_text(completion)))
    if not answer:
        return 0.0
    box = last_box(gold)
    return float(normalise(answer) == normalise(gold if box is None else box))
