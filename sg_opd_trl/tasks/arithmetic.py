"""Problems, worked solutions and slips of the built-in task: adding two three-digit numbers in writing.

A solution goes through the digits from the right, writes digit + digit + carry with a two-digit result, and ends in
the sum: `896+246=` is answered by `6+6+0=12,9+4+1=14,8+2+1=11 \\boxed{1142}`.
"""

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .settings import DataSettings

NUM_DIGITS = 3
LARGEST_DIGIT_SUM = 19  # 9 + 9 + 1
_BOXED_NUMBER = re.compile(r"\\boxed\{(\d+)\}")


@dataclass(frozen=True)
class Problem:
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
    def messages(self) -> list[dict[str, str]]:
        """The question as a conversation of one user message."""
        return [{"role": "user", "content": self.question}]

    @property
    def unordered(self) -> tuple[int, int]:
        """Identity of the problem up to swapping the numbers."""
        return min(self.first, self.second), max(self.first, self.second)


@dataclass(frozen=True)
class ProblemSplits:
    """Problem sets of which no two share a problem, not even with its numbers swapped."""

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]


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


def is_correct(text: str, answer: str) -> bool:
    """Whether the last boxed number of a text is the answer; exact, and much cheaper than symbolic checking."""
    found = _BOXED_NUMBER.findall(text)
    return bool(found) and found[-1] == answer


def draw_problems(count: int, generator: random.Random, taken: Collection[tuple[int, int]] = ()) -> list[Problem]:
    """Draw problems that avoid a set of unordered ones; the draws may repeat each other.

    Args:
        count: Number of problems.
        generator: Source of randomness.
        taken: `Problem.unordered` of the problems to avoid.

    Returns:
        list[Problem]: `count` problems.
    """
    low, high = 10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS - 1
    problems: list[Problem] = []
    while len(problems) < count:
        problem = Problem(generator.randint(low, high), generator.randint(low, high))
        if problem.unordered not in taken:
            problems.append(problem)
    return problems


def draw_splits(settings: DataSettings) -> ProblemSplits:
    """Draw the three problem sets without repetition.

    The held-out sets are drawn first, so that the number of training problems does not change them.

    Args:
        settings: Sizes and seed.

    Returns:
        ProblemSplits: Sets without a common problem.
    """
    generator = random.Random(f"arithmetic problems {settings.seed}")
    taken: set[tuple[int, int]] = set()

    def draw(count: int) -> list[Problem]:
        problems: list[Problem] = []
        while len(problems) < count:
            problems += draw_problems(1, generator, taken)
            taken.add(problems[-1].unordered)
        return problems

    test, validation = draw(settings.num_test), draw(settings.num_validation)
    return ProblemSplits(train=draw(settings.num_train), validation=validation, test=test)
