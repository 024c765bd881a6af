"""Phased teacher sampling (arXiv:2606.09304, Eq. 2-3): when the teacher writes, for which prompts, and what is kept.

Everything that depends on time is a pure function of the 1-based optimizer step, so that a resumed run continues as if
it had never stopped.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..core import anchor_schedule, separated_prompts, separated_schedule
from ..errors import SGOPDConfigError
from ..random_state import forked_random_state, mixed_seed
from ..run import inherits
from ..teachers.routed import prefetching_teachers, teacher_prompt_ids
from .prompts import (
    ROLLOUTS_SEED,
    STUDENT_PROMPTS_SEED,
    PromptSource,
    assign_slots,
    micro_batches_of,
    prompt_stream,
    step_samples,
    stream_samples,
    teacher_prompts_before,
    teacher_prompts_of,
)
from .rollouts import DropReporter, TeacherRollout, drop_reason
from .step import AnchorRun, AnchorStep, StepCounts, StepPlan, begin, count, sampling_of, write

__all__ = [
    "AnchorBinding",
    "AnchorStep",
    "TeacherAnchorCallback",
    "anchor_callbacks",
    "check_anchor_callbacks",
    "is_anchor_callback",
    "make_way_for",
    "sampling_of",
    "with_anchor_callback",
]

logger = logging.getLogger(__name__)

# Metrics that are counts of a step: means over the steps of the logging window.
_COUNTED: dict[str, Callable[[StepCounts], int]] = {
    "anchor/rollouts": lambda counts: counts.rollouts,
    "anchor/kept": lambda counts: counts.kept,
    "anchor/truncated": lambda counts: counts.truncated,
    "anchor/tokens": lambda counts: counts.tokens,
    "anchor/dropped_wrong": lambda counts: counts.dropped["wrong"],
    "anchor/dropped_no_verdict": lambda counts: counts.dropped["no verdict"],
    "anchor/dropped_empty": lambda counts: counts.dropped["empty"],
    "anchor/dropped_filtered": lambda counts: counts.dropped["filtered"],
}
_COUNTED_WITH_A_CACHE: dict[str, Callable[[StepCounts], int]] = {
    "anchor/cache_hits": lambda counts: counts.cached,
    "anchor/cache_misses": lambda counts: counts.rollouts - counts.cached,
}
# What a verifier may not call its own metrics.
_OWN_METRICS = frozenset({"anchor/alpha", "anchor/loss", "anchor/verified_share", *_COUNTED, *_COUNTED_WITH_A_CACHE})


class TeacherAnchorCallback(TrainerCallback, ExportableState):
    """Drives the anchor: at each optimizer step the teacher writes, the verifier judges, what is right is learnt.

    The trainer adds one when `teacher_sampling_enable` is on. Pass a subclass in `callbacks` to change a decision:
    `alpha` (the schedule), `keep` (the filter), `reserved_examples`, `student_examples` and `prompt_range` (the
    prompts).

    A run has one, of the caller's making or the trainer's: the instance goes on in a resumed run, with whatever its
    own constructor was given, and its counters are in every checkpoint.

    Attributes:
        rollouts: teacher rollouts so far, over all ranks and the runs before a resumed one.
        verified: those judged right.
        tokens: tokens of those that were kept.
    """

    def __init__(self) -> None:
        self.rollouts = 0
        self.verified = 0
        self.tokens = 0
        self._run: AnchorRun | None = None
        self._generator_released = False
        self._drops = self._new_reporter()
        self._taken_names: set[str] = set()

    # --- decisions -----------------------------------------------------------------------------------------------
    def alpha(self, args: Any, step: int, total_steps: int) -> float:
        """Weight of the anchor at a 1-based step (Eq. 3; TimeSep: its start until the end of phase 1, then 0).

        A function of its arguments alone: it is also called for steps to come.
        """
        if args.teacher_sampling_time_separated:
            first_end, start = args.teacher_sampling_phase1_end_frac, args.teacher_sft_alpha_start
            return separated_schedule(step, total_steps, first_end, start)
        return anchor_schedule(step, total_steps, *_schedule(args))

    def keep(self, args: Any, verdict: float | None) -> bool:
        """Whether the anchor uses a rollout; one with nothing before its end token is never used."""
        return verdict == 1.0 or not args.teacher_sampling_filter_correct

    def prompt_range(self, trainer: PromptSource, step: int) -> tuple[int, int]:
        """The step's teacher prompts, counted over the run: the first, and the one after the last."""
        args = trainer.args
        if not args.teacher_sampling_time_separated:
            first = teacher_prompts_before(trainer, step)
            return first, first + teacher_prompts_of(trainer, step)
        return separated_prompts(
            step, trainer.state.max_steps, *_schedule(args), per_step=teacher_prompts_of(trainer, 1)
        )

    def reserved_examples(self, trainer: AnchorRun, step: int, prompts: int) -> list[dict]:
        """The step's teacher prompts from their own permutation of the training set, the same on every rank."""
        first, _ = self.prompt_range(trainer, step)
        return [trainer.train_dataset[row] for row in prompt_stream(trainer).between(first, first + prompts)]

    def student_examples(self, trainer: AnchorRun, step: int, prompts: int) -> list[dict]:
        """The step's teacher prompts among this rank's student prompts, in seeded order, repeated if too few."""
        examples = trainer.window_examples()
        seed = mixed_seed(trainer.args.seed, STUDENT_PROMPTS_SEED, step)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
        return [examples[order[i % len(order)]] for i in range(prompts)]

    # --- events --------------------------------------------------------------------------------------------------
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if no step that is left will use the teacher's rollouts."""
        self._drops, self._taken_names, self._generator_released = self._new_reporter(), set(), False
        done, total = state.global_step, state.max_steps
        if not done:
            # A run from its start: another one that this callback was in, or an earlier `train`, counts no more.
            self.restore_counters(0, 0, 0)
        if done >= total or any(self.alpha(args, step, total) > 0 for step in range(done + 1, total + 1)):
            return
        # The last step first: a schedule that is over ended not long ago, or at the start.
        last = next((step for step in range(done, 0, -1) if self.alpha(args, step, total) > 0), None)
        logger.warning(
            "`teacher_sampling_enable` is on, but the anchor's weight is 0 %s: no teacher rollout will be drawn. %s",
            f"in all {total} steps" if done == 0 else f"in the steps {done + 1} to {total} that are left of this run",
            "Raise `teacher_sft_alpha_start`, `teacher_sampling_phase1_end_frac` and "
            "`teacher_sampling_phase2_end_frac`, or train longer."
            if last is None
            else f"Its schedule ended with step {last}. Raise `teacher_sampling_phase2_end_frac` if it should go on.",
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compute alpha; while it is above 0, have the step's anchor made."""
        run = self._bound()
        step = state.global_step + 1
        alpha = self.alpha(args, step, state.max_steps)
        run.metrics.add("train", "anchor/alpha", alpha)
        run.anchor = None
        if alpha <= 0:
            self._release_generator(run)
            self._tell_if_none_was_kept(run)
        elif run.args.teacher_sampling_prompts == "reserve":
            self.fill(alpha, step)
        else:
            # The student's prompts of this step are known once its first micro-batch is.
            run.run_before_micro_batch(lambda: self.fill(alpha, step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing of the anchor outlives the run."""
        run = self._bound()
        run.anchor = None
        self._tell_if_none_was_kept(run)

    # --- one step ------------------------------------------------------------------------------------------------
    def fill(self, alpha: float, step: int) -> None:
        """Make the anchor of one step: plan, write, judge, keep; then have the next step's rollouts begun."""
        run = self._bound()
        with run.timed("anchor"):
            plan = self.plan_step(run, step)
            completion_ids, cached = write(run, plan)
            rollouts = self._judge(run, plan, completion_ids, cached)
            logged = run.verifier.take_metrics()
            counts = count(run, rollouts, len(logged))
        run.anchor = AnchorStep(
            alpha=alpha,
            kept=counts.kept,
            total=counts.denominator,
            micro_batches=[[rollout for rollout in own if rollout.kept] for own in plan.by_micro_batch(rollouts)],
            alone=run.args.teacher_sampling_time_separated,
        )
        self._report(run, counts)
        if counts.logged:
            self._report_verifier(run, logged)
        self._drops.report(run, step, rollouts, counts.kept, counts.dropped)
        with run.timed("anchor"):
            self._prefetch(run, step + 1)

    def plan_step(self, run: AnchorRun, step: int) -> StepPlan:
        """What this rank's teacher writes in a step: a function of step, seed and sizes.

        With shared prompts it also depends on the rows of the student's current generation batch.
        """
        args, accelerator = run.args, run.accelerator
        first, end = self.prompt_range(run, step)
        each, share = args.teacher_num_generations, args.teacher_sampling_prompts == "share"
        # The current step's are known, also where a data loader of the caller's own makes the batches.
        now = step == run.state.global_step + 1
        slots = assign_slots(
            (end - first) * each,
            accelerator.num_processes,
            run.current_gradient_accumulation_steps if now else micro_batches_of(run, step),
            accelerator.process_index,
            # Ranks know only their own student prompts, so that all rollouts of one of them are made on its rank.
            together=each if share else 1,
        )
        own = [slot for part in slots for slot in part]
        numbers = sorted({slot // each for slot in own})
        if share:
            chosen = dict(zip(numbers, self.student_examples(run, step, len(numbers)), strict=True))
        else:
            reserved = self.reserved_examples(run, step, end - first)
            chosen = {number: reserved[number] for number in numbers}
        examples = [chosen[slot // each] for slot in own]
        prompt_ids = run.tokenize_prompts([example["prompt"] for example in examples]) if examples else []
        return StepPlan(
            step=step,
            examples=examples,
            prompt_ids=prompt_ids,
            teacher_prompt_ids=teacher_prompt_ids(examples, prompt_ids, run.tokenize_prompts),
            samples=self._samples(run, step, first, own, examples),
            seed=mixed_seed(args.seed, ROLLOUTS_SEED, step, accelerator.process_index),
            slots=slots,
        )

    def _samples(self, run: AnchorRun, step: int, first: int, slots: list[int], examples: list[dict]) -> list[int]:
        """Sample index of each rollout of this rank, by which the cache tells rollouts of one prompt apart."""
        cache = run.rollout_cache
        from_the_stream = inherits(type(self), TeacherAnchorCallback, "reserved_examples")
        if cache is not None and run.args.teacher_sampling_prompts == "reserve" and from_the_stream:
            each = run.args.teacher_num_generations
            return stream_samples(prompt_stream(run), first, slots, each, cache.repeats)
        return step_samples([repr(example["prompt"]) for example in examples], step)

    def _judge(
        self, run: AnchorRun, plan: StepPlan, completion_ids: list[list[int]], cached: list[bool]
    ) -> list[TeacherRollout]:
        verdicts = run.judge(plan.examples, completion_ids) if plan.examples else []
        ends = run.teacher_sampling.eos_token_ids
        columns = (plan.prompt_ids, plan.teacher_prompt_ids, completion_ids, verdicts, cached)
        rollouts = []
        for prompt, read, ids, verdict, stored in zip(*columns, strict=True):
            dropped = drop_reason(self.keep(run.args, verdict), verdict, ids, ends)
            rollouts.append(TeacherRollout(prompt, read, ids, verdict, dropped, stored))
        return rollouts

    def _prefetch(self, run: AnchorRun, step: int) -> None:
        """Have the teacher begin the rollouts of a step that has not come yet, if it can and they are known."""
        args, state = run.args, run.state
        known = inherits(type(self), TeacherAnchorCallback, "reserved_examples", "prompt_range")
        if args.teacher_sampling_prompts != "reserve" or not known or not prefetching_teachers(run.teacher):
            return
        if step > state.max_steps or self.alpha(args, step, state.max_steps) <= 0:
            return
        # A data set may draw random numbers when its rows are read, and this reads them earlier than without.
        with forked_random_state(run.accelerator.device):
            plan = self.plan_step(run, step)
        begin(run, plan)

    def _release_generator(self, run: AnchorRun) -> None:
        # Once: a server need not hear of it in every step of phase 3.
        if not self._generator_released:
            run.teacher.stop_generating()
            self._generator_released = True

    # --- what is told --------------------------------------------------------------------------------------------
    def _report(self, run: AnchorRun, counts: StepCounts) -> None:
        self.rollouts += counts.rollouts
        self.verified += counts.verified
        self.tokens += counts.tokens
        run.metrics.add("train", "anchor/verified_share", counts.verified, counts.rollouts)
        counted = _COUNTED if run.rollout_cache is None else _COUNTED | _COUNTED_WITH_A_CACHE
        for name, number_of in counted.items():
            run.metrics.add("train", name, number_of(counts))

    def _report_verifier(self, run: AnchorRun, logged: dict[str, tuple[float, int]]) -> None:
        """Add what the verifier logged on teacher rollouts; called on all ranks if any has something."""
        # A verifier may log other names on other ranks, and is not called where a rank has no rollout.
        every = [entry for rank in gather_object([logged]) for entry in rank.items()]
        for name, (total, times) in every:
            if f"anchor/{name}" not in _OWN_METRICS:
                run.metrics.add("train", f"anchor/{name}", total, times)
        taken = {name for name, _ in every if f"anchor/{name}" in _OWN_METRICS} - self._taken_names
        self._taken_names |= taken
        if taken and run.accelerator.is_main_process:
            logger.warning(
                "The verifier logs %s, names that the anchor's own metrics have: on teacher rollouts they are left "
                "out. Choose other names in `log_metric`.",
                sorted(taken),
            )

    def _new_reporter(self) -> DropReporter:
        return DropReporter(own_keep=not inherits(type(self), TeacherAnchorCallback, "keep"))

    def _tell_if_none_was_kept(self, run: AnchorRun) -> None:
        # `tokens` counts the runs before a resumed one too.
        if not self.tokens:
            self._drops.end(run)

    # --- the run -------------------------------------------------------------------------------------------------
    def bind(self, trainer: AnchorRun) -> None:
        """Connect to the trainer; called by it."""
        self._run = trainer

    def state(self) -> dict:
        """What a checkpoint keeps; the schedule itself is a function of the step."""
        return {"args": {}, "attributes": self.counters}

    @property
    def counters(self) -> dict[str, int]:
        """What a run has had from its teacher so far, by name."""
        return {"rollouts": self.rollouts, "verified": self.verified, "tokens": self.tokens}

    def restore_counters(self, rollouts: int, verified: int, tokens: int) -> None:
        """Count on from an earlier run's `counters`."""
        self.rollouts, self.verified, self.tokens = rollouts, verified, tokens

    def _bound(self) -> AnchorRun:
        if self._run is None:
            raise RuntimeError(
                "TeacherAnchorCallback must be passed in `callbacks` of an SGOPDTrainer, which binds it; it has no "
                "trainer. Pass it there instead of calling it yourself."
            )
        return self._run


def _schedule(args: Any) -> tuple[float, float, float, float]:
    """Phase ends and weights of Eq. 3, in the order of `anchor_schedule`."""
    return (
        args.teacher_sampling_phase1_end_frac,
        args.teacher_sampling_phase2_end_frac,
        args.teacher_sft_alpha_start,
        args.teacher_sft_alpha_end,
    )


def with_anchor_callback(callbacks: list | None, args: Any) -> list | None:
    """Add the anchor's callback unless the caller brought one.

    Raises:
        SGOPDConfigError: several, or one with teacher sampling switched off.
    """
    given = [callback for callback in callbacks or [] if is_anchor_callback(callback)]
    check_anchor_callbacks(given, args)
    if not args.teacher_sampling_enable or given:
        return callbacks
    return [*(callbacks or []), TeacherAnchorCallback()]


def is_anchor_callback(callback: Any) -> bool:
    """Whether a callback, or a class of callbacks as transformers takes them too, is the anchor's."""
    kind = callback if isinstance(callback, type) else type(callback)
    return issubclass(kind, TeacherAnchorCallback)


def check_anchor_callbacks(given: Sequence[Any], args: Any) -> None:
    """Refuse anchors that a run cannot have.

    Args:
        given: callbacks, or their classes, of which all are the anchor's.
        args: the configuration.

    Raises:
        SGOPDConfigError: several, or one with teacher sampling switched off.
    """
    if given and not args.teacher_sampling_enable:
        raise SGOPDConfigError(
            "`callbacks` must not hold a TeacherAnchorCallback with teacher_sampling_enable=False, got one. It would "
            "have the teacher generate against the setting. Leave it out, or set teacher_sampling_enable=True."
        )
    if len(given) > 1:
        names = [(one if isinstance(one, type) else type(one)).__name__ for one in given]
        raise SGOPDConfigError(
            f"A run must have one TeacherAnchorCallback, got {names}. Each would have the teacher write in every "
            "step, and the last one's rollouts and weight would be used. Decide everything in one subclass, or call "
            "`trainer.remove_callback` with the one that is not wanted."
        )


class CallingRun(AnchorRun, Protocol):
    """A run that tells which callbacks it has.

    Attributes:
        callback_handler: of transformers.
    """

    callback_handler: Any


def anchor_callbacks(run: CallingRun) -> list[TeacherAnchorCallback]:
    """Those among a run's callbacks."""
    return [one for one in run.callback_handler.callbacks if isinstance(one, TeacherAnchorCallback)]


def make_way_for(run: CallingRun, callback: Any) -> None:
    """Before a callback is added: a caller's anchor takes the place of the one that the trainer has added.

    Raises:
        SGOPDConfigError: there is one of the caller's already, or teacher sampling is switched off.
    """
    if not is_anchor_callback(callback):
        return
    present = anchor_callbacks(run)
    # A subclass is somebody's decision; the class itself decides nothing that another would lose.
    own = [one for one in present if type(one) is not TeacherAnchorCallback]
    check_anchor_callbacks([*own, callback], run.args)
    for one in present:
        run.callback_handler.remove_callback(one)


class AnchorBinding(TrainerCallback):
    """Binds the anchor's callback to the run when training starts."""

    def __init__(self, run: CallingRun) -> None:
        self._run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bind.

        Raises:
            SGOPDConfigError: the callback handler was given anchors that the run cannot have.
        """
        present = anchor_callbacks(self._run)
        check_anchor_callbacks(present, self._run.args)
        # Without one, the step that the loss reads would be what an earlier `train` has left.
        self._run.anchor = None
        for callback in present:
            callback.bind(self._run)
