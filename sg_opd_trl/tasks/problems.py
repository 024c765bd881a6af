"""What the built-in tasks have in common: problems with one number as answer, their splits, and the exact verifier."""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from .settings import DataSettings, SupervisedSettings

_BOXED_NUMBER = re.compile(r"\\boxed\{(\d+)\}")


class BaseProblem(ABC):
    """One question with a number as its answer."""

    @property
    @abstractmethod
    def question(self) -> str:
        """The text the model is asked; all questions of a task have the same number of tokens."""

    @property
    @abstractmethod
    def answer(self) -> str:
        """The digits that belong in the box."""

    @property
    @abstractmethod
    def identity(self) -> tuple[int, ...]:
        """Equal for two problems that must not lie in different splits."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as a conversation of one user message."""
        return [{"role": "user", "content": self.question}]


ProblemT = TypeVar("ProblemT", bound=BaseProblem)


@dataclass(frozen=True)
class ProblemSplits(Generic[ProblemT]):
    """Problem sets of which no two share a problem, by its identity.

    `train`, `test` and `tune` are the splits of the data set; `tune` is for choosing settings, such as a learning
    rate, without a look at `test`. `validation` is used by preparation only.
    """

    train: list[ProblemT]
    validation: list[ProblemT]
    test: list[ProblemT]
    tune: list[ProblemT]


class Task(ABC, Generic[ProblemT]):
    """A kind of problem: how to draw one and how a worked solution is written."""

    name: str
    """Follows `builtin/`, and is part of every seed."""

    @abstractmethod
    def draw_problem(self, generator: random.Random) -> ProblemT:
        """Draw any problem of the task."""

    @abstractmethod
    def write_solution(self, problem: ProblemT, training: SupervisedSettings, generator: random.Random) -> str:
        """Worked solution for supervised training, with the mistakes that `training` asks for."""

    def draw_problems(
        self, count: int, generator: random.Random, taken: Collection[tuple[int, ...]] = ()
    ) -> list[ProblemT]:
        """Draw problems that avoid some; the draws may repeat each other.

        Args:
            count: Number of problems.
            generator: Source of randomness.
            taken: `identity` of the problems to avoid.

        Returns:
            list[ProblemT]: `count` problems.
        """
        problems: list[ProblemT] = []
        while len(problems) < count:
            problem = self.draw_problem(generator)
            if problem.identity not in taken:
                problems.append(problem)
        return problems

    def draw_splits(self, settings: DataSettings) -> ProblemSplits[ProblemT]:
        """Draw the four problem sets without repetition.

        The held-out sets are drawn first, so that the number of training problems does not change them; `tune`, which
        came later, has a generator of its own, so that it changes none of the others.

        Args:
            settings: Sizes and seed.

        Returns:
            ProblemSplits[ProblemT]: Sets without a common problem.
        """
        taken: set[tuple[int, ...]] = set()

        def draw(count: int, generator: random.Random) -> list[ProblemT]:
            problems: list[ProblemT] = []
            while len(problems) < count:
                problems += self.draw_problems(1, generator, taken)
                taken.add(problems[-1].identity)
            return problems

        generator = random.Random(f"{self.name} problems {settings.seed}")
        test, validation = draw(settings.num_test, generator), draw(settings.num_validation, generator)
        train = draw(settings.num_train, generator)
        tune = draw(settings.num_tune, random.Random(f"{self.name} tuning problems {settings.seed}"))
        return ProblemSplits(train=train, validation=validation, test=test, tune=tune)


def is_correct(text: str, answer: str) -> bool:
    """Whether the last boxed number of a text is the answer; exact, and much cheaper than symbolic checking."""
    found = _BOXED_NUMBER.findall(text)
    return bool(found) and found[-1] == answer  # as text: "012" is not the answer "12", though it is as a number
