"""A rollout of the teacher, why the anchor does not use it, and how the user hears of that."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from accelerate.utils import gather_object

from ..run import Run

logger = logging.getLogger(__name__)

DropReason = Literal["wrong", "no verdict", "empty", "filtered"]
DROP_REASONS: tuple[DropReason, ...] = get_args(DropReason)


@dataclass(frozen=True)
class TeacherRollout:
    """One rollout of the teacher, judged.

    Attributes:
        prompt_ids: token ids of the student's prompt, after which it is learnt.
        completion_ids: token ids that the teacher wrote, the end token included.
        verdict: 1 right, 0 wrong, None no verdict.
        dropped: why the anchor does not use it: "wrong", "no verdict" or "empty" (no token), or "filtered" where the
            `keep` of a subclass left out a right one; None if it is used.
        cached: whether it was stored before.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    verdict: float | None
    dropped: DropReason | None = None
    cached: bool = False

    @property
    def kept(self) -> bool:
        """Whether the anchor uses it."""
        return self.dropped is None


def drop_reason(kept: bool, verdict: float | None, completion_ids: Sequence[int]) -> DropReason | None:
    """Why the anchor does not use a rollout; None if it does.

    Args:
        kept: what the callback's `keep` answered.
        verdict: 1 right, 0 wrong, None no verdict.
        completion_ids: without any there is nothing to learn from, whatever `keep` answered.
    """
    if not completion_ids:
        return "empty"
    if kept:
        return None
    if verdict is None:
        return "no verdict"
    return "filtered" if verdict == 1.0 else "wrong"


MEANING: dict[DropReason, str] = {
    "wrong": "judged wrong by the verifier",
    "no verdict": "without a verdict, as the verifier abstained",
    "empty": "empty: the teacher wrote no token",
    "filtered": "left out by the callback's `keep`, though it is right",
}
WAY_OUT: dict[DropReason, str] = {
    "wrong": "see whether the teacher can solve these prompts, and raise `teacher_max_completion_length` if rollouts "
    "are cut off (`anchor/truncated`)",
    "no verdict": "see whether the verifier can read the answers and the solutions",
    "empty": "see whether the teacher ends at once after such a prompt, for want of its chat template for instance",
    "filtered": "see what `keep` asks for",
}
# A teacher is wrong now and then. A missing verdict or an empty rollout points at a mistake.
_LEVEL: dict[DropReason, int] = {
    "wrong": logging.INFO,
    "filtered": logging.INFO,
    "no verdict": logging.WARNING,
    "empty": logging.WARNING,
}

STEPS_IN_A_ROW = 3
"""Steps that keep no rollout before the user is warned (our choice): one or two are bad luck with few prompts."""
_HEAD, _TAIL = 100, 200
"""Characters shown of a long text. Answers stand at the end."""


class DropReporter:
    """Shows the first dropped rollout of a run, and warns once if several steps in a row keep none.

    The main process speaks. All ranks call `report` with counts that they agree on, as it may exchange.
    """

    def __init__(self) -> None:
        self._example: str | None = None
        self._steps: list[int] = []
        self._dropped: Counter[DropReason] = Counter()
        self._warned = False

    def report(
        self, run: Run, step: int, rollouts: Sequence[TeacherRollout], kept: int, dropped: Mapping[DropReason, int]
    ) -> None:
        """Tell what there is to tell of a step.

        Args:
            run: of the rollouts.
            step: 1-based optimizer step.
            rollouts: this rank's.
            kept: number of rollouts of all ranks that the anchor uses.
            dropped: number of the others by reason.
        """
        if any(dropped.values()) and self._example is None:
            self._example = _show_first(run, step, rollouts)
        if kept:
            self._steps, self._dropped = [], Counter()
        elif any(dropped.values()):
            # A step for which no rollout was planned says nothing about the teacher.
            self._steps.append(step)
            self._dropped.update(dropped)
            self._warn_of_dry_spell(run)

    def _warn_of_dry_spell(self, run: Run) -> None:
        if len(self._steps) < STEPS_IN_A_ROW or self._warned:
            return
        self._warned = True
        if not run.accelerator.is_main_process:
            return
        found = [(reason, count) for reason, count in self._dropped.most_common() if count]
        logger.warning(
            "No teacher rollout was kept in %d steps in a row, the last of them step %d, so that the anchor adds "
            "nothing to the loss: %s. The first that was dropped: %s Way out: %s. Or use rollouts as they are "
            "(teacher_sampling_filter_correct=False), or none (teacher_sampling_enable=False).",
            len(self._steps),
            self._steps[-1],
            ", ".join(f"{count} {MEANING[reason]}" for reason, count in found),
            self._example,
            "; ".join(WAY_OUT[reason] for reason, _ in found),
        )


def _show_first(run: Run, step: int, rollouts: Sequence[TeacherRollout]) -> str:
    """Log the first dropped rollout of the lowest rank that has one, and return its text."""
    own = [(rollout.dropped, _quoted(run.tokenizer, rollout)) for rollout in rollouts if rollout.dropped is not None]
    # Not only this rank's: the main process may have none, and the log of another is often hidden.
    every: list[tuple[DropReason, str]] = gather_object(own[:1])
    reason, text = every[0]
    if run.accelerator.is_main_process:
        logger.log(
            _LEVEL[reason],
            "The first teacher rollout that the anchor does not use, in step %d, is %s. %s The next ones are counted "
            "(`anchor/dropped_*`) and not shown.",
            step,
            MEANING[reason],
            text,
        )
    return text


def _quoted(tokenizer: Any, rollout: TeacherRollout) -> str:
    prompt, completion = tokenizer.batch_decode([rollout.prompt_ids, rollout.completion_ids], skip_special_tokens=True)
    tokens = len(rollout.completion_ids)
    return f"Prompt: {_shortened(prompt)}; rollout of {tokens} tokens: {_shortened(completion)}."


def _shortened(text: str) -> str:
    if len(text) <= _HEAD + _TAIL:
        return repr(text)
    return repr(f"{text[:_HEAD]} [...] {text[-_TAIL:]}")
