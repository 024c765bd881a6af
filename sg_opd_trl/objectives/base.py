"""What an objective asks of the models, and what it makes of the answers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SGOPDConfigError
from ..heads import OutputHead
from ..scoring import TokenBatch
from ..teachers.base import HiddenScores, SupportScores, Teacher
from ..teachers.reference import Reference

Scores = Tensor | SupportScores | HiddenScores


class Positions(NamedTuple):
    """The N tokens of a micro-batch whose distributions are matched, in row-major order.

    Attributes:
        hidden_states: `(N, H)` of the student, with gradient.
        head: the student's.
        logps: `(N,)` the student's log-probs of the tokens, with gradient.
        lambdas: `(N,)` extrapolation of each token's target.
        entry: one entry of the micro-batch, `(B, T, ...)` or `(B,)`, at these tokens: `(N, ...)`.
    """

    hidden_states: Tensor
    head: OutputHead
    logps: Tensor
    lambdas: Tensor
    entry: Callable[[str], Tensor]


class Objective:
    """The loss of a token, and what has to be known for it.

    This class is the policy gradient of `sampled_token`; the others replace its parts.

    Args:
        args: the trainer's configuration.
        teacher: of the trainer.
        reference: of the trainer, None where no route uses one or TRL's own serves.
        vocab_size: ids that student, teacher and reference have.
    """

    #: Whether there are tokens whose distribution is matched, in the student's own forward.
    matches: bool = False
    #: Whether the routes pick the target of a distribution (`route_lambdas`) besides the token's advantage.
    routes_targets: bool = False

    def __init__(self, args: Any, teacher: Teacher, reference: Reference | None, vocab_size: int) -> None:
        self.args = args
        self.teacher = teacher
        self.reference = reference
        self.vocab_size = vocab_size

    # --- asking --------------------------------------------------------------------------------------------------
    def ask_teacher(self, teacher: Any, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Scores:
        """Have a teacher, or the teachers of these rows, score completions; arguments as in `Teacher.score`."""
        return teacher.score(batch, rows, max_tokens)

    def prefetch_scores(self, teacher: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
        """Have a `PrefetchingTeacher` begin what `ask_teacher` will ask for."""
        teacher.prefetch_scores(prompt_ids, completion_ids)

    def ask_reference(
        self, reference: Reference, batch: TokenBatch, rows: Tensor, max_tokens: int, inputs: dict
    ) -> Scores:
        """Have the reference score completions; `inputs` hold what the teacher said of them."""
        return reference.score(batch, rows, max_tokens)

    # --- what is kept of the answers, one entry per row ----------------------------------------------------------
    def teacher_entries(self, scores: Scores) -> dict[str, Tensor]:
        """What the loss reads of the teacher's answer; `teacher_logps` `(B, T)` is always among it."""
        return {"teacher_logps": expect(scores, Tensor, "score_with_teacher")}

    def reference_entries(self, scores: Scores, rows: Tensor, inputs: dict) -> dict[str, Tensor]:
        """What the loss reads of the reference's answer for `rows` `(B,)`; `reference_logps` is always among it.

        Rows that no route extrapolates carry lR = lT, so that the extrapolation term is 0.
        """
        logps = expect(scores, Tensor, "score_with_reference")
        return {"reference_logps": torch.where(rows.unsqueeze(1), logps, inputs["teacher_logps"])}

    # --- the loss ------------------------------------------------------------------------------------------------
    def matched(self, behaviour_logps: Tensor, inputs: dict) -> Tensor:
        """Tokens `(B, T)` bool whose distribution is matched, among those that count."""
        return torch.zeros_like(behaviour_logps, dtype=torch.bool)

    def losses(self, positions: Positions) -> Tensor:
        """Matching loss `(N,)` of those tokens, with gradient to the student."""
        return positions.logps.new_zeros(positions.logps.shape)


class SupportObjective(Objective):
    """An objective on the teacher's top-K tokens."""

    matches = True

    def ask_teacher(self, teacher: Any, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Scores:
        """The teacher's top-K tokens."""
        return teacher.score_support(batch, rows, max_tokens, self.args.support_size, self.vocab_size)

    def prefetch_scores(self, teacher: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
        """The teacher's top-K tokens, likewise."""
        teacher.prefetch_scores(prompt_ids, completion_ids, self.args.support_size, self.vocab_size)

    def teacher_entries(self, scores: Scores) -> dict[str, Tensor]:
        """Their ids and log-probs too."""
        logps, ids, support = expect(scores, SupportScores, "score_with_teacher")
        return {"teacher_logps": logps, "teacher_support_ids": ids, "teacher_support_logps": support}


def expect(scores: Any, kind: type, method: str) -> Any:
    """The scores, if they are of the kind that the objective reads.

    Raises:
        SGOPDConfigError: an overridden method returned something else.
    """
    if not isinstance(scores, kind):
        raise SGOPDConfigError(
            f"`{method}` must return {kind.__name__} under this `distillation_mode`, got {type(scores).__name__}. The "
            "loss reads more, or less, than that. Return what the method of SGOPDTrainer returns, or set "
            "distillation_mode='sampled_token' for scores that are a tensor."
        )
    return scores
