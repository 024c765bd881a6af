"""The only file that touches TRL's private names, and what of them the rest of the package may use.

`GRPOSeam` turns the private steps of `GRPOTrainer` into hooks with public names; the functions below it wrap TRL's
fused head and model preparation. Supported: `trl>=1.16,<1.17`; `tests/contract` fails when TRL moves a name.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.distributed import DistributedBackend
from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id, is_async_callable

from .generation import generate_completions
from .metrics import timed
from .packing import packed_log_probs, packs_exactly

__all__ = [
    "GRPOSeam",
    "add_fused_head",
    "create_model_from_path",
    "fused_log_probs",
    "get_config_model_id",
    "is_async_callable",
    "is_conversational",
    "is_sharded",
    "model_for_generation",
    "prepare_frozen_model",
]

STATE_FILE = "sg_opd_state.json"


class GRPOSeam(GRPOTrainer):
    """`GRPOTrainer` with hooks in place of its private steps; it changes nothing by itself.

    A subclass overrides `on_rewards`, `on_rollouts`, `on_micro_batch` and `checkpoint_state`, and may run its own
    forward in place of the one inside TRL's loss through `policy_forward`.
    """

    args: Any
    model: Any
    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._loss_forward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]] | None = None
        super().__init__(*args, **kwargs)

    # --- hooks ---------------------------------------------------------------------------------------------------
    def on_rewards(self, rewards: Tensor) -> None:
        """Called with the rewards of all ranks, `(rows of all ranks, reward functions)`, NaN where abstained."""

    def on_rollouts(self, rollouts: dict, examples: list[dict]) -> dict:
        """Called with this rank's scored generation batch, before it is shuffled and split; returns what is used."""
        return rollouts

    def on_slices(self, slices: list[dict]) -> list[dict]:
        """Called with a new generation batch, shuffled and split into micro-batches; returns what is buffered."""
        return slices

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

    def tokenize_prompts(self, prompts: list) -> list[list[int]]:
        """Token ids of prompts, rendered exactly as for the student's rollouts."""
        return self._tokenize_prompts(prompts)[0]

    def window_entries(self, name: str) -> Tensor:
        """One entry of all buffered rows of the current optimizer step on this rank, `(rows, ...)`."""
        slices = min(self.current_gradient_accumulation_steps, self.args.steps_per_generation)
        first = self._step % self.args.steps_per_generation
        wanted = [(first + i) % self.args.steps_per_generation for i in range(slices)]
        return torch.cat([self._buffered_inputs[i][name] for i in wanted])

    @contextmanager
    def student_scoring(self) -> Iterator[Any]:
        """The student for scoring without gradient: gradient checkpointing off, otherwise as it is."""
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            yield self.model

    @contextmanager
    def policy_forward(self, forward: Callable) -> Iterator[None]:
        """Have `forward(run, input_ids, attention_mask, completion_length)` replace the loss's policy forward.

        `run(input_ids, attention_mask, completion_length)` is TRL's own forward, all other arguments passed through;
        it returns `(log-probs, entropies, auxiliary loss)`, and so must `forward`.
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

        def run(ids: Tensor, mask: Tensor, keep: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
            with compact_head():
                if plain and packs_exactly(model):
                    with self.accelerator.autocast():
                        logps, entropies = packed_log_probs(model, ids, mask, keep)
                    return logps, entropies if wants_entropy else None, None
                return super(GRPOSeam, self)._get_per_token_logps_and_entropies(
                    model, ids, mask, keep, *args, **kwargs
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
            return generate_completions(model, prompt_ids, self.generation_config), None

    def _generate(self, prompts: list) -> Any:
        with timed(self.seconds, "rollout"):
            return super()._generate(prompts)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        with timed(self.seconds, "verify"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            self.on_rewards(rewards)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        return self.on_rollouts(super()._generate_and_score_completions(inputs), inputs)

    def _prepare_inputs(self, generation_batch: Any) -> dict:
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


def add_fused_head(model: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool) -> None:
    """Give a frozen model TRL's fused head: log-probs at the student's temperature, logits never built."""
    base: Any = model
    if hasattr(model, "peft_config"):
        base = base.get_base_model()
    add_fused_lm_head(base, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32)


def fused_log_probs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
    """Log-probs of the last `completion_length` tokens, `(B, completion_length)` float32; 0 where the mask is 0."""
    with compact_head():
        if packs_exactly(model):
            return packed_log_probs(model, input_ids, attention_mask, completion_length)[0]
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :-completion_length] = -100
        outputs = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    return outputs.log_probs[:, -completion_length:]


@contextmanager
def compact_head() -> Iterator[None]:
    """Have TRL's fused head project only the positions that count on the CPU too, where it projects all of them.

    TRL asks one function whether the device runs Triton, and projects fewer positions only there, because some other
    devices compile anew for every shape. The CPU does not.
    """
    original = trl_utils._use_triton
    trl_utils._use_triton = lambda device: device.type == "cpu" or original(device)
    try:
        yield
    finally:
        trl_utils._use_triton = original


def is_sharded(accelerator: Any) -> bool:
    """Whether a forward of a prepared frozen model is a collective operation."""
    backend = DistributedBackend(accelerator)
    return backend.is_fsdp or backend.is_zero3


def prepare_frozen_model(model: PreTrainedModel, accelerator: Any) -> Any:
    """Place a frozen model as TRL places its own reference model: DeepSpeed, FSDP or plain."""
    backend = DistributedBackend(accelerator)
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(model, accelerator)
    if backend.is_fsdp:
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


@contextmanager
def model_for_generation(model: nn.Module, accelerator: Any) -> Iterator[PreTrainedModel]:
    """The frozen model unwrapped for `generate`, its shards gathered where that is needed."""
    backend = DistributedBackend(accelerator)
    gathered = backend.summon_full_params(model, recurse=False) if backend.is_fsdp else nullcontext()
    with unwrap_model_for_generation(model, accelerator) as unwrapped, torch.no_grad(), gathered:
        yield unwrapped
