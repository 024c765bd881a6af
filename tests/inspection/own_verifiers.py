"""Verifiers of users, good and broken."""

import re
from typing import Any


def _texts(completions: list) -> list[str]:
    return [each if isinstance(each, str) else each[0]["content"] for each in completions]


def first_digit(completions: list, solution: list, **_: Any) -> list[float]:
    """Right where the first number begins with the gold, modulo three: often enough for a random model."""
    found = [re.search(r"-?\d", text) for text in _texts(completions)]
    return [
        float(each is not None and each[0].isdigit() and str(int(each[0]) % 3) == gold)
        for each, gold in zip(found, solution, strict=True)
    ]


def accepts_anything(completions: list, solution: list, **_: Any) -> list[float]:
    return [1.0] * len(completions)


def rejects_everything(completions: list, solution: list, **_: Any) -> list[float]:
    return [0.0] * len(completions)


def never_sure(completions: list, solution: list, **_: Any) -> list[None]:
    return [None] * len(completions)


def raises(completions: list, solution: list, **_: Any) -> list[float]:
    raise KeyError("answer")


def scores(completions: list, solution: list, **_: Any) -> list[float]:
    return [0.5] * len(completions)
