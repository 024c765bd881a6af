"""The private steps of TRL's GRPO trainer as hooks with public names."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing

from ..generation import generate_completions
from ..head_request import HeadRequest, pick_padded
from ..metrics import timed
from ..packing import packed_log_probs, should_pack
from .models import compact_head, fused_log_probs, is_sharded

STATE_FILE = "sg_opd_state.json"

OnCompletions = Callable[[Sequence[list[int]], Sequence[int], Sequence[list[int]]], None]
"""`(prompts of all rows, numbers of rows that are written, their completions)`; a row may be named twice."""


class GRPOSeam(GRPOTrainer):
    """`GRPOTrainer` with hooks in place of its private steps; it changes nothing by itself.

    A subclass overrides `on_rewards`, `on_rollouts`, `on_micro_batch` and `checkpoint_state`, and may run its own
    forward in place of the one inside TRL's loss through `policy_forward`.
    """

    args: Any
    model: Any
    _buffered_inputs: Any

    on_completions: OnCompletions | None = None
    """Is told of completions while others are still written, and of all of them before they are judged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._loss_forward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]] | None = None
        super().__init__(*args, **kwargs)

    # --- hooks ---------------------------------------------------------------------------------------------------
    def making_rollouts(self, examples: list[dict]) -> AbstractContextManager[None]:
        """Surrounds the making of this rank's generation batch, from prompts to `on_rollouts`."""
        return nullcontext()

    def on_rewards(self, rewards: Tensor) -> None:
        """Called with the rewards of all ranks, `(rows of all ranks, reward functions)`, NaN where abstained."""

    def on_rollouts(self, rollouts: dict, examples: list[dict]) -> dict:
        """Called with this rank's scored generation batch, before it is shuffled and split; returns what is used."""
        return rollouts

    def on_slices(self, slices: list[dict]) -> list[dict]:
        """Called with a new generation batch, shuffled and split into micro-batches; returns what is buffered."""
        return slices

    @property
    def needs_rollouts(self) -> bool:
        """Whether the next micro-batch is made of rollouts; otherwise the loss gets an empty one."""
        return True

    def score_for_trl(self, model: Any, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
        """Log-probs `(B, completion_length)` of the old policy or TRL's own reference, without gradient."""
        with self.accelerator.autocast():
            return fused_log_probs(model, input_ids, attention_mask, completion_length)

    def on_micro_batch(self, inputs: dict) -> dict:
        """Called with the micro-batch that the loss is about to see; returns what is used."""
        return inputs

    def on_grad_norm(self, grad_norm: Any) -> None:
        """Called with the norm of the gradient, before the optimizer's step unless DeepSpeed has taken it already."""

    def checkpoint_state(self) -> dict:
        """JSON-ready facts that go into every checkpoint."""
        return {}

    def check_checkpoint_state(self, state: dict) -> None:
        """Called with the facts of the checkpoint that training resumes from."""

    # --- what a subclass may read --------------------------------------------------------------------------------
    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer, also where the processing class wraps it."""
        return self._tokenizer

    @property
    def tags(self) -> list[str]:
        """Tags of the model card."""
        return self._tag_names

    @property
    def citation(self) -> str:
        """BibTeX entry of the paper."""
        return self._paper["citation"]

    @property
    def event_loop(self) -> Any:
        """TRL's running loop for async reward functions, None without any."""
        return self.async_loop if self._has_async_funcs else None

    @property
    def is_multimodal(self) -> bool:
        """Whether the student takes images."""
        return self._is_vlm

    @property
    def mode(self) -> str:
        """`train` or `eval`, as TRL tells them apart."""
        return "train" if self.model.training else "eval"

    @property
    def sharded(self) -> bool:
        """Whether frozen models are sharded, so that all ranks must run them the same number of times."""
        return is_sharded(self.accelerator)

    def report_metric(self, mode: str, name: str, value: float) -> None:
        """Log a value with TRL's own metrics; values of one logging window are averaged."""
        self._metrics[mode][name].append(value)

    def suppress_tokens(self, ids: list[int]) -> None:
        """Have the student never sample these ids; vLLM does its own sampling and is not told."""
        wanted = sorted({*ids, *(self.generation_config.suppress_tokens or ())})
        self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = wanted

    def tokenize_prompts(self, prompts: list) -> list[list[int]]:
        """Token ids of prompts, rendered exactly as for the student's rollouts."""
        return self._tokenize_prompts(prompts)[0]

    def window_entries(self, name: str) -> Tensor:
        """One entry of all buffered rows of the current optimizer step on this rank, `(rows, ...)`."""
        slices = min(self.current_gradient_accumulation_steps, self.args.steps_per_generation)
        first = self._step % self.args.steps_per_generation
        wanted = [(first + i) % self.args.steps_per_generation for i in range(slices)]
        return torch.cat([self._buffered_inputs[i][name] for i in wanted])

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the current step, as the training loop does."""
        self._save_checkpoint(self.model, trial=None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    @contextmanager
    def student_scoring(self) -> Iterator[Any]:
        """The student for scoring without gradient: gradient checkpointing off, otherwise as it is."""
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            yield self.model

    def policy_log_probs(self, model: Any, input_ids: Tensor, mask: Tensor, completion_length: int) -> Tensor:
        """Log-probs `(B, completion_length)` of the student, with gradient."""
        return self._get_per_token_logps_and_entropies(model, input_ids, mask, completion_length)[0]

    @contextmanager
    def policy_forward(self, forward: Callable) -> Iterator[None]:
        """Have `forward(run, input_ids, attention_mask, completion_length)` replace the loss's policy forward.

        `run(input_ids, attention_mask, completion_length, request=None)` is TRL's own forward, all other arguments
        passed through; it returns `(log-probs, entropies, auxiliary loss)`, and so must `forward`. A `HeadRequest` is
        answered in the same forward.
        """
        self._loss_forward = forward
        try:
            yield
        finally:
            self._loss_forward = None

    # --- TRL's private steps -------------------------------------------------------------------------------------
    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        wants_entropy = bool(kwargs.get("compute_entropy"))
        # Images, the auxiliary loss of experts and batches of TRL's own need its padded rows.
        plain = not args and all(v is None or v is False for k, v in kwargs.items() if k != "compute_entropy")

        def run(
            ids: Tensor, mask: Tensor, keep: int, request: HeadRequest | None = None
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:
            with compact_head(ids.device):
                if plain and should_pack(model, mask):
                    with self.accelerator.autocast():
                        logps, entropies = packed_log_probs(model, ids, mask, keep, request)
                    return logps, entropies if wants_entropy else None, None
                # TRL does nothing with the model but call it.
                asked: Any = request.asked_of(model, (len(ids), keep), pick_padded(keep)) if request else model
                return super(GRPOSeam, self)._get_per_token_logps_and_entropies(
                    asked, ids, mask, keep, *args, **kwargs
                )

        forward, self._loss_forward = self._loss_forward, None
        if forward is not None:
            return forward(run, input_ids, attention_mask, logits_to_keep)
        if torch.is_grad_enabled() or args or wants_entropy or kwargs.get("pixel_values") is not None:
            return run(input_ids, attention_mask, logits_to_keep)
        return self.score_for_trl(model, input_ids, attention_mask, logits_to_keep), None, None

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        other = self.use_vllm or self.use_transformers_continuous_batching or self.is_multimodal or self.sharded
        # TRL cuts at its own end tokens even where the settings name others; with tools it writes turn by turn.
        if other or self.tools or "eos_token_id" in (self.args.generation_kwargs or {}):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            told = None if self.on_completions is None else partial(self.on_completions, prompt_ids)
            return generate_completions(model, prompt_ids, self.generation_config, on_ended=told), None

    def _generate(self, prompts: list) -> Any:
        with timed(self.seconds, "rollout"):
            written = super()._generate(prompts)
        if self.on_completions is not None:
            prompt_ids, completion_ids = written[:2]
            self.on_completions(prompt_ids, range(len(completion_ids)), completion_ids)
        return written

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        with timed(self.seconds, "verify"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            self.on_rewards(rewards)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        with self.making_rollouts(inputs):
            return self.on_rollouts(super()._generate_and_score_completions(inputs), inputs)

    def _prepare_inputs(self, generation_batch: Any) -> dict:
        if not self.needs_rollouts:
            return {}
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before:
            self._buffered_inputs = self.on_slices(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return self.on_micro_batch(inputs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.on_grad_norm(grad_norm)
        return grad_norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / STATE_FILE).write_text(json.dumps(self.checkpoint_state(), indent=2), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / STATE_FILE).is_file():
            self.check_checkpoint_state(json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8")))
