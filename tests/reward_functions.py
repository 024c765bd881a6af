"""Reward functions in a module of their own, as `verifier_timeout` needs them: good ones, and some without answer."""

import functools
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: A folder that tests and functions in other processes share; its name must not look like a secret's.
FOLDER = "REWARD_FUNCTIONS_FOLDER"


def parity(completions: list, completion_ids: list[list[int]], **_: Any) -> list[float]:
    """As `tiny.parity_verifier`, without its imports."""
    return [float((len(ids) + ids[0]) % 2 == 0) for ids in completion_ids]


def talkative(completions: list, log_extra: Any, log_metric: Any, **others: Any) -> list[float]:
    print("a verdict", len(completions))
    os.write(1, b"past Python\n")
    log_extra("length", [len(each) for each in completions])
    log_metric("mine/number", 0.25)
    log_metric(name="mine/number", value=0.75)
    log_extra("seen", [repr({**others, "trainer_state": others["trainer_state"].global_step})] * len(completions))
    return [1.0] * len(completions)


def sleeps(completions: list, **_: Any) -> list[float]:
    while True:
        time.sleep(1)


def needs_a_gold(completions: list, solution: list, **_: Any) -> list[float]:
    return sleeps(completions)


def holds_the_interpreter(completions: list, **_: Any) -> list[float]:
    """One call in C that takes longer than the universe has been there; no other thread runs meanwhile."""
    re.match(r"(a+)+$", "a" * 80 + "b")
    return [1.0] * len(completions)


def starts_others(completions: list, **_: Any) -> list[float]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ[FOLDER], "other.pid").write_text(str(child.pid), encoding="utf-8")
    return holds_the_interpreter(completions)  # so that it is the run alone that can kill


def sleeps_on_asking(completions: list, **_: Any) -> list[float]:
    """Never answers where a completion says "sleep"."""
    return sleeps(completions) if "sleep" in completions else [1.0] * len(completions)


def sleeps_in_the_second_step(
    completions: list, completion_ids: list[list[int]], trainer_state: Any, **_: Any
) -> list[float]:
    return parity(completions, completion_ids) if trainer_state.global_step != 1 else sleeps(completions)


def sleeps_from_the_second_step_on(
    completions: list, completion_ids: list[list[int]], trainer_state: Any, **_: Any
) -> list[float]:
    return parity(completions, completion_ids) if trainer_state.global_step < 1 else sleeps(completions)


def sleeps_on_few(completions: list, completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Judges the student's eight rollouts; never answers for fewer, as the teacher's are."""
    return parity(completions, completion_ids) if len(completions) == 8 else sleeps(completions)


def sleeps_on_the_last_rank(
    completions: list, completion_ids: list[list[int]], trainer_state: Any, **_: Any
) -> list[float]:
    """In the third step."""
    stuck = os.environ["RANK"] == "1" and trainer_state.global_step == 2
    return sleeps(completions) if stuck else parity(completions, completion_ids)


def dies_once(completions: list, **_: Any) -> list[float]:
    mark = Path(os.environ[FOLDER], "died")
    if not mark.exists():
        mark.touch()
        os._exit(7)
    return [1.0] * len(completions)


def dies(completions: list, **_: Any) -> list[float]:
    os._exit(7)


class TwoPartError(Exception):
    """Can be pickled, and not be read again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first}, {second}")


def raises(completions: list, error: list[str], **_: Any) -> list[float]:
    if error[0] == "SystemExit":
        sys.exit(3)
    if error[0] == "TwoPartError":
        raise TwoPartError("one", "two")
    raise {"ZeroDivisionError": ZeroDivisionError, "MemoryError": MemoryError}[error[0]]("in the function")


def raises_in_the_third_step(
    completions: list, completion_ids: list[list[int]], trainer_state: Any, **_: Any
) -> list[float]:
    if trainer_state.global_step == 2:
        raise ZeroDivisionError("in the verifier")
    return parity(completions, completion_ids)


def answers_a_function(completions: list, **_: Any) -> Any:
    return [lambda: None for _ in completions]


def environment(completions: list, **_: Any) -> list[dict]:
    return [dict(os.environ)] * len(completions)


def path(completions: list, **_: Any) -> list[list[str]]:
    return [sys.path] * len(completions)


def draws(completions: list, **_: Any) -> list[float]:
    return [random.random() for _ in completions]


def thresholded(completions: list, threshold: float, **_: Any) -> list[float]:
    return [float(len(each) > threshold) for each in completions]


def with_environments(completions: list, environments: list, **_: Any) -> list[float]:
    return [1.0] * len(completions)


async def asynchronous(completions: list, **_: Any) -> list[float]:
    return [1.0] * len(completions)


@functools.cache
def cached(**_: Any) -> list[float]:
    return [1.0]


class Stateless:
    def __call__(self, completions: list, **_: Any) -> list[float]:
        return [1.0] * len(completions)


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: list, **_: Any) -> list[float]:
        self.calls += 1
        return [1.0] * len(completions)

    def judge(self, completions: list, **_: Any) -> list[float]:
        return self(completions)
