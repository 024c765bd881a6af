"""Phased teacher sampling (arXiv:2606.09304, Eq. 2-3): prompts, the rollouts of one step, and the callback.

Everything that depends on time is a pure function of the 1-based optimizer step, so that a resumed run continues as if
it had never stopped.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..core import anchor_denominator, anchor_schedule, separated_prompts, separated_schedule
from ..models.batch import TokenBatch
from ..random_state import forked_random_state, mixed_seed
from ..run import inherits
from ..teachers import Sampling
from ..teachers.routed import prefetching_teachers, teacher_of, teacher_prompt_ids
from ..verifiers.verdicts import as_verdict_tensor
from .prompts import PromptStream, deal, step_samples, stream_samples, teacher_prompts_per_step
from .step import AnchorStep, TeacherRollout

if TYPE_CHECKING:
    from ..trainer import SGOPDTrainer

logger = logging.getLogger(__name__)


class TeacherAnchorCallback(TrainerCallback, ExportableState):
    """Drives the anchor: at each optimizer step the teacher generates, the verifier judges, the step is filled.

    The trainer adds one when `teacher_sampling_enable` is on. Pass a subclass in `callbacks` to change a decision:
    `alpha` (the schedule), `student_examples` and `reserved_examples` (the prompts), `keep` (the filter).
    """

    def __init__(self) -> None:
        self.rollouts = 0
        self.verified = 0
        self.tokens = 0
        self._trainer: SGOPDTrainer | None = None
        self._generator_released = False

    def bind(self, trainer: "SGOPDTrainer") -> None:
        """Connect to the trainer; called by it."""
        self._trainer = trainer

    def state(self) -> dict:
        """What a checkpoint keeps; the schedule itself is a function of the step."""
        return {
            "args": {},
            "attributes": {"rollouts": self.rollouts, "verified": self.verified, "tokens": self.tokens},
        }

    # --- decisions -----------------------------------------------------------------------------------------------
    def alpha(self, args: Any, step: int, total_steps: int) -> float:
        """Weight of the anchor at a 1-based step (Eq. 3; TimeSep: its start until the end of phase 1, then 0).

        A function of its arguments alone: it is also called for the step after the current one.
        """
        if args.teacher_sampling_time_separated:
            first_end, start = args.teacher_sampling_phase1_end_frac, args.teacher_sft_alpha_start
            return separated_schedule(step, total_steps, first_end, start)
        return anchor_schedule(step, total_steps, *_schedule(args))

    def keep(self, args: Any, verdict: float | None) -> bool:
        """Whether the anchor uses a rollout."""
        return verdict == 1.0 or not args.teacher_sampling_filter_correct

    def prompt_range(self, trainer: "SGOPDTrainer", step: int) -> tuple[int, int]:
        """The step's teacher prompts, counted over the run: the first, and the one after the last."""
        args: Any = trainer.args
        prompts = teacher_prompts_per_step(args.teacher_sampling_ratio, trainer.student_prompts_per_step)
        if not args.teacher_sampling_time_separated:
            return (step - 1) * prompts, step * prompts
        return separated_prompts(step, trainer.state.max_steps, *_schedule(args), per_step=prompts)

    def reserved_examples(self, trainer: "SGOPDTrainer", step: int, prompts: int) -> list[dict]:
        """The step's teacher prompts from their own permutation of the training set, the same on every rank."""
        dataset: Any = trainer.train_dataset
        first, _ = self.prompt_range(trainer, step)
        return [dataset[row] for row in prompt_stream(trainer).between(first, first + prompts)]

    def student_examples(self, trainer: "SGOPDTrainer", step: int, prompts: int) -> list[dict]:
        """The step's teacher prompts among this rank's student prompts, in seeded order, repeated if too few."""
        examples = trainer.window_examples()
        generator = torch.Generator().manual_seed(mixed_seed(trainer.args.seed, 2, step))
        order = torch.randperm(len(examples), generator=generator).tolist()
        return [examples[order[i % len(order)]] for i in range(prompts)]

    # --- events --------------------------------------------------------------------------------------------------
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say so if the run is too short for the schedule to ever use the teacher's rollouts."""
        if self.alpha(args, 1, state.max_steps) <= 0:
            logger.warning(
                "`teacher_sampling_enable` is on, but with %d steps the anchor's weight is 0 from the first step: no "
                "teacher rollout will be drawn. Raise `teacher_sampling_phase1_end_frac` and "
                "`teacher_sampling_phase2_end_frac`, or train longer.",
                state.max_steps,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compute alpha; while it is above 0, have the step's anchor made."""
        trainer = self._bound()
        step = state.global_step + 1
        alpha = self.alpha(args, step, state.max_steps)
        trainer.metrics.add("train", "anchor/alpha", alpha)
        trainer.anchor = None
        if alpha <= 0:
            self._release_generator(trainer)
        elif trainer.args.teacher_sampling_prompts == "reserve":
            self.fill(alpha, step)
        else:
            # The student's prompts of this step are known once its first micro-batch is.
            trainer.run_before_micro_batch(lambda: self.fill(alpha, step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing of the anchor outlives the run."""
        self._bound().anchor = None

    def fill(self, alpha: float, step: int) -> None:
        """Generate, judge and deal the teacher rollouts of one step."""
        trainer = self._bound()
        with trainer.timed("anchor"):
            micro_batches = self._rollouts(trainer, step)
            total, rollouts, verified, tokens, cached = self._counts(trainer, micro_batches)
        self.rollouts, self.verified, self.tokens = (
            self.rollouts + rollouts,
            self.verified + verified,
            self.tokens + tokens,
        )
        trainer.metrics.add("train", "anchor/verified_share", verified, rollouts)
        trainer.metrics.add("train", "anchor/rollouts", rollouts)
        trainer.metrics.add("train", "anchor/tokens", tokens)
        if trainer.rollout_cache is not None:
            trainer.metrics.add("train", "anchor/cache_hits", cached)
            trainer.metrics.add("train", "anchor/cache_misses", rollouts - cached)
        kept = [[row for row in rows if row.kept] for rows in micro_batches]
        alone = trainer.args.teacher_sampling_time_separated
        trainer.anchor = AnchorStep(alpha=alpha, total=total, micro_batches=kept, alone=alone)
        with trainer.timed("anchor"):
            self._prefetch(trainer, step + 1)

    # --- parts ---------------------------------------------------------------------------------------------------
    def _rollouts(self, trainer: "SGOPDTrainer", step: int) -> list[list[TeacherRollout]]:
        dealt, examples, samples = self._deal(trainer, step)
        rollouts = iter(self._generate(trainer, examples, samples, step))
        return [[next(rollouts) for _ in rows] for rows in dealt]

    def _prefetch(self, trainer: "SGOPDTrainer", step: int) -> None:
        """Have the teacher begin the rollouts of a step that has not come yet, if it can and they are known."""
        args, state = trainer.args, trainer.state
        known = inherits(type(self), TeacherAnchorCallback, "reserved_examples", "prompt_range")
        if args.teacher_sampling_prompts != "reserve" or not known or not prefetching_teachers(trainer.teacher):
            return
        if step > state.max_steps or self.alpha(args, step, state.max_steps) <= 0:
            return
        # A data set may draw random numbers when its rows are read.
        with forked_random_state(trainer.accelerator.device):
            _, examples, samples = self._deal(trainer, step)
            _, read, seed = self._prompts(trainer, examples, step)
        if trainer.rollout_cache is not None:
            trainer.rollout_cache.prefetch(examples, read, samples, seed)
        else:
            teacher: Any = teacher_of(trainer.teacher, examples)
            teacher.prefetch_rollouts(read, trainer.teacher_sampling, seed, trainer.generation_budget(read))

    def _deal(self, trainer: "SGOPDTrainer", step: int) -> tuple[list[list[int]], list[dict], list[int]]:
        """Slots of this rank by micro-batch, and the example and the sample index of each."""
        args, accelerator = trainer.args, trainer.accelerator
        first, end = self.prompt_range(trainer, step)
        prompts = end - first
        micro_batches = trainer.current_gradient_accumulation_steps
        slots = prompts * args.teacher_num_generations
        share = args.teacher_sampling_prompts == "share"
        # Ranks know only their own student prompts, so that all rollouts of one of them are made on its rank.
        together = args.teacher_num_generations if share else 1
        dealt = deal(slots, accelerator.num_processes, micro_batches, accelerator.process_index, together)
        own_slots = [slot for rows in dealt for slot in rows]
        own = [slot // args.teacher_num_generations for slot in own_slots]
        numbers = sorted(set(own))
        if share:
            chosen = dict(zip(numbers, self.student_examples(trainer, step, len(numbers)), strict=True))
        else:
            reserved = self.reserved_examples(trainer, step, prompts)
            chosen = {number: reserved[number] for number in numbers}
        examples = [chosen[number] for number in own]
        samples = self._samples(trainer, step, own_slots, examples)
        return dealt, examples, samples

    def _samples(self, trainer: "SGOPDTrainer", step: int, slots: list[int], examples: list[dict]) -> list[int]:
        """Sample index of each rollout of this rank, by which the cache tells rollouts of one prompt apart."""
        cache, each = trainer.rollout_cache, trainer.args.teacher_num_generations
        from_the_stream = inherits(type(self), TeacherAnchorCallback, "reserved_examples")
        if cache is not None and trainer.args.teacher_sampling_prompts == "reserve" and from_the_stream:
            first, _ = self.prompt_range(trainer, step)
            return stream_samples(prompt_stream(trainer), first, slots, each, cache.repeats)
        return step_samples([repr(example["prompt"]) for example in examples], step)

    def _generate(
        self, trainer: "SGOPDTrainer", examples: list[dict], samples: list[int], step: int
    ) -> list[TeacherRollout]:
        prompt_ids, read, seed = self._prompts(trainer, examples, step)
        if trainer.rollout_cache is not None:
            completion_ids, cached = trainer.rollout_cache.complete(examples, read, samples, seed)
        else:
            teacher, budget = teacher_of(trainer.teacher, examples), trainer.generation_budget(read)
            completion_ids = teacher.generate(read, trainer.teacher_sampling, seed, budget)
            cached = [False] * len(completion_ids)
        verdicts = trainer.judge(examples, completion_ids) if examples else []
        return [
            TeacherRollout(prompt, completion, self.keep(trainer.args, verdict), verdict, known)
            for prompt, completion, verdict, known in zip(prompt_ids, completion_ids, verdicts, cached, strict=True)
        ]

    def _prompts(
        self, trainer: "SGOPDTrainer", examples: list[dict], step: int
    ) -> tuple[list[list[int]], list[list[int]], int]:
        """Token ids of the student's and of the teacher's prompts, and the seed of this rank's rollouts."""
        prompt_ids = trainer.tokenize_prompts([example["prompt"] for example in examples]) if examples else []
        seed = mixed_seed(trainer.args.seed, 3, step, trainer.accelerator.process_index)
        return prompt_ids, teacher_prompt_ids(examples, prompt_ids, trainer.tokenize_prompts), seed

    def _counts(self, trainer: "SGOPDTrainer", micro_batches: list[list[TeacherRollout]]) -> list[Any]:
        """Denominator of the anchor, rollouts, verified rollouts, kept tokens and stored rollouts over all ranks."""
        rows = [row for rows in micro_batches for row in rows]
        verdicts = as_verdict_tensor([row.verdict for row in rows])
        counts = torch.tensor(
            [
                float(self._denominator(trainer, rows)),
                len(rows),
                int((verdicts == 1).sum()),
                sum(len(row.completion_ids) for row in rows if row.kept),
                sum(row.cached for row in rows),
            ],
            device=trainer.accelerator.device,
        )
        return trainer.accelerator.gather(counts.unsqueeze(0)).sum(dim=0).tolist()

    def _denominator(self, trainer: "SGOPDTrainer", rows: list[TeacherRollout]) -> Tensor | float:
        if not rows:
            return 0.0
        batch = TokenBatch.from_lists([[0]] * len(rows), [row.completion_ids for row in rows], 0, torch.device("cpu"))
        kept = torch.tensor([row.kept for row in rows])
        return anchor_denominator(batch.completion_mask, kept, trainer.args.teacher_sft_reduction)

    def _release_generator(self, trainer: "SGOPDTrainer") -> None:
        if not self._generator_released:
            trainer.teacher.stop_generating()
            self._generator_released = True

    def _bound(self) -> "SGOPDTrainer":
        if self._trainer is None:
            raise RuntimeError(
                "TeacherAnchorCallback must be passed in `callbacks` of an SGOPDTrainer, which binds it; it has no "
                "trainer. Pass it there instead of calling it yourself."
            )
        return self._trainer


def _schedule(args: Any) -> tuple[float, float, float, float]:
    """Phase ends and weights of Eq. 3, in the order of `anchor_schedule`."""
    return (
        args.teacher_sampling_phase1_end_frac,
        args.teacher_sampling_phase2_end_frac,
        args.teacher_sft_alpha_start,
        args.teacher_sft_alpha_end,
    )


def prompt_stream(trainer: Any) -> PromptStream:
    """The run's permutations of its training set, from which reserved teacher prompts are drawn."""
    return PromptStream(len(trainer.train_dataset), mixed_seed(trainer.args.seed, 1))


def sampling_of(trainer: "SGOPDTrainer") -> Sampling:
    """How the teacher writes its rollouts: as the student does, with its own length."""
    args: Any = trainer.args
    return Sampling(
        max_new_tokens=args.teacher_completion_length,
        eos_token_ids=tuple(trainer.eos_token_ids),
        pad_token_id=trainer.tokenizer.pad_token_id,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        generation_kwargs=trainer.vocabulary.without_unusable(args.generation_kwargs),
    )


def with_anchor_callback(callbacks: list | None, args: Any) -> list | None:
    """Add the anchor's callback unless the caller brought one."""
    if not args.teacher_sampling_enable or any(map(is_anchor_callback, callbacks or [])):
        return callbacks
    return [*(callbacks or []), TeacherAnchorCallback()]


def is_anchor_callback(callback: Any) -> bool:
    """Whether a callback, or a class of callbacks as transformers takes them too, is the anchor's."""
    kind = callback if isinstance(callback, type) else type(callback)
    return issubclass(kind, TeacherAnchorCallback)


class AnchorBinding(TrainerCallback):
    """Binds every anchor callback to the trainer when training starts, those restored from a checkpoint too."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bind."""
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TeacherAnchorCallback):
                callback.bind(self.trainer)
