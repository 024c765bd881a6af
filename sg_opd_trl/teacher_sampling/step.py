"""The anchor of one optimizer step: what the teacher is to write, what became of it, and the rows that the loss reads.

`StepPlan` is known before anything is written, so that a teacher that can may begin the next step's while the student
works. `write` carries it out, `count` says over all ranks what came of it, and `AnchorStep` is what is left for the
loss.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from ..bookkeeping import TrainingMetrics
from ..core import anchor_denominator
from ..models.batch import TokenBatch
from ..models.sampling import END_TOKENS
from ..teachers import Sampling
from ..teachers.fit import SharedVocabulary
from ..teachers.routed import teacher_of
from ..verifiers.verdicts import RunVerifier
from .rollouts import DROP_REASONS, DropReason, TeacherRollout
from .stored.cache import CacheRun, RolloutCache

T = TypeVar("T")


class AnchorRun(CacheRun, Protocol):
    """The run as the anchor sees it; `SGOPDTrainer` is one.

    Attributes:
        verifier: judges rollouts.
        metrics: receives the `anchor/` metrics.
        vocabulary: ids that all models have.
        rollout_cache: stored rollouts, None without any.
        eos_token_ids: ids that end a completion of the student; TRL's own.
        anchor: of the current optimizer step; the loss reads it.
        current_gradient_accumulation_steps: micro-batches of the current optimizer step.
    """

    verifier: RunVerifier
    metrics: TrainingMetrics
    vocabulary: SharedVocabulary
    rollout_cache: RolloutCache | None
    anchor: "AnchorStep | None"
    current_gradient_accumulation_steps: int

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """An attribute of TRL's trainer, read only here."""

    @property
    def processes(self) -> int:
        """That train."""

    def judge(self, examples: list[dict], completion_ids: list[list[int]]) -> list[float | None]:
        """The verifier's verdicts on completions for these rows: 1 right, 0 wrong, None no verdict."""

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Add the wall time of a block to one part of the step."""

    def window_examples(self) -> list[dict]:
        """This rank's rows of the current optimizer step, each prompt once."""

    def run_before_micro_batch(self, action: Callable[[], None]) -> None:
        """Run an action once, when the next training micro-batch and its rows are known."""


@dataclass(frozen=True)
class StepPlan:
    """The rollouts that this rank's teacher writes in one optimizer step; one entry per rollout.

    Attributes:
        step: 1-based optimizer step.
        examples: rows of the data set.
        prompt_ids: the prompts as the student reads them; what the teacher writes is learnt after these.
        teacher_prompt_ids: the prompts as the teacher reads them.
        samples: sample indices, which tell stored rollouts of one prompt apart.
        seed: of the teacher's random numbers, another one on every rank.
        slots: numbers of the rollouts within the step of all ranks, by micro-batch of this rank.
    """

    step: int
    examples: list[dict]
    prompt_ids: list[list[int]]
    teacher_prompt_ids: list[list[int]]
    samples: list[int]
    seed: int
    slots: list[list[int]]

    def by_micro_batch(self, rollouts: Sequence[T]) -> list[list[T]]:
        """What was made of the plan, in its order, split as the slots are."""
        remaining = iter(rollouts)
        return [[next(remaining) for _ in own] for own in self.slots]


@dataclass
class AnchorStep:
    """The anchor of one optimizer step on this rank, as the loss reads it.

    Attributes:
        alpha: its weight.
        kept: rollouts of the step that the loss uses, over all ranks.
        total: their tokens (or rollouts, for `seq_mean`; 0 for `sum`), what the loss is divided by.
        micro_batches: kept rollouts of this rank, by micro-batch; taken from the front.
        alone: whether it is the whole loss of the step (stage 1 of TimeSep).
    """

    alpha: float
    kept: int
    total: float
    micro_batches: list[list[TeacherRollout]]
    alone: bool = False

    def take(self, pad_token_id: int, device: torch.device, multiple: int = 1) -> TokenBatch | None:
        """The rows of the next micro-batch, or None if it has none."""
        rows = self.micro_batches.pop(0) if self.micro_batches else []
        if not rows:
            return None
        prompts, completions = [row.prompt_ids for row in rows], [row.completion_ids for row in rows]
        return TokenBatch.from_lists(prompts, completions, pad_token_id, device, multiple)


def sampling_of(run: AnchorRun) -> Sampling:
    """How the teacher writes its rollouts: as the student does, with its own length."""
    # TRL declares `generation_kwargs` as JSON text too; the configuration has read it by now.
    args: Any = run.args
    # The run's end tokens have its `eos_token_id` in them.
    further = {name: value for name, value in (args.generation_kwargs or {}).items() if name != END_TOKENS}
    return Sampling(
        max_new_tokens=args.teacher_completion_length,
        eos_token_ids=tuple(run.eos_token_ids),
        pad_token_id=run.tokenizer.pad_token_id,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        generation_kwargs=run.vocabulary.without_unusable(further),
    )


def write(run: AnchorRun, plan: StepPlan) -> tuple[list[list[int]], list[bool]]:
    """Carry out a plan: its completions, and whether each was stored before."""
    if run.rollout_cache is not None:
        return run.rollout_cache.complete(plan.examples, plan.teacher_prompt_ids, plan.samples, plan.seed)
    teacher, budget = teacher_of(run.teacher, plan.examples), run.generation_budget(plan.teacher_prompt_ids)
    written = teacher.generate(plan.teacher_prompt_ids, run.teacher_sampling, plan.seed, budget)
    return written, [False] * len(written)


def begin(run: AnchorRun, plan: StepPlan) -> None:
    """Have a teacher that can begin what `write` will ask for; only where one is a `PrefetchingTeacher`."""
    if run.rollout_cache is not None:
        run.rollout_cache.prefetch(plan.examples, plan.teacher_prompt_ids, plan.samples, plan.seed)
        return
    teacher: Any = teacher_of(run.teacher, plan.examples)
    budget = run.generation_budget(plan.teacher_prompt_ids)
    teacher.prefetch_rollouts(plan.teacher_prompt_ids, run.teacher_sampling, plan.seed, budget)


@dataclass(frozen=True)
class StepCounts:
    """What became of a step's teacher rollouts, over all ranks.

    Attributes:
        denominator: of the anchor's loss, see `core.anchor_denominator`.
        rollouts: made in the step.
        verified: judged right.
        cached: stored before.
        truncated: cut off by the length limit: as long as it allows, without an end token.
        kept: used by the loss.
        tokens: of those that are kept.
        logged: metrics that the verifier logged on them.
        dropped: those that are not kept, by reason; every reason is there.
    """

    denominator: float
    rollouts: int
    verified: int
    cached: int
    truncated: int
    kept: int
    tokens: int
    logged: int
    dropped: dict[DropReason, int]


def count(run: AnchorRun, rollouts: Sequence[TeacherRollout], logged: int) -> StepCounts:
    """Count a step's rollouts over all ranks, in one exchange.

    Args:
        run: of the rollouts.
        rollouts: this rank's.
        logged: metrics that this rank's verifier logged on them.
    """
    kept = [rollout for rollout in rollouts if rollout.kept]
    own = [
        _denominator(rollouts, run.args.teacher_sft_reduction),
        len(rollouts),
        sum(rollout.verdict == 1 for rollout in rollouts),
        sum(rollout.cached for rollout in rollouts),
        sum(_hit_the_limit(rollout.completion_ids, run.teacher_sampling) for rollout in rollouts),
        len(kept),
        sum(len(rollout.completion_ids) for rollout in kept),
        logged,
        *(sum(rollout.dropped == reason for rollout in rollouts) for reason in DROP_REASONS),
    ]
    ranks = run.accelerator.gather(torch.tensor([own], dtype=torch.float32, device=run.accelerator.device))
    denominator, *counts = ranks.sum(dim=0).tolist()
    rollouts_made, verified, cached, truncated, kept_ones, tokens, logged, *dropped = map(int, counts)
    by_reason = dict(zip(DROP_REASONS, dropped, strict=True))
    return StepCounts(denominator, rollouts_made, verified, cached, truncated, kept_ones, tokens, logged, by_reason)


def _hit_the_limit(completion_ids: list[int], sampling: Sampling) -> bool:
    # Shorter ones without an end token were cut for another reason: at an id that the student lacks, for instance.
    limit = sampling.generation_kwargs.get("max_new_tokens", sampling.max_new_tokens)
    return len(completion_ids) >= limit and completion_ids[-1] not in sampling.eos_token_ids


def _denominator(rollouts: Sequence[TeacherRollout], reduction: str) -> float:
    if not rollouts:
        return 0.0
    completions = [rollout.completion_ids for rollout in rollouts]
    batch = TokenBatch.from_lists([[0]] * len(rollouts), completions, 0, torch.device("cpu"))
    kept = torch.tensor([rollout.kept for rollout in rollouts])
    return float(anchor_denominator(batch.completion_mask, kept, reduction))
