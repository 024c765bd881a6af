"""A rollout of the teacher, why the anchor does not use it, and how the user hears of that."""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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
        teacher_prompt_ids: token ids of the prompt that the teacher read.
        completion_ids: token ids that the teacher wrote, the end token included.
        verdict: 1 right, 0 wrong, None no verdict.
        dropped: why the anchor does not use it: "wrong", "no verdict" or "empty" (nothing before the end token), or
            "filtered" where the `keep` of a subclass left out a right one; None if it is used.
        cached: whether it was stored before.
    """

    prompt_ids: list[int]
    teacher_prompt_ids: list[int]
    completion_ids: list[int]
    verdict: float | None
    dropped: DropReason | None = None
    cached: bool = False

    @property
    def kept(self) -> bool:
        """Whether the anchor uses it."""
        return self.dropped is None


def drop_reason(
    wanted: bool, verdict: float | None, completion_ids: Sequence[int], eos_token_ids: Collection[int]
) -> DropReason | None:
    """Why the anchor does not use a rollout; None if it does.

    Args:
        wanted: what the callback's `keep` answered.
        verdict: 1 right, 0 wrong, None no verdict.
        completion_ids: what the teacher wrote, an end token included.
        eos_token_ids: that end a completion.
    """
    # Whatever `keep` and the verifier say: an end token alone would teach the student to write nothing.
    if not completion_ids or completion_ids[0] in eos_token_ids:
        return "empty"
    if wanted:
        return None
    if verdict is None:
        return "no verdict"
    return "filtered" if verdict == 1.0 else "wrong"


MEANING: dict[DropReason, str] = {
    "wrong": "judged wrong by the verifier",
    "no verdict": "without a verdict, as the verifier abstained",
    "empty": "empty: no token comes before the end token, or before an id that the student's tokenizer lacks",
    "filtered": "left out by the callback's `keep`, though it is right",
}
WAY_OUT: dict[DropReason, str] = {
    # Both built-in verifiers answer 0, not None, where they find no answer.
    "wrong": "see whether the answers are written as the verifier reads them (math_reward and exact_match_reward look "
    "for a closed \\boxed{...}, and what they cannot read is wrong), whether rollouts are cut off by "
    "`teacher_max_completion_length` (`anchor/truncated`) or by an id that the student's tokenizer lacks (a teacher "
    "server warns of it), and whether the teacher can solve these prompts",
    "no verdict": "see whether every row has a gold answer that the verifier can read, and whether judging runs out "
    "of time or memory (math_reward and exact_match_reward count why: `anchor/verifier/no_verdict_*`)",
    "empty": "see whether the teacher ends at once after such a prompt, for want of its chat template for instance, "
    "or begins with an id that the student's tokenizer lacks (a teacher server warns of it)",
    "filtered": "see what `keep` asks for",
}
# A teacher is wrong now and then. A missing verdict or an empty rollout points at a mistake.
_LEVEL: dict[DropReason, int] = {
    "wrong": logging.INFO,
    "filtered": logging.INFO,
    "no verdict": logging.WARNING,
    "empty": logging.WARNING,
}
# Those that `teacher_sampling_filter_correct=False` would keep.
_UNVERIFIED: frozenset[DropReason] = frozenset({"wrong", "no verdict"})

STEPS_IN_A_ROW = 3
"""Steps that keep no rollout before the user is warned (our choice): one or two are bad luck with few prompts."""
_HEAD, _TAIL = 100, 200
"""Characters shown of a long text. Answers stand at the end."""


class DropReporter:
    """Shows the first dropped rollout of each reason, and warns once if none is kept for several steps, or ever.

    The main process speaks. All ranks call `report` with counts that they agree on, as it may exchange.

    Args:
        own_keep: whether a subclass decides what is kept; then no setting changes it.
    """

    def __init__(self, *, own_keep: bool) -> None:
        self.own_keep = own_keep
        self._examples: dict[DropReason, str] = {}
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
        new = {reason for reason, number in dropped.items() if number} - self._examples.keys()
        if new:
            self._show_first(run, step, rollouts, new)
        if kept:
            self._steps, self._dropped = [], Counter()
        elif any(dropped.values()):
            # A step for which no rollout was planned says nothing about the teacher.
            self._steps.append(step)
            self._dropped.update(dropped)
            if len(self._steps) >= STEPS_IN_A_ROW:
                self._warn(run, f"in {len(self._steps)} steps in a row, the last of them step {step}")

    def end(self, run: Run) -> None:
        """The anchor is over and has kept none at all: too few steps for the warning of `report` are no bad luck."""
        if self._steps:
            first, last = self._steps[0], self._steps[-1]
            steps = f"step {last}" if first == last else f"the steps {first} to {last}"
            self._warn(run, f"in {steps}, with which the anchor ended")

    def _warn(self, run: Run, when: str) -> None:
        if self._warned:
            return
        self._warned = True
        if not run.accelerator.is_main_process:
            return
        found = [(reason, number) for reason, number in self._dropped.most_common() if number]
        most_frequent, _ = found[0]
        ways = [WAY_OUT[reason] for reason, _ in found]
        if not self.own_keep and _UNVERIFIED & {reason for reason, _ in found}:
            ways.append("or have them learnt unverified (teacher_sampling_filter_correct=False)")
        ways.append("or have none written (teacher_sampling_enable=False)")
        logger.warning(
            "No teacher rollout was kept %s, so that the anchor adds nothing to the loss: %s. The first that was %s: "
            "%s Way out: %s.",
            when,
            ", ".join(f"{number} {MEANING[reason]}" for reason, number in found),
            most_frequent,
            self._examples[most_frequent],
            "; ".join(ways),
        )

    def _show_first(self, run: Run, step: int, rollouts: Sequence[TeacherRollout], new: set[DropReason]) -> None:
        """Log the first rollout of each new reason, of the lowest rank that has one, and remember its text."""
        own: dict[DropReason, str] = {}
        for rollout in rollouts:
            if rollout.dropped in new and rollout.dropped not in own:
                own[rollout.dropped] = _quoted(run.tokenizer, rollout)
        # Not only this rank's: the main process may have none, and the log of another is often hidden.
        every: list[dict[DropReason, str]] = gather_object([own])
        first = {reason: text for rank in reversed(every) for reason, text in rank.items()}
        self._examples |= first
        if not run.accelerator.is_main_process:
            return
        for reason, text in first.items():
            logger.log(
                _LEVEL[reason],
                "The first teacher rollout that the anchor does not use for this reason, in step %d, is %s. %s The "
                "next ones are counted (`anchor/dropped_*`) and not shown.",
                step,
                MEANING[reason],
                text,
            )


def _quoted(tokenizer: Any, rollout: TeacherRollout) -> str:
    # Special tokens too: a missing chat template, or an end token at once, shows in them alone.
    ids = [rollout.teacher_prompt_ids, rollout.completion_ids]
    prompt, completion = tokenizer.batch_decode(ids, skip_special_tokens=False)
    tokens = len(rollout.completion_ids)
    return f"The teacher read {_shortened(prompt)} and wrote {tokens} tokens: {_shortened(completion)}."


def _shortened(text: str) -> str:
    if len(text) <= _HEAD + _TAIL:
        return repr(text)
    return repr(f"{text[:_HEAD]} [...] {text[-_TAIL:]}")
