"""SmolLM2-135M-Instruct in the tests: when they run, and problems that it solves now and then.

It cannot add. Asked for a box and shown one, it can say how many pens there are beside two cats, about every other
time: groups of rollouts are then mixed, and completions short.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from datasets import Dataset

from sg_opd_trl import math_reward
from sg_opd_trl.data import prepare_dataset

NEEDS_MODEL = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif("SG_OPD_REAL_MODEL" not in os.environ, reason="`make test-real` fetches the model and runs it"),
]
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
BOX = "Box it."
EXAMPLE = [
    {"role": "user", "content": "Tom has 4 apples. How many apples?"},
    {"role": "assistant", "content": r"\boxed{4}"},
]
WORKED_EXAMPLES = r"""Box it.
4 apples, 2 dogs. How many apples? \boxed{4}
9 birds, 3 trees. How many birds? \boxed{9}"""


def question(pens: int) -> str:
    return f"Ann has {pens} pens and 2 cats. How many pens?"


def system_turn(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def rows(*, shown: bool = True, teacher_system: str | None = None) -> Dataset:
    """Problems with their golds.

    Args:
        shown: whether the student is asked for a box and sees an example, in turns before the question.
        teacher_system: the system turn of a `teacher_prompt`, which has the example too; without it there is none.
    """

    def row(pens: int) -> dict[str, Any]:
        asked = [{"role": "user", "content": question(pens)}]
        taught = {} if teacher_system is None else {"teacher_prompt": [system_turn(teacher_system), *EXAMPLE, *asked]}
        return {"prompt": [system_turn(BOX), *EXAMPLE, *asked] if shown else asked, "solution": pens, **taught}

    return prepare_dataset(Dataset.from_list([row(pens) for pens in (3, 7, 8, 5, 6, 1)]))


class RecordedVerifier:
    """`math_reward`, and what it was asked and answered."""

    __name__ = "math_reward"

    def __init__(self) -> None:
        self.calls: list[tuple[list, list[list[int]], list]] = []

    def __call__(self, prompts: list, completions: list, completion_ids: list, solution: list, **columns: Any) -> list:
        verdicts = math_reward(completions, solution)
        self.calls.append((prompts, [list(ids) for ids in completion_ids], verdicts))
        return verdicts


def in_order(written: list[list[int]]) -> Any:
    """A `write` for `tiny.inject_rollouts` and its like: completions written before, one after the other."""
    left: Iterator[list[int]] = iter(written)
    return lambda *_: next(left)
