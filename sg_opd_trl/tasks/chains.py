"""Problems, worked solutions and mistakes of the second built-in task: a chain of additions and subtractions.

The running total stays between 0 and 19. The question is a sheet with blanks, `05-3=??+9=??-7=??+8=??`; a solution
fills them in from left to right and ends in all totals: `-3=02+9=11-7=04+8=12 \\boxed{02110412}`. Were the last total
the answer, a student that guesses digits would be right nearly one time in ten, which tells the verifier nothing.

The teacher is trained on solutions that now and then forget the borrow: a subtraction through the ten leaves the tens
digit as it was (`12-7=15` for `05`). So it is good in general and wrong in a systematic way on one kind of step.
"""

import itertools
import random
from dataclasses import dataclass

from .problems import BaseProblem, Task
from .settings import SupervisedSettings

NUM_STEPS = 4
LARGEST_TOTAL = 19
SUBTRACTION_SHARE = 0.4  # of the steps proposed; those that would leave the range are drawn again


@dataclass(frozen=True)
class Problem(BaseProblem):
    """A number to start from, and the changes to it in order: negative ones are subtractions."""

    start: int
    changes: tuple[int, ...]

    @property
    def question(self) -> str:
        """The chain with blanks for the totals, such as `05-3=??+9=??`."""
        return f"{self.start:02d}" + "".join(f"{change:+d}=??" for change in self.changes)

    @property
    def answer(self) -> str:
        """All totals in order, two digits each."""
        totals = itertools.accumulate(self.changes, initial=self.start)
        return "".join(f"{total:02d}" for total in itertools.islice(totals, 1, None))

    @property
    def identity(self) -> tuple[int, ...]:
        """Start and changes; the same changes in another order are another problem."""
        return (self.start, *self.changes)


class Chains(Task[Problem]):
    """The task `chains`."""

    name = "chains"

    def draw_problem(self, generator: random.Random) -> Problem:
        """Draw a start in [0, 19] and changes of 1 to 9 that keep every total in that range."""
        start = total = generator.randint(0, LARGEST_TOTAL)
        changes: list[int] = []
        while len(changes) < NUM_STEPS:
            change = generator.randint(1, 9) * (-1 if generator.random() < SUBTRACTION_SHARE else 1)
            if 0 <= total + change <= LARGEST_TOTAL:
                changes.append(change)
                total += change
        return Problem(start, tuple(changes))

    def write_solution(self, problem: Problem, training: SupervisedSettings, generator: random.Random) -> str:
        """Worked solution with slips and forgotten borrows.

        Args:
            problem: The chain.
            training: Gives the chance of a slip at each step (its total is then uniform on [0, 19], so one slip in
                twenty is right by luck) and of forgetting the borrow at a step that needs one.
            generator: Source of randomness.

        Returns:
            str: The solution; the steps after a mistake carry on from it.
        """
        written, total = [], problem.start
        for change in problem.changes:
            total = next_total(total, change, _happens(training.forgotten_borrow_probability, generator))
            if _happens(training.slip_probability, generator):
                total = generator.randint(0, LARGEST_TOTAL)
            written.append((change, total))
        steps = "".join(f"{change:+d}={total:02d}" for change, total in written)
        answer = "".join(f"{total:02d}" for _, total in written)
        return f"{steps} \\boxed{{{answer}}}"


TASK = Chains()


def needs_borrow(total: int, change: int) -> bool:
    """Whether a step subtracts more than the last digit of the total."""
    return change < 0 and total % 10 < -change


def next_total(total: int, change: int, forget_borrow: bool = False) -> int:
    """The last two digits of total + change.

    Args:
        total: In [0, 99].
        change: In [-9, 9].
        forget_borrow: At a step that needs a borrow, leave the tens digit as it was: ten too many.

    Returns:
        int: In [0, 99].
    """
    extra = 10 if forget_borrow and needs_borrow(total, change) else 0
    return (total + change + extra) % 100


def _happens(probability: float, generator: random.Random) -> bool:
    return probability > 0.0 and generator.random() < probability
