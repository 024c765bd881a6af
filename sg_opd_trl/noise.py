"""Rounding noise of a2, measured before the first step: what the gate reads where teacher and student are the same.

a2 is the difference of two forwards that agree in their mathematics alone: the student's in training, in micro-batches
that may be padded, and a frozen model's, packed where that saves work and beside other rows. Rounding differs between
them, and the gate looks at a sign, which rounding has too. In half precision all padding stands behind the rows
(`models.forward.padding_behind`), which leaves next to nothing of it; with prompts padded on the left, bfloat16 called
four tenths of the tokens on which both models agree exactly consensus or conflict. A kernel or a model that rounds
otherwise is found here.

So the student scores a few rows of its own, once as it is trained and once as a frozen copy of it would be scored.
Where `gate_dead_zone` is a number and too small for what is found, a warning says so; "auto" is chosen from it.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .agreement import plain_ids
from .config import SGOPDConfig
from .data import first_prompts
from .errors import NonFiniteError
from .models.batch import TokenBatch
from .models.forward import ForwardOutput
from .models.generate import generate_completions
from .models.internals import inner_model
from .random_state import forked_random_state
from .run import Run
from .setting import AUTO, default_of
from .teachers.base import Sampling
from .teachers.local import generation_config
from .teachers.reference import evaluating
from .teachers.routed import RoutedTeacher
from .teachers.server import ServerTeacher

logger = logging.getLogger(__name__)

QUANTILE = 0.95
"""Of the noise, what "auto" leaves inside the dead zone, and what a number should leave there (our choice)."""
NOTABLE = 1 - QUANTILE
"""Share of the noise outside the dead zone from which it is told."""
WIDEN = 'Set gate_dead_zone="auto" or a number; docs/methods.md says what it costs.'
SMALLEST: float = default_of(SGOPDConfig.__dataclass_fields__["gate_dead_zone"])
"""What "auto" does not go below: a few rows may show no noise where thousands have some."""

# How much is looked at (our choice): a few hundred tokens tell a share of 5% from one of 40%, in the time of a step.
_ROLLOUTS_PER_PROMPT = 2
_WRITTEN_TOKENS = 32
_PROMPT_TOKENS = 256
# Lengths of made-up prompts.
_UNKNOWN_PROMPTS = (9, 33, 17, 57)


class Noise(NamedTuple):
    """What was measured, the largest over all ranks.

    Attributes:
        quantile: |a2| in nats that 95% of the tokens stay below, though teacher and student are the same.
        gated: share of the tokens above the dead zone.
    """

    quantile: float
    gated: float

    def told(self) -> str:
        """What it means for the gate."""
        return (
            f"where teacher and student agree exactly, {self.gated:.0%} of the tokens have an abs(a2) above it, and "
            f"the gate would read a sign that is noise ({QUANTILE:.0%} stay below {self.quantile:.2g})."
        )


class MeasuredRun(Run, Protocol):
    """A run whose student can be trained, scored and sampled.

    Attributes:
        teacher: of the run.
        teacher_sampling: how rollouts are drawn.
        aux_loss_enabled: whether the loss asks a mixture of experts for its balance.
        sharded: whether a forward is a collective operation.
        width_multiple: what the widths of all batches are multiples of.
    """

    teacher: Any
    teacher_sampling: Sampling
    aux_loss_enabled: bool

    @property
    def sharded(self) -> bool:
        """See there."""

    @property
    def width_multiple(self) -> int:
        """See there."""

    def student_writing(self) -> AbstractContextManager[Any]:
        """The student unwrapped for `generate_completions`, without gradient."""

    def run_policy(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_length: int,
        *,
        auxiliary_loss: bool = False,
    ) -> ForwardOutput:
        """One forward of the student, in the run's precision and with gradient where that is on."""

    def score_with_student(self, batch: TokenBatch, rows: Tensor) -> Tensor:
        """The student's log-probs, `(B, T)` float32, without gradient and in the layout of frozen models."""


class GateNoise(TrainerCallback):
    """Holds the dead zone of a run, and measures its noise when the training starts.

    Args:
        run: whose gate it is for.
        heeded: whether the gate is the trainer's own, which reads the dead zone.
    """

    def __init__(self, run: MeasuredRun, *, heeded: bool) -> None:
        self.run, self.heeded = run, heeded
        self._chosen: float | None = None
        self._compared = False

    @property
    def automatic(self) -> bool:
        """Whether the dead zone is chosen from the noise."""
        args: Any = self.run.args  # its type is for parsers
        return args.gate_dead_zone == AUTO

    @property
    def dead_zone(self) -> float:
        """In nats: the number that is set, or the one that was chosen, at first use."""
        if not self.automatic:
            return self.run.args.gate_dead_zone
        return self._choose() if self._chosen is None else self._chosen

    def ready(self) -> None:
        """Have the dead zone before the first forward that asks for it, which another one would disturb."""
        if self.automatic and self._chosen is None and self.run.args.sign_gated_extrapolation:
            self._choose()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the dead zone, or see whether the one that is set is wide enough; once for a run."""
        self.ready()
        settings = self.run.args
        if self._compared or self.automatic or not (settings.preflight and settings.sign_gated_extrapolation):
            return
        self._compared = True
        if self.heeded and can_be_measured(self.run):
            self._compare(self.dead_zone)

    def facts(self) -> dict:
        """The dead zone that was chosen, for `restore`."""
        return {"gate_dead_zone": self._chosen}

    def restore(self, state: dict) -> None:
        """Go on with the dead zone of the checkpoint: the noise of a half-trained student may be another."""
        if self.automatic and state.get("gate_dead_zone") is not None:
            self._chosen = float(state["gate_dead_zone"])
            logger.info("`gate_dead_zone` is %.3g, as chosen when the run began.", self._chosen)

    def _choose(self) -> float:
        self._chosen = max(SMALLEST, measure(self.run, SMALLEST).quantile)
        logger.info(
            '`gate_dead_zone`="auto" is %.3g: %.0f%% of the rounding noise of this run stays below.',
            self._chosen,
            100 * QUANTILE,
        )
        return self._chosen

    def _compare(self, dead_zone: float) -> None:
        noise = measure(self.run, dead_zone)
        if noise.gated > NOTABLE:
            logger.warning(
                "`gate_dead_zone`=%g is below the rounding noise of this run: %s %s", dead_zone, noise.told(), WIDEN
            )


def can_be_measured(run: MeasuredRun) -> bool:
    """Whether no teacher is a server, whose numerics nothing here shows; binding one says what to set."""
    several = run.teacher.distinct if isinstance(run.teacher, RoutedTeacher) else [run.teacher]
    return not any(isinstance(one, ServerTeacher) for one in several)


# --- the measurement -------------------------------------------------------------------------------------------------
def measure(run: MeasuredRun, dead_zone: float) -> Noise:
    """The noise of a2 where teacher and student are the same, the largest over all ranks.

    Weights, gradients and the random state stay as they are; every rank runs the same forwards.

    Args:
        run: its student is the one that is measured.
        dead_zone: for the share of tokens above it.
    """
    noise = noise_of(run)
    own = noise.new_zeros(1, 2)
    if noise.numel():
        own[0] = torch.stack([noise.quantile(QUANTILE), (noise > dead_zone).float().mean()])
    ranks = run.accelerator.gather(own)
    return Noise(*ranks.amax(dim=0).tolist())


def noise_of(run: MeasuredRun) -> Tensor:
    """`(N,)` float32, absolute differences in nats between two scores of the student's own tokens.

    What is not finite is left out: the first step stops at it, and says what it is.
    """
    with forked_random_state(run.accelerator.device):
        torch.manual_seed(run.args.seed)
        try:
            batch = _rollouts(run)
        except NonFiniteError:
            return torch.zeros(0, device=run.accelerator.device)
        noise = (_as_trained(run, batch) - _as_scored(run, batch))[batch.completion_mask != 0].abs()
    return noise[torch.isfinite(noise)]


def _rollouts(run: MeasuredRun) -> TokenBatch:
    """The student's own completions of the first prompts: noise is smaller where a model is sure of a token."""
    prompts = [prompt for prompt in _prompts(run) for _ in range(_ROLLOUTS_PER_PROMPT)]
    sampling = replace(run.teacher_sampling, max_new_tokens=min(_WRITTEN_TOKENS, run.args.max_completion_length or 1))
    with run.student_writing() as student, evaluating(student), run.accelerator.autocast():
        written = generate_completions(student, prompts, generation_config(sampling), synced_gpus=run.sharded)
    padding, device = run.tokenizer.pad_token_id, run.accelerator.device
    return TokenBatch.from_lists(prompts, written, padding, device, run.width_multiple)


def _prompts(run: MeasuredRun) -> list[list[int]]:
    """The first prompts, long ones shortened alike: it is their different lengths that make padding."""
    if run.environment_factories is not None or run.train_dataset is None:
        # An environment writes its own prompts, which nobody knows yet.
        known = plain_ids(run.tokenizer, inner_model(run.model).config.get_text_config().vocab_size)
        return [[known[7 * i % len(known)] for i in range(length)] for length in _UNKNOWN_PROMPTS]
    prompts = run.tokenize_prompts(first_prompts(run.train_dataset))
    share = min(1.0, _PROMPT_TOKENS / max(1, *map(len, prompts)))
    return [prompt[-max(1, round(share * len(prompt))) :] for prompt in prompts]


def _as_trained(run: MeasuredRun, batch: TokenBatch) -> Tensor:
    """`(B, T)` log-probs from the forward of a training step: its micro-batches, its mode, its graph."""
    student, result = run.model, torch.zeros(batch.completion_ids.shape, device=batch.completion_ids.device)
    order = batch.joined()[1].sum(dim=1).argsort(descending=True, stable=True)
    # Shards wait for the backward of a forward with a graph.
    with _in_training(run), torch.set_grad_enabled(not run.sharded):
        for rows in order.split(run.args.per_device_train_batch_size):
            part = batch.select(rows)
            width = part.completion_ids.size(1)
            output = run.run_policy(student, *part.joined(), width, auxiliary_loss=run.aux_loss_enabled)
            result[rows, :width] = output.logps.detach().float()
    return result


@contextmanager
def _in_training(run: MeasuredRun) -> Iterator[None]:
    """The student as a training step has it, also before the first one; as it was afterwards."""
    student, args = run.model, run.args
    was_training, missing = student.training, args.gradient_checkpointing and not run.model.is_gradient_checkpointing
    student.train()
    if missing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
    try:
        yield
    finally:
        if missing:
            student.gradient_checkpointing_disable()
        student.train(was_training)


def _as_scored(run: MeasuredRun, batch: TokenBatch) -> Tensor:
    """The same from the forwards of a frozen model: without a graph, and beside other rows than in training."""
    every_second = torch.arange(len(batch), device=batch.completion_ids.device) % 2 == 0
    with evaluating(run.model):
        return run.score_with_student(batch, every_second) + run.score_with_student(batch, ~every_second)
