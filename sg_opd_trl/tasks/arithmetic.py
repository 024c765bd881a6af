"""Problems, worked solutions and slips of the built-in task: adding two three-digit numbers in writing.

A solution goes through the digits from the right, writes digit + digit + carry with a two-digit result, and ends in
the sum: `896+246=` is answered by `6+6+0=12,9+4+1=14,8+2+1=11 \\boxed{1142}`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .problems import BaseProblem, Task
from .settings import SupervisedSettings

NUM_DIGITS = 3
LARGEST_DIGIT_SUM = 19  # 9 + 9 + 1


@dataclass(frozen=True)
class Problem(BaseProblem):
    """Two numbers of three digits to be added."""

    first: int
    second: int

    @property
    def question(self) -> str:
        """The text the model is asked, such as `896+246=`."""
        return f"{self.first}+{self.second}="

    @property
    def answer(self) -> str:
        """The sum, without leading zeros."""
        return str(self.first + self.second)

    @property
    def identity(self) -> tuple[int, int]:
        """The two numbers, whichever comes first."""
        return min(self.first, self.second), max(self.first, self.second)


class Arithmetic(Task[Problem]):
    """The task `arithmetic`."""

    name = "arithmetic"

    def draw_problem(self, generator: random.Random) -> Problem:
        """Draw two numbers of three digits."""
        low, high = 10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS - 1
        return Problem(generator.randint(low, high), generator.randint(low, high))

    def write_solution(self, problem: Problem, training: SupervisedSettings, generator: random.Random) -> str:
        """Worked solution with slips where `training` asks for them."""
        if training.slip_probability:
            return solution_with_slips(problem, training.slip_probability, generator)
        return worked_solution(problem)


TASK = Arithmetic()


def worked_solution(problem: Problem, wrong_sums: Sequence[int | None] = (None,) * NUM_DIGITS) -> str:
    """Write out the addition from the last digit to the first.

    Args:
        problem: The numbers.
        wrong_sums: For each digit from the right, a number in [0, 19] written instead of the digit sum, or None for
            the true one. Later digits and the boxed answer follow from what was written.

    Returns:
        str: The steps, a space, and the boxed answer.
    """
    steps, digits, carry = [], "", 0
    for position, wrong_sum in enumerate(wrong_sums):
        left, right = (number // 10**position % 10 for number in (problem.first, problem.second))
        total = left + right + carry if wrong_sum is None else wrong_sum
        steps.append(f"{left}+{right}+{carry}={total:02d}")
        carry, digit = divmod(total, 10)
        digits = f"{digit}{digits}"
    return f"{','.join(steps)} \\boxed{{{int(f'{carry}{digits}')}}}"


def solution_with_slips(problem: Problem, slip_probability: float, generator: random.Random) -> str:
    """Worked solution in which each digit sum is replaced by a random number with the given probability.

    Args:
        problem: The numbers.
        slip_probability: Chance in [0, 1] of a slip at each digit. The number written is uniform on [0, 19], so one
            slip in twenty happens to be right or to do no harm.
        generator: Source of randomness.

    Returns:
        str: The solution; the steps after a slip carry on from it.
    """
    slips = [
        generator.randint(0, LARGEST_DIGIT_SUM) if generator.random() < slip_probability else None
        for _ in range(NUM_DIGITS)
    ]
    return worked_solution(problem, slips)
