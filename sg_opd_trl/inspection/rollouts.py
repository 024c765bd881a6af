"""First rollouts of the student, and of the teacher where the anchor is on: what would a step learn from them?"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core import reverse_kl_advantage
from ..data import first_rows
from ..models.batch import TokenBatch, loss_mask, token_batch
from ..noise import NOTABLE, WIDEN, Noise
from ..teacher_sampling.rollouts import MEANING, WAY_OUT, DropReason, drop_reason
from ..teacher_sampling.step import AnchorRun
from ..teachers.routed import teacher_of, teacher_prompt_ids
from ..token_weights import TokenWeights
from .report import Row

PROMPTS = 4
"""Prompts that are sampled (our choice): with groups of eight as many rollouts as show what is wrong throughout."""
TEACHER_PROMPTS = 8
"""Prompts that the teacher writes for, once each (our choice)."""
_SEED = 20_260_609
# Mean |a2| in nats from which the teacher would hardly have written any of it (our choice).
_STRANGE = 5.0


class SampledRun(AnchorRun, Protocol):
    """A run whose first rollouts can be made without it.

    Attributes:
        num_generations: of a group.
        token_weights: which know the rollouts that the teacher is asked about.
    """

    num_generations: int
    token_weights: TokenWeights

    @property
    def dead_zone(self) -> float:
        """|a2| in nats up to which a token is neutral."""

    @property
    def width_multiple(self) -> int:
        """What the widths of all batches are multiples of."""

    def rollouts_aside(self, examples: list[dict]) -> dict:
        """A scored generation batch, of which nothing stays in the run."""

    def score_with_student(self, batch: TokenBatch, rows: Tensor) -> Tensor:
        """The student's log-probs `(B, T)`."""

    def compute_gate(self, verifier_advantages: Tensor, teacher_advantages: Tensor) -> Tensor:
        """Class of every token."""


@dataclass(frozen=True)
class FirstRollouts:
    """What came of the student's and the teacher's first rollouts.

    Attributes:
        limit: longest completion in tokens.
        rollouts: of the student.
        tokens: of them, those that count.
        cut_off: without an end token.
        right: verified, and right.
        judged: with a verdict.
        groups: of one prompt each.
        mixed: those with right and wrong rollouts.
        consensus: share of the tokens.
        conflict: share of the tokens.
        dead_zone: |a2| up to which a token is neutral.
        mean_gap: mean |a2| in nats; None where no token was scored.
        largest_gap: largest |a2|.
        seconds: of writing and judging, of the teacher, of the student's scores.
        dropped: the teacher's rollouts that the anchor would leave out, by reason; None without an anchor.
        written: rollouts of the teacher.
    """

    limit: int
    rollouts: int
    tokens: int
    cut_off: int
    right: int
    judged: int
    groups: int
    mixed: int
    consensus: float
    conflict: float
    dead_zone: float
    mean_gap: float | None
    largest_gap: float
    seconds: dict[str, float] = field(default_factory=dict)
    dropped: dict[DropReason, int] | None = None
    written: int = 0


def make_first_rollouts(run: SampledRun, prompts: int = PROMPTS) -> FirstRollouts:
    """Sample, judge and score as a step would, at most as many rollouts as one generation batch has.

    Args:
        run: of one process.
        prompts: how many.
    """
    args: Any = run.args  # TRL has filled in by now what its fields leave open
    number = min(prompts, max(1, args.generation_batch_size // run.num_generations))
    chosen = first_rows(run.train_dataset)[:number]
    examples = [dict(example) for example in chosen for _ in range(run.num_generations)]
    seconds: dict[str, float] = {}
    with _timed(seconds, "rollouts"):
        rollouts = run.rollouts_aside(examples)
    batch = token_batch(rollouts, run.width_multiple)
    verdicts = rollouts["verdicts"]
    counted = (loss_mask(rollouts) != 0) & run.token_weights.taught(verdicts).unsqueeze(1)
    with _timed(seconds, "student"):
        own = run.score_with_student(batch, counted.any(dim=1))
    gaps = reverse_kl_advantage(own, rollouts["teacher_logps"])
    gate = run.compute_gate(rollouts["verifier_advantages"], gaps)[counted]
    gaps = gaps[counted].abs()
    groups = verdicts.view(-1, run.num_generations)
    tokens = int(counted.sum())
    asked = first_rows(run.train_dataset)[:TEACHER_PROMPTS]
    dropped = _anchor(run, asked, seconds) if args.teacher_sampling_enable else None
    return FirstRollouts(
        limit=int(args.max_completion_length or 0),
        rollouts=len(examples),
        tokens=tokens,
        cut_off=_cut_off(batch, run.eos_token_ids),
        right=int((verdicts == 1).sum()),
        judged=int((~verdicts.isnan()).sum()),
        groups=len(groups),
        mixed=int(((groups == 1).any(dim=1) & (groups == 0).any(dim=1)).sum()),
        consensus=float((gate == 1).float().mean()) if tokens else 0.0,
        conflict=float((gate == -1).float().mean()) if tokens else 0.0,
        dead_zone=run.dead_zone,
        mean_gap=float(gaps.mean()) if tokens else None,
        largest_gap=float(gaps.max()) if tokens else 0.0,
        seconds=seconds,
        dropped=dropped,
        written=len(asked) if dropped is not None else 0,
    )


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


def _cut_off(batch: TokenBatch, ends: Sequence[int]) -> int:
    ended = torch.isin(batch.completion_ids, torch.tensor(list(ends), device=batch.completion_ids.device))
    return int((~(ended & (batch.completion_mask != 0)).any(dim=1)).sum())


def _anchor(run: SampledRun, examples: Sequence[dict], seconds: dict[str, float]) -> dict[DropReason, int]:
    """The teacher's rollouts that the anchor would leave out; stored ones are neither read nor written."""
    rows = [dict(example) for example in examples]
    prompt_ids = run.tokenize_prompts([example["prompt"] for example in rows])
    read = teacher_prompt_ids(rows, prompt_ids, run.tokenize_prompts)
    teacher: Any = teacher_of(run.teacher, rows)
    width = max(map(len, read)) + run.args.teacher_completion_length
    with _timed(seconds, "anchor"):
        written = teacher.generate(read, run.teacher_sampling, _SEED, len(read) * width)
        verdicts = run.judge(rows, written)
    run.verifier.take_metrics()
    unfiltered = not run.args.teacher_sampling_filter_correct
    reasons = Counter(
        drop_reason(verdict == 1.0 or unfiltered, verdict, ids, run.teacher_sampling.eos_token_ids)
        for ids, verdict in zip(written, verdicts, strict=True)
    )
    return {reason: number for reason, number in reasons.items() if reason is not None}


# --- what is said of them --------------------------------------------------------------------------------------------
def rollout_rows(found: FirstRollouts, *, gated: bool, noise: Noise | None = None) -> list[Row]:
    """Rows on the rollouts, their verdicts, the teacher's signal, and the anchor.

    Args:
        found: what was sampled.
        gated: whether the gate is on.
        noise: what rounding makes of |a2|, where it was measured.
    """
    rows = [_length_row(found), _verdict_row(found), _teacher_row(found, None if noise is None else noise.quantile)]
    if gated:
        rows.append(_gate_row(found))
    if noise is not None:
        rows.append(_noise_row(found.dead_zone, noise))
    if found.dropped is not None:
        rows.append(_anchor_row(found, found.dropped))
    return rows


def _length_row(found: FirstRollouts) -> Row:
    said = f"{found.cut_off} of {found.rollouts} rollouts are cut off at {found.limit} tokens."
    change = "Raise max_completion_length, or look at the end token of student and chat template."
    if found.cut_off == found.rollouts:
        return Row("rollouts", "red", said, f"No answer is finished. {change}")
    if 2 * found.cut_off >= found.rollouts:
        return Row("rollouts", "yellow", said, change)
    return Row("rollouts", "green", said)


def _verdict_row(found: FirstRollouts) -> Row:
    said = (
        f"{found.right} of {found.rollouts} rollouts are right, {found.judged} have a verdict, {found.mixed} of "
        f"{found.groups} groups have right and wrong ones."
    )
    if not found.judged:
        return Row("verdicts", "red", said, "The gate would be closed everywhere. Look at golds and verifier.")
    if not found.mixed:
        way = "Take easier" if not found.right else "Take harder"
        return Row("verdicts", "yellow", said, f"Groups that are all alike say nothing. {way} problems.")
    return Row("verdicts", "green", said)


def _teacher_row(found: FirstRollouts, noise: float | None) -> Row:
    if found.mean_gap is None:
        return Row("teacher", "red", "No token of the first rollouts counts.", "Look at the rollouts.")
    said = (
        f"The teacher's log-probs differ from the student's by {found.mean_gap:.3g} nats on average and by "
        f"{found.largest_gap:.3g} at most"
    )
    same = max(found.dead_zone, noise or 0.0)
    if found.largest_gap <= same:
        return Row(
            "teacher",
            "red",
            f"{said}, no more than rounding does ({same:.2g}): the teacher says what the student says.",
            "There is nothing to learn. Set teacher_model_name_or_path to another model.",
        )
    if found.mean_gap > _STRANGE:
        return Row(
            "teacher",
            "yellow",
            f"{said}: the teacher would hardly have written any of it.",
            "Look at the chat templates, at the end tokens, and whether the two are of one family.",
        )
    return Row("teacher", "green", f"{said}.")


def _noise_row(dead_zone: float, noise: Noise) -> Row:
    if noise.gated > NOTABLE:
        return Row("rounding", "yellow", f"The dead zone is {dead_zone:g}: {noise.told()}", WIDEN)
    said = (
        f"Where teacher and student agree exactly, {noise.gated:.0%} of the tokens pass the dead zone ({dead_zone:g})."
    )
    return Row("rounding", "green", said)


def _gate_row(found: FirstRollouts) -> Row:
    neutral = 1.0 - found.consensus - found.conflict
    said = (
        f"Of {found.tokens} tokens {found.consensus:.0%} are consensus, {found.conflict:.0%} conflict and "
        f"{neutral:.0%} neutral (dead zone {found.dead_zone:g})."
    )
    if found.mixed and neutral > 0.99:
        return Row("gate", "yellow", said, "The gate decides nothing. Lower gate_dead_zone, or take another teacher.")
    return Row("gate", "green", said)


def _anchor_row(found: FirstRollouts, dropped: dict[DropReason, int]) -> Row:
    kept = found.written - sum(dropped.values())
    left_out = "".join(f", {number} {MEANING[reason]}" for reason, number in dropped.items())
    said = f"{kept} of {found.written} teacher rollouts would be kept{left_out}."
    if kept:
        return Row("anchor", "green", said)
    first = max(dropped, key=lambda reason: dropped[reason], default=None)
    return Row("anchor", "yellow", said, f"The anchor may add nothing: {WAY_OUT[first]}." if first else "")
