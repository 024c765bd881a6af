"""The trainers that are compared, each made to run single optimizer steps on the same injected rollouts.

Every trainer is TRL's own or ours, unchanged but for the one call that samples completions:

- `GRPOTrainer`, `SGOPDTrainer` and `DistillationTrainer` sample a whole generation batch in `_generate_single_turn`.
- `IWOPDTrainer` and `GKDTrainer` call the student's `generate` once per micro-batch. In its place comes what it would
  return for these rows: prompts and completions, padded to the longest completion of this micro-batch only, so that
  both pay for less padding than the trainers that pad to the longest row of the generation batch.

All distil with reverse KL (`beta=1`), without gradient checkpointing, with the same optimizer.
"""

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from harness import ROLLOUTS_PER_PROMPT, Rollouts, Shape, alternating_verifier, build_model, build_tokenizer, timed
from torch import Tensor
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

from sg_opd_trl import SGOPDConfig, SGOPDTrainer
from sg_opd_trl.baselines.gkd import PromptCollator
from sg_opd_trl.models.batch import pad_rows
from sg_opd_trl.trl_seam import add_fused_head, fused_forward

PAD = 0


@dataclass(frozen=True)
class Setup:
    """Rows and models of one comparison; `settings` are further training arguments of all trainers."""

    shape: Shape
    rollouts: Rollouts
    micro_batch: int = 4
    settings: dict = field(default_factory=dict)
    build: Callable[[str], Any] | None = None

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer step."""
        return len(self.rollouts.completion_ids) // self.micro_batch

    def student(self) -> Any:
        """A new student; the same for every trainer."""
        return self.build("student") if self.build else build_model(self.shape, 0)

    def teacher(self) -> Any:
        """The teacher, of the student's size unless `build` says otherwise."""
        return self.build("teacher") if self.build else build_model(self.shape, 1)

    def tokenizer(self) -> Any:
        """One word per id."""
        return build_tokenizer(self.shape.vocab_size)

    def arguments(self, **settings: Any) -> dict:
        """Configuration of one optimizer step over injected rollouts, valid for every trainer here."""
        return {
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self.micro_batches,
            "use_cpu": not torch.cuda.is_available(),
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            "learning_rate": 1e-6,
            "max_steps": 1000,
            "save_strategy": "no",
            "logging_strategy": "no",
            **self.settings,
            **settings,
        }

    @property
    def completion_limit(self) -> dict:
        """The longest completion allowed, above the longest there is."""
        return {"max_completion_length": max(1024, *map(len, self.rollouts.completion_ids))}


class Recorded:
    """Stands in for the call that samples, and counts how often it was asked."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer, self.calls = answer, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer instead of sampling."""
        self.calls += 1
        return self.answer(*args, **kwargs)


class Stepper:
    """Runs single optimizer steps of a trainer.

    Args:
        trainer: with its rollouts injected.
        batches: what the trainer's loop would hand to each micro-batch of one optimizer step.
        recorded: the injected rollouts.
    """

    def __init__(self, trainer: Any, batches: list, recorded: Recorded) -> None:
        self.trainer, self.batches, self.recorded = trainer, batches, recorded
        trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps

    def __call__(self) -> float:
        """One optimizer step; returns its seconds."""
        self.trainer.model.train()
        asked = self.recorded.calls
        seconds = timed(self._step)
        if self.recorded.calls == asked:
            raise RuntimeError(f"{type(self.trainer).__name__} did not take the injected rollouts of this step.")
        return seconds

    def _step(self) -> None:
        trainer = self.trainer
        for i, batch in enumerate(self.batches):
            trainer.accelerator.gradient_state._set_sync_gradients(i == len(self.batches) - 1)
            trainer.training_step(trainer.model, copy.copy(batch), None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    def create_optimizer_state(self) -> None:
        """Have the optimizer allocate its state, as after a first step."""
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()


def ours(setup: Setup, arguments: dict | None = None, **settings: Any) -> Stepper:
    """`SGOPDTrainer` with teacher and reference scoring, with further arguments and settings of its own."""
    fixed = {"num_generations": ROLLOUTS_PER_PROMPT, "teacher_sampling_enable": False}
    args = SGOPDConfig(**(setup.arguments(**setup.completion_limit) | fixed | settings))
    trainer = SGOPDTrainer(
        setup.student(),
        alternating_verifier,
        args,
        setup.rollouts.dataset(),
        processing_class=setup.tokenizer(),
        teacher_model=setup.teacher(),
        teacher_processing_class=setup.tokenizer(),
        **(arguments or {}),
    )
    return _single_turn(trainer, setup, (setup.rollouts.completion_ids, None))


def opd(setup: Setup) -> Stepper:
    """`SGOPDTrainer` with the gate off and lambda 1: no reference."""
    return ours(setup, sign_gated_extrapolation=False)


def grpo(setup: Setup) -> Stepper:
    """TRL's `GRPOTrainer`: no teacher, no reference."""
    args = GRPOConfig(**setup.arguments(**setup.completion_limit), num_generations=ROLLOUTS_PER_PROMPT)
    trainer = GRPOTrainer(
        setup.student(), alternating_verifier, args, setup.rollouts.dataset(), processing_class=setup.tokenizer()
    )
    return _single_turn(trainer, setup, (setup.rollouts.completion_ids, None))


def distillation(setup: Setup) -> Stepper:
    """TRL's `DistillationTrainer`, reverse KL over the whole vocabulary."""
    args = DistillationConfig(**setup.arguments(**setup.completion_limit, beta=1.0))
    trainer = DistillationTrainer(
        setup.student(), setup.teacher(), args, setup.rollouts.dataset(), processing_class=setup.tokenizer()
    )
    return _single_turn(trainer, setup, setup.rollouts.completion_ids)


def iw_opd(setup: Setup) -> Stepper:
    """TRL's experimental `IWOPDTrainer` with its own objective, on the sampled tokens."""
    limit = setup.completion_limit["max_completion_length"]
    args = IWOPDConfig(
        **setup.arguments(**setup.completion_limit, max_length=limit + 512),
        distillation_objective="iw_opd",
        lmbda=1.0,
        num_generations=ROLLOUTS_PER_PROMPT,
    )
    tokenizer, teacher = setup.tokenizer(), setup.teacher()
    # It loads the teacher's tokenizer from where the teacher's weights are said to come from.
    tokenizer.save_pretrained(folder := tempfile.mkdtemp())
    teacher.config._name_or_path = folder
    trainer = IWOPDTrainer(setup.student(), teacher, args, None, setup.rollouts.dataset(), processing_class=tokenizer)
    trainer.model.generate = recorded = _recorded_generate(setup)
    everything = _prompt_tensors(setup, slice(None), trainer.accelerator.device)
    return Stepper(trainer, [everything] * setup.micro_batches, recorded)


def gkd(setup: Setup) -> Stepper:
    """TRL's experimental `GKDTrainer`, reverse KL over the whole vocabulary, on-policy only."""
    args = GKDConfig(**setup.arguments(beta=1.0, lmbda=1.0, temperature=1.0), max_length=None)
    trainer = GKDTrainer(
        setup.student(), setup.teacher(), args, None, setup.rollouts.dataset(), processing_class=setup.tokenizer()
    )
    trainer.model.generate = recorded = _recorded_generate(setup)
    device = trainer.accelerator.device
    return Stepper(trainer, [_prompt_tensors(setup, rows, device) for rows in _micro_batch_rows(setup)], recorded)


def bare_scoring(stepper: Stepper, setup: Setup) -> Callable[[], float]:
    """A trainer's step plus a plain teacher and reference forward over its own micro-batches."""
    trainer = stepper.trainer
    models = [setup.teacher().to(trainer.accelerator.device), setup.student().to(trainer.accelerator.device)]
    for model in models:
        add_fused_head(model, 1.0, False)

    @torch.no_grad()
    def score() -> None:
        for model, batch in itertools.product(models, trainer._buffered_inputs):
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            fused_forward(model, ids, mask, batch["completion_ids"].size(1))

    return lambda: stepper() + timed(score)


def _single_turn(trainer: Any, setup: Setup, result: Any) -> Stepper:
    examples = [{"prompt": p} for p in setup.rollouts.prompts for _ in range(ROLLOUTS_PER_PROMPT)]
    trainer._generate_single_turn = recorded = Recorded(lambda *args, **kwargs: result)
    return Stepper(trainer, [examples] * setup.micro_batches, recorded)


def _micro_batch_rows(setup: Setup) -> list[slice]:
    starts = range(0, len(setup.rollouts.completion_ids), setup.micro_batch)
    return [slice(start, start + setup.micro_batch) for start in starts]


def _prompt_tensors(setup: Setup, rows: slice, device: torch.device) -> dict[str, Tensor]:
    """Prompts of some rows as TRL's collators of prompt-only data make them."""
    words = [prompt.split() for prompt in setup.rollouts.prompts for _ in range(ROLLOUTS_PER_PROMPT)][rows]
    batch = PromptCollator(PAD)([{"prompt_ids": [int(word[1:]) for word in row]} for row in words])
    return {name: values.to(device) for name, values in batch.items()}


def _recorded_generate(setup: Setup) -> Recorded:
    """A student's `generate` that returns the injected rows, micro-batch by micro-batch, for ever."""
    turns: Iterator[slice] = itertools.cycle(_micro_batch_rows(setup))

    def generate(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        completions, _mask = pad_rows(setup.rollouts.completion_ids[next(turns)], PAD, left=False)
        return SimpleNamespace(sequences=torch.cat([input_ids, completions.to(input_ids.device)], dim=1))

    return Recorded(generate)
