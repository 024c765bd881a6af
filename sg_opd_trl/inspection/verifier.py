"""Does the verifier say yes to the data's own golds, and no to a wrong answer? And which golds can it not read?

An answer is made of a gold in the ways that verifiers read answers; the way that the verifier says yes to most often
is taken for its own.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..data import flat_prompt, required_columns
from ..verifiers import exact_match_reward, math_reward
from .report import Row

Judge = Callable[[Sequence[dict], Sequence[str]], Sequence[float | None]]
"""`(rows of the data set, an answer to each) -> verdicts`: 1 right, 0 wrong, None no verdict."""

GOLDS_TRIED = 20
"""Golds that the verifier must say yes to, and beside which it is given a wrong answer (our choice)."""
GOLDS_COUNTED = 200
"""Golds of each data set that are counted by verdict (our choice): as many as take a built-in verifier a second or
two. Of others, which may ask a model, the first `GOLDS_TRIED`."""
_WAYS = ("\\boxed{{{}}}", "{}", "The answer is {}.", "#### {}", "<answer>{}</answer>")
# In every way of writing: nobody asks for it, and it is neither a letter nor near zero.
_WRONG = "-86028121"
# A gold that is a text as long as this and stands in the prompt is no answer to it.
_LONG = 20
_SHOWN = 3


def gold_column(verifier: Any) -> str | None:
    """The column that a verifier compares answers with; None where its parameters do not tell."""
    parameters = inspect.signature(verifier).parameters
    if "solution" in parameters:
        return "solution"
    required = required_columns([verifier])
    return required[0] if len(required) == 1 else None


def is_built_in(verifier: Any) -> bool:
    """Whether calling it costs nothing and changes nothing but its own child process."""
    return verifier in (math_reward, exact_match_reward)


def verifier_rows(
    name: str, judge: Judge, column: str | None, datasets: Mapping[str, Sequence[dict]], counted: int = GOLDS_COUNTED
) -> list[Row]:
    """What the verifier makes of right and wrong answers, and of the golds of each data set.

    Args:
        name: of the verifier.
        judge: asks it.
        column: of the golds; None where it is not known.
        datasets: rows by the data set's name, the training set first.
        counted: golds of each data set that are counted.
    """
    with_gold = {key: [row for row in rows if column in row][:counted] for key, rows in datasets.items()}
    tried = next(iter(with_gold.values()), [])[:GOLDS_TRIED]
    if column is None or not tried:
        return [
            Row(
                "verifier",
                "yellow",
                f"`{name}` takes no gold that is known here, so that it cannot be tried without rollouts.",
                "Look at the verdicts on the first rollouts below.",
            )
        ]
    try:
        way, verdicts = _own_way(judge, tried, column)
        wrong = [judge(tried, [each.format(_WRONG)] * len(tried)) for each in dict.fromkeys((way, _WAYS[0]))]
        rows = [_verifier_row(name, tried, column, verdicts, [one for part in wrong for one in part])]
        known = list(verdicts)
        for key, examples in with_gold.items():
            rest = examples[len(known) :]
            known += judge(rest, _answers(way, rest, column)) if rest else []
            rows += _gold_rows(key, examples, column, known)
            known = []
        return rows
    except Exception as error:  # noqa: BLE001  # the caller's function, which may raise anything
        return [
            Row(
                "verifier",
                "red",
                f"`{name}` ends in {type(error).__name__}: {str(error)[:300]}",
                "Mend it: a verifier answers 1, 0 or None for each completion.",
            )
        ]


def _own_way(judge: Judge, examples: Sequence[dict], column: str) -> tuple[str, Sequence[float | None]]:
    """The way of writing an answer that the verifier says yes to most often, and its verdicts."""
    best: tuple[str, Sequence[float | None]] | None = None
    for way in _WAYS:
        verdicts = judge(examples, _answers(way, examples, column))
        if best is None or _yes(verdicts) > _yes(best[1]):
            best = way, verdicts
        # Another way is for another verifier; one that says yes now and then reads this one.
        if _yes(verdicts):
            break
    if best is None:
        raise ValueError("there is no way to write an answer")
    return best


def _answers(way: str, examples: Iterable[dict], column: str) -> list[str]:
    return [way.format(example[column]) for example in examples]


def _yes(verdicts: Sequence[float | None]) -> int:
    return sum(verdict == 1 for verdict in verdicts)


def _verifier_row(
    name: str, examples: Sequence[dict], column: str, verdicts: Sequence[float | None], wrong: Sequence[float | None]
) -> Row:
    asked, yes = len(verdicts), _yes(verdicts)
    refused = [example[column] for example, verdict in zip(examples, verdicts, strict=True) if verdict == 0]
    if _yes(wrong):
        return Row(
            "verifier",
            "red",
            f"`{name}` says yes to a wrong answer ({_WRONG}) in {_yes(wrong)} of {len(wrong)} rows.",
            "Every rollout would be consensus. Mend it, or name another in `reward_funcs` (`verifier_reward_func`).",
        )
    if refused:
        return Row(
            "verifier",
            "red" if 2 * len(refused) >= asked else "yellow",
            f"`{name}` says no to {len(refused)} of {asked} golds of the data, such as {_quoted(refused[0])}.",
            "Right rollouts would be wrong. Set answer_column to the answers, or take a verifier that reads them.",
        )
    # No verdict at all is told with the golds.
    found = f"`{name}` says yes to {yes} of {asked} golds and no to a wrong answer."
    return Row("verifier", "green", found) if yes else Row("verifier", "red", found, _READABLE)


_READABLE = "Set answer_column to short final answers, or take a verifier that reads these."


def _gold_rows(key: str, examples: Sequence[dict], column: str, verdicts: Sequence[float | None]) -> list[Row]:
    golds = [example[column] for example in examples]
    unread = [number for number, verdict in enumerate(verdicts) if verdict is None]
    asked = [number for number, (gold, row) in enumerate(zip(golds, examples, strict=True)) if _is_question(gold, row)]
    if asked:
        return [
            Row(
                "golds",
                "red" if 2 * len(asked) >= len(golds) else "yellow",
                f"{len(asked)} of {len(golds)} golds of `{key}` stand in their own prompt, such as "
                f"{_quoted(golds[asked[0]])}.",
                "Set answer_column to the column of the answers.",
            )
        ]
    if not unread:
        return [Row("golds", "green", f"All of the first {len(golds)} golds of `{key}` can be judged.")]
    first = [f"row {number}: {_quoted(golds[number])}" for number in unread[:_SHOWN]]
    return [
        Row(
            "golds",
            "red" if len(unread) == len(golds) else "yellow",
            f"{len(unread)} of {len(golds)} golds of `{key}` cannot be judged ({', '.join(first)}).",
            f"Their rollouts get no verdict. {_READABLE}",
        )
    ]


def _is_question(gold: Any, row: dict) -> bool:
    """A gold that stands in the prompt word for word: a wrong column, unless it is as short as answers are."""
    if not isinstance(gold, str) or len(gold) < _LONG:
        return False
    prompt = flat_prompt(row["prompt"])
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return any(isinstance(text, str) and gold in text for text in texts)


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} [...]"
