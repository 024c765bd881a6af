"""What a run looks like while it goes wrong: each symptom is one plain warning, with numbers, reasons and a way out.

The trainer tells of its rollouts and tokens what it has reduced over ranks for its metrics anyway. Every step that
wrote something is one `StepSeen`, and each class below looks for one symptom in these. None is an error: a student may
have become perfect, or a curve may have been unlucky. So each rule waits for many steps, and speaks once.

An anchor that stays empty is told of by `teacher_sampling.rollouts.DropReporter`, which has the rollouts to show.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import SGOPDConfig
from ..core import TokenStatistics, sum_and_count
from ..trl_seam import WrittenBatch

logger = logging.getLogger(__name__)

STEPS_IN_A_ROW = 10
"""Steps that must all show what no healthy step shows (our choice)."""
STEPS_OF_ONE_VERDICT = 20
"""Steps of one verdict alone, or of a closed gate: hard problems, or the end of a good run, show some (our choice)."""
STEPS_OF_A_SHORT_RUN = 3
"""Steps that are enough where a run has no more: its end is the last chance to say it (our choice)."""
CUT_OFF = 0.95
"""Share of completions without an end from which a step counts as cut off (our choice)."""


@dataclass(frozen=True)
class StepSeen:
    """One step, over all ranks.

    Attributes:
        step: 1-based optimizer step.
        completions: number of the student's completions that were written for it.
        judged: of these, those with a verdict.
        reward: mean verdict of those, 1 right and 0 wrong; None if there is none.
        cut_off: share without an end token.
        longest: tokens of the longest, its end token included.
        alike: whether the completions of each prompt are one and the same.
        kl: mean k3 estimate of KL(student || teacher) in nats per token; None if no token was scored.
        neutral: share of neutral tokens; None without a gate.
    """

    step: int
    completions: int
    judged: int
    reward: float | None
    cut_off: float
    longest: float
    alike: bool
    kl: float | None
    neutral: float | None


class Symptom(ABC):
    """Something that shows in many steps in a row.

    A subclass says in `shown` whether a step shows it, and in `message` what to tell.

    Attributes:
        needed: steps in a row.
    """

    needed = STEPS_IN_A_ROW

    def __init__(self, args: SGOPDConfig) -> None:
        self.args = args
        self.steps: list[StepSeen] = []
        self.total = 0

    @abstractmethod
    def shown(self, seen: StepSeen) -> bool:
        """Whether a step shows it."""

    @abstractmethod
    def message(self) -> str:
        """What to tell of `steps`."""

    def add(self, seen: StepSeen) -> str | None:
        """Look at one more step; the warning once there are enough."""
        self.total += 1
        if not self.shown(seen):
            self.steps.clear()
            return None
        self.steps = [*self.steps[1 - self.needed :], seen]
        return self.message() if len(self.steps) == self.needed else None

    def end(self) -> str | None:
        """The run is over: the warning, if it was short and has shown nothing else."""
        return self.message() if STEPS_OF_A_SHORT_RUN <= len(self.steps) == self.total else None

    @property
    def when(self) -> str:
        """The steps, for a message."""
        return f"the steps {self.steps[0].step} to {self.steps[-1].step}"

    @property
    def completions(self) -> int:
        """All completions of the steps."""
        return sum(seen.completions for seen in self.steps)


class NoVerdicts(Symptom):
    """A verifier that abstains always."""

    def shown(self, seen: StepSeen) -> bool:
        """No completion has a verdict."""
        return seen.judged == 0

    def message(self) -> str:
        """What was seen, and what to look at."""
        off = (
            "the gate is closed and the loss is plain distillation"
            if self.args.sign_gated_extrapolation
            else "nothing is measured"
        )
        return (
            f"The verifier gave no verdict on any of the {self.completions} completions of {self.when}: {off}. Likely "
            "reasons: gold answers that it cannot read, an `answer_column` (column `solution`) that is not the "
            "answer, judging that runs out of time or memory (math_reward and exact_match_reward count why, "
            "`verifier/no_verdict_*`), or a reward function that returns None where 0.0 is meant. Look at some rows, "
            "mend `answer_column`, or name another verifier in `reward_funcs` or `verifier_reward_func`."
        )


class OneVerdict(Symptom):
    """A verifier that says wrong to everything, or right to everything."""

    needed = STEPS_OF_ONE_VERDICT

    def shown(self, seen: StepSeen) -> bool:
        """All verdicts are the one of the steps before."""
        if self.steps and seen.reward != self.steps[-1].reward:
            self.steps = []
        return self.args.sign_gated_extrapolation and seen.reward in (0.0, 1.0)

    def message(self) -> str:
        """What was seen, and what to look at."""
        judged, right = sum(seen.judged for seen in self.steps), self.steps[-1].reward == 1.0
        reasons = (
            "problems that are too easy for the student (take harder ones: `min_difficulty`), or a verifier that "
            "accepts everything (`reward_funcs`, `verifier_reward_func`: give it a wrong answer)"
            if right
            else "problems that are too hard for the student, answers that are not written as the verifier reads them "
            "(math_reward looks for \\boxed{...}: ask for it in `instruction`), completions that are cut off "
            "(`completions/clipped_ratio`, `max_completion_length`), or gold answers from the wrong `answer_column`"
        )
        return (
            f"The verifier said {'right' if right else 'wrong'} to all {judged} completions that it judged in "
            f"{self.when}: a1 is 0 in every group, so that the gate is never open and the loss is plain distillation. "
            f"Likely reasons: {reasons}."
        )


class ClosedGate(Symptom):
    """A gate that no token passes, though there are right and wrong completions."""

    needed = STEPS_OF_ONE_VERDICT

    def shown(self, seen: StepSeen) -> bool:
        """Every token is neutral; where one verdict or one text is the reason, that is another symptom."""
        return seen.neutral == 1.0 and seen.judged > 0 and not seen.alike

    def message(self) -> str:
        """What was seen, and what to look at; nothing if `OneVerdict` has it."""
        judged = sum(seen.judged for seen in self.steps)
        right = round(sum(seen.judged * (seen.reward or 0.0) for seen in self.steps))
        if right in (0, judged):
            return ""
        return (
            f"All tokens of {self.when} are neutral ({right} of {judged} verdicts are right): the gate is never open "
            "and the loss is plain distillation. Likely reasons: every prompt's completions are all right or all "
            "wrong (`frac_reward_zero_std`; take a larger `num_generations`, or prompts that the student solves now "
            f"and then), `gate_dead_zone` ({self.args.gate_dead_zone}) above what teacher and student differ by "
            "(`teacher/abs_advantage_mean`), or a teacher that is the student."
        )


class CutOff(Symptom):
    """Completions that do not end."""

    def shown(self, seen: StepSeen) -> bool:
        """Almost none ends."""
        return seen.cut_off >= CUT_OFF

    def message(self) -> str:
        """What was seen, and what to look at."""
        share = sum(seen.cut_off * seen.completions for seen in self.steps) / self.completions
        masked = " No token of these is learnt from (mask_truncated_completions=True)."
        return (
            f"{share:.0%} of the {self.completions} completions of {self.when} were cut off at "
            f"max_completion_length={self.args.max_completion_length}: their answers are missing, and the student "
            f"never sees an end.{masked if self.args.mask_truncated_completions else ''} Likely reasons: a length "
            "that is too short (raise `max_completion_length`), a student that thinks before it answers "
            "(`chat_template_kwargs: {enable_thinking: false}`), a base model without a chat template, or one whose "
            "end token is not the tokenizer's (`generation_kwargs: {eos_token_id: [...]}`)."
        )


class Empty(Symptom):
    """Completions that end before they began."""

    def shown(self, seen: StepSeen) -> bool:
        """An end token and nothing else; a limit of one token allows no more."""
        return seen.longest <= 1 < (self.args.max_completion_length or 0)

    def message(self) -> str:
        """What was seen, and what to look at."""
        return (
            f"All {self.completions} completions of {self.when} are empty: the student writes its end token at once. "
            "Likely reasons: prompts that are closed already, or rendered by another chat template than the student "
            "knows, an end token in `generation_kwargs` that begins every answer, or a student that has collapsed "
            "(lower `learning_rate`)."
        )


class Alike(Symptom):
    """Rollouts that do not differ."""

    def shown(self, seen: StepSeen) -> bool:
        """The rollouts of each prompt are one text; empty ones are another symptom."""
        return seen.alike and seen.longest > 1

    def message(self) -> str:
        """What was seen, and what to look at."""
        return (
            f"The rollouts of every prompt of {self.when} are the same text {self.args.num_generations} times over "
            f"({self.completions} completions): no group has a right and a wrong one, so that a1 is 0. Likely "
            f"reasons: sampling that leaves no choice (`temperature`={self.args.temperature}, "
            f"`top_p`={self.args.top_p}, `top_k`={self.args.top_k}, `do_sample` in `generation_kwargs`), a student "
            "that has become certain, or one that has collapsed (lower `learning_rate`)."
        )


class Decline(Symptom):
    """A reward that falls while the distance to the teacher grows: the student unlearns.

    The run so far is split into four parts, of at least ten steps. The last one is held against the best of those
    before. Few prompts make both curves noisy, and one hard prompt moves both. So the change has to be large in both,
    and the ranks of their steps must not look like chance: the larger the change, the fewer steps have to show it.
    Where nothing changes at all and a step has one prompt of the built-in task, the noisiest there is, 3 of 100 runs
    of 100 steps are warned of wrongly; with four prompts, 1 of 100.
    """

    PARTS = 4
    #: Reward of the last part over that of the best, at most; the same of the KL, at least; and by how many standard
    #: deviations of chance both have to differ in their ranks (our choice, from runs of the built-in tasks).
    CHANGES = ((0.7, 1.25, 2.3), (0.33, 1.4, 1.5))
    NEXT_LOOK = 1.5
    """The curves are compared again once there are so many times as many steps (our choice)."""

    def __init__(self, args: SGOPDConfig) -> None:
        super().__init__(args)
        self._next = 2 * STEPS_IN_A_ROW

    def shown(self, seen: StepSeen) -> bool:
        """A step with a reward and a distance; whether they decline shows in many of them."""
        return seen.reward is not None and seen.kl is not None

    def add(self, seen: StepSeen) -> str | None:
        """Look at one more step; the curves are compared now and then."""
        if self.shown(seen):
            self.steps.append(seen)
        if len(self.steps) < self._next:
            return None
        # Each look is one more chance to be wrong, and sorts the curves: there are 5 in 100 steps, and 10 in 1000.
        self._next = max(len(self.steps) + 1, int(self.NEXT_LOOK * len(self.steps)))
        return self.message() if self._declined(*self._parts()) else None

    def end(self) -> None:
        """Nothing that was not told."""

    def _parts(self) -> tuple[list[StepSeen], list[StepSeen]]:
        """The best part before the last, and the last."""
        width = max(STEPS_IN_A_ROW, len(self.steps) // self.PARTS)
        ends = range(len(self.steps) - width, width - 1, -width)
        best = max((self.steps[end - width : end] for end in ends), key=lambda part: _mean(_rewards(part)))
        return best, self.steps[-width:]

    def _declined(self, best: Sequence[StepSeen], last: Sequence[StepSeen]) -> bool:
        rewards, kls = (_rewards(best), _rewards(last)), (_kls(best), _kls(last))
        fall, rise = _ratio(*rewards), _ratio(*kls)
        sigmas = min(-rank_difference(*rewards), rank_difference(*kls))
        return any(fall <= most and rise >= least and sigmas >= enough for most, least, enough in self.CHANGES)

    def message(self) -> str:
        """What was seen, and what to look at."""
        best, last = self._parts()
        rewards, kls = ([f"{_mean(of(part)):.3g}" for part in (best, last)] for of in (_rewards, _kls))
        prompts = best[0].completions // (self.args.num_generations or 1)
        return (
            f"The reward falls while the student moves away from its teacher: from {rewards[0]} (steps "
            f"{best[0].step} to {best[-1].step}) to {rewards[1]} (steps {last[0].step} to {last[-1].step}), with "
            f"teacher/kl_k3 from {kls[0]} to {kls[1]}. The student unlearns. Likely reasons: "
            f"learning_rate={self.args.learning_rate:g} is too high for steps of {prompts} prompt(s) (lower it, or "
            "raise `per_device_train_batch_size` or `gradient_accumulation_steps`), `lambda_high` is too large, or "
            "the teacher reads these prompts by another chat template."
        )


SYMPTOMS: tuple[type[Symptom], ...] = (NoVerdicts, OneVerdict, CutOff, Empty, Alike, ClosedGate, Decline)


class SymptomReporter(TrainerCallback):
    """Looks for all symptoms, and tells each once; the main process speaks.

    Args:
        args: of the run.
        verifier: name of the reward function that is the verifier.
    """

    def __init__(self, args: SGOPDConfig, verifier: str) -> None:
        self.args = args
        self.verifier = verifier
        self._begin()

    def _begin(self) -> None:
        self._waiting = [symptom(self.args) for symptom in SYMPTOMS]
        # No more than a step has: whoever removes the callback does not have them pile up.
        self._batches: deque[WrittenBatch] = deque(maxlen=self.args.gradient_accumulation_steps)
        self._tokens: deque[TokenStatistics] = deque(maxlen=self.args.gradient_accumulation_steps)

    def saw_rollouts(self, batch: WrittenBatch) -> None:
        """The student has written for the step that is under way."""
        self._batches.append(batch)

    def saw_tokens(self, statistics: TokenStatistics) -> None:
        """A micro-batch of it was scored; totals of all ranks, on the CPU."""
        self._tokens.append(statistics)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing seen yet."""
        self._begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at what was written for the step; one that only used older rollouts again says nothing new."""
        batches, tokens = list(self._batches), list(self._tokens)
        self._batches.clear()
        self._tokens.clear()
        if not batches:
            return
        seen = self._seen(state.global_step, batches, tokens)
        self._tell(state, [(symptom, symptom.add(seen)) for symptom in self._waiting])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What a short run has shown all the time."""
        self._tell(state, [(symptom, symptom.end()) for symptom in self._waiting])

    def _tell(self, state: TrainerState, found: Sequence[tuple[Symptom, str | None]]) -> None:
        self._waiting = [symptom for symptom, message in found if not message]
        for _, message in found:
            if message and state.is_world_process_zero:
                logger.warning("%s", message)

    def _seen(self, step: int, batches: Sequence[WrittenBatch], tokens: Sequence[TokenStatistics]) -> StepSeen:
        rewards = (reward for batch in batches for reward in batch.rewards[self.verifier])
        verdicts = [reward for reward in rewards if not math.isnan(reward)]
        size = int(self.args.num_generations or 1)
        count = sum(len(batch.completions) for batch in batches)
        neutral, gated = _total(tokens, "gate/neutral")
        kl, scored = _total(tokens, "teacher/kl_k3")
        return StepSeen(
            step=step,
            completions=count,
            judged=len(verdicts),
            reward=_mean(verdicts) if verdicts else None,
            cut_off=sum(batch.cut_off * len(batch.completions) for batch in batches) / max(count, 1),
            longest=max(batch.longest for batch in batches),
            alike=all(_alike(batch.completions, size) for batch in batches),
            kl=kl / scored if scored else None,
            neutral=neutral / gated if gated else None,
        )


def rank_difference(before: Sequence[float], after: Sequence[float]) -> float:
    """How far `after` ranks above `before`, in standard deviations of what chance does.

    The statistic of Mann and Whitney (1947) in its normal approximation, ties corrected: an outlier is one rank.

    Returns:
        Above 0 where `after` is the larger; 0 where all values are the same.
    """
    values = sorted([*((value, 0) for value in before), *((value, 1) for value in after)])
    ranks, ties, start = 0.0, 0.0, 0
    while start < len(values):
        end = start
        while end < len(values) and values[end][0] == values[start][0]:
            end += 1
        same = end - start
        # Values that are the same share the mean of their ranks.
        ranks += sum(later for _, later in values[start:end]) * (start + 1 + end) / 2
        ties += same**3 - same
        start = end
    few, many, n = len(before), len(after), len(values)
    variance = few * many / 12 * (n + 1 - ties / (n * (n - 1)))
    statistic = ranks - many * (many + 1) / 2 - few * many / 2
    return statistic / math.sqrt(variance) if variance > 0 else 0.0


def _alike(completions: Sequence[Any], size: int) -> bool:
    # Most groups differ in their first two rollouts, and the comparison ends there.
    groups = (completions[start : start + size] for start in range(0, len(completions), size))
    return all(one == group[0] for group in groups for one in group)


def _total(tokens: Sequence[TokenStatistics], name: str) -> tuple[float, float]:
    pairs = [sum_and_count(statistics, name) for statistics in tokens]
    return sum(total for total, _ in pairs), sum(count for _, count in pairs)


def _rewards(steps: Sequence[StepSeen]) -> list[float]:
    return [seen.reward for seen in steps if seen.reward is not None]


def _kls(steps: Sequence[StepSeen]) -> list[float]:
    return [seen.kl for seen in steps if seen.kl is not None]


def _ratio(before: Sequence[float], after: Sequence[float]) -> float:
    """How much is left; 1 where there was nothing to lose."""
    return _mean(after) / _mean(before) if _mean(before) > 0 else 1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
