"""`math_reward`: the verifier of mathematical answers as a TRL reward function."""

from collections.abc import Callable, Sequence
from typing import Any

from sg_opd_trl.verifiers.extraction import answer_text, completion_text, gold_text, last_box, require_same_length
from sg_opd_trl.verifiers.judge import Judge, Judgement

_JUDGE = Judge()
_NO_GOLD = Judgement(None, "gold")


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
    completions whose judging ran out of time and of those without a verdict for whatever reason.

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
    answers = [answer_text(completion_text(completion)) for completion in completions]
    judgements = _judge(answers, [gold_text(gold) for gold in solution])
    if log_extra is not None:
        log_extra("answer", [_shown(answer, item) for answer, item in zip(answers, judgements, strict=True)])
    if log_metric is not None and judgements:
        timeouts = sum(item.reason in ("timeout", "wall_timeout") for item in judgements)
        log_metric("verifier/timeouts", timeouts / len(judgements))
        log_metric("verifier/abstained", sum(item.verdict is None for item in judgements) / len(judgements))
    return [None if item.verdict is None else float(item.verdict) for item in judgements]


def _judge(answers: Sequence[str], golds: Sequence[str | None]) -> list[Judgement]:
    pairs = [(gold, answer) for gold, answer in zip(golds, answers, strict=True) if gold is not None]
    found = iter(_JUDGE.judge(pairs))
    return [_NO_GOLD if gold is None else next(found) for gold in golds]


def _shown(answer: str, judgement: Judgement) -> str:
    box = last_box(answer)
    return judgement.answer if box is None else box
