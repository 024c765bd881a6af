"""The teacher begins to score a student's rollout as soon as it has ended, while others are still written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from .objectives import Objective
from .run import Run
from .teachers.base import Teacher
from .teachers.fit import SharedVocabulary
from .teachers.routed import RoutedTeacher, prefetching_teachers, teacher_of, teacher_prompt_ids
from .token_weights import TokenWeights


class ScoredRun(Run, Protocol):
    """A run whose rollouts a teacher scores.

    Attributes:
        teacher: the run's.
        objective: says what the teacher is asked.
        token_weights: say which tokens count.
        vocabulary: ids that all models have.
        eos_token_ids: that end a completion.
        on_completions: who is told of completions.
    """

    teacher: Teacher | RoutedTeacher
    objective: Objective
    token_weights: TokenWeights
    vocabulary: SharedVocabulary
    eos_token_ids: Any
    on_completions: Any


@contextmanager
def prefetched_scores(run: ScoredRun, examples: Sequence[dict], known: bool) -> Iterator[None]:
    """While a generation batch is made and scored, have the teacher begin early what it can.

    Args:
        run: whose teacher scores.
        examples: the data set's row of each completion.
        known: whether the trainer will ask the teacher for each of them, and for nothing else.
    """
    run.on_completions = ScorePrefetcher(run, examples) if known and scores_every_rollout(run) else None
    try:
        yield
    finally:
        run.on_completions = None
        for teacher in prefetching_teachers(run.teacher):
            teacher.drop_prefetched_scores()


def scores_every_rollout(run: ScoredRun) -> bool:
    """Whether some teacher can begin ahead of time, and its scores are used whatever the verdict will be."""
    # Tools and environments go on writing where the student has ended.
    single_turn = not run.tools and run.rollout_func is None and run.environment_factories is None
    used = run.mode == "train" or run.args.eval_with_teacher
    return used and single_turn and run.token_weights.all_taught and bool(prefetching_teachers(run.teacher))


class ScorePrefetcher:
    """Is told of the completions of one generation batch as they end, and has the teacher begin to score them.

    It asks exactly what `SGOPDTrainer.score_with_teacher` asks when all of them are there: an answer is used for an
    equal question only, so that a difference would cost time and never change a score.

    Args:
        run: whose teacher scores.
        examples: the data set's row of each completion.
    """

    def __init__(self, run: ScoredRun, examples: Sequence[dict]) -> None:
        self.run = run
        self.examples = examples
        self._left = set(range(len(examples)))
        self._teacher_prompts: list[list[int]] | None = None

    def __call__(
        self, prompt_ids: Sequence[list[int]], rows: Sequence[int], completion_ids: Sequence[list[int]]
    ) -> None:
        """Begin the scores of those completions that are new and count."""
        run = self.run
        if self._teacher_prompts is None:
            self._teacher_prompts = teacher_prompt_ids(self.examples, prompt_ids, run.tokenize_prompts)
        # The generation loop tells of rows as they end, and the seam of all of them once more.
        new = {row: ids for row, ids in zip(rows, completion_ids, strict=True) if row in self._left}
        self._left -= new.keys()
        usable = {row: run.vocabulary.usable(ids) for row, ids in new.items() if not self._is_masked(ids)}
        begun = {row: ids for row, ids in usable.items() if run.token_weights.counts(ids)}
        if begun:
            teacher: Any = teacher_of(run.teacher, [self.examples[row] for row in begun])
            prompts = [self._teacher_prompts[row] for row in begun]
            run.objective.prefetch_scores(teacher, prompts, list(begun.values()))

    def _is_masked(self, completion_ids: list[int]) -> bool:
        """Whether TRL leaves a completion out because it was cut off."""
        ends = {*self.run.eos_token_ids, self.run.tokenizer.pad_token_id}
        return self.run.args.mask_truncated_completions and not ends & set(completion_ids[-1:])
