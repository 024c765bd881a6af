"""The teacher begins to score a student's rollout as soon as it has ended, while others are still written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .teachers.routed import prefetching_teachers
from .teachers.rows import teacher_of, teacher_prompt_ids

if TYPE_CHECKING:
    from .trainer import SGOPDTrainer


@contextmanager
def scoring_ahead(trainer: "SGOPDTrainer", examples: Sequence[dict], known: bool) -> Iterator[None]:
    """While a generation batch is made and scored, have the teacher begin early what it can.

    Args:
        trainer: whose teacher scores.
        examples: the data set's row of each completion.
        known: whether the trainer will ask the teacher for each of them, and for nothing else.
    """
    trainer.on_completions = ScoringAhead(trainer, examples) if known and scores_every_rollout(trainer) else None
    try:
        yield
    finally:
        trainer.on_completions = None
        for teacher in prefetching_teachers(trainer.teacher):
            teacher.drop_prefetched_scores()


def scores_every_rollout(trainer: "SGOPDTrainer") -> bool:
    """Whether some teacher can begin ahead of time, and its scores are used whatever the verdict will be."""
    args = trainer.args
    # Tools and environments go on writing where the student has ended.
    single_turn = not trainer.tools and trainer.rollout_func is None and trainer.environment_factories is None
    used = trainer.mode == "train" or args.eval_with_teacher
    return used and single_turn and trainer.token_weights.all_taught and bool(prefetching_teachers(trainer.teacher))


class ScoringAhead:
    """Listens to the completions of one generation batch, and has the teacher begin to score them.

    What it asks is what `SGOPDTrainer.score_with_teacher` will ask; if it were not, it would be dropped.

    Args:
        trainer: whose teacher scores.
        examples: the data set's row of each completion.
    """

    def __init__(self, trainer: "SGOPDTrainer", examples: Sequence[dict]) -> None:
        self.trainer = trainer
        self.examples = examples
        self._left = set(range(len(examples)))
        self._read: list[list[int]] | None = None

    def __call__(
        self, prompt_ids: Sequence[list[int]], rows: Sequence[int], completion_ids: Sequence[list[int]]
    ) -> None:
        """Completions are there: begin those that are new and count."""
        trainer = self.trainer
        if self._read is None:
            self._read = teacher_prompt_ids(self.examples, prompt_ids, trainer.tokenize_prompts)
        new = {row: ids for row, ids in zip(rows, completion_ids, strict=True) if row in self._left}
        self._left -= new.keys()
        usable = {row: trainer.vocabulary.usable(ids) for row, ids in new.items() if not self._is_masked(ids)}
        begun = {row: ids for row, ids in usable.items() if trainer.token_weights.counts(ids)}
        if begun:
            teacher: Any = teacher_of(trainer.teacher, [self.examples[row] for row in begun])
            trainer.objective.prefetch_scores(teacher, [self._read[row] for row in begun], list(begun.values()))

    def _is_masked(self, completion_ids: list[int]) -> bool:
        """Whether TRL leaves a completion out because it was cut off."""
        trainer = self.trainer
        ends = {*trainer.eos_token_ids, trainer.tokenizer.pad_token_id}
        return trainer.args.mask_truncated_completions and not ends & set(completion_ids[-1:])
