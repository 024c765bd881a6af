"""TRL's private names around models: its fused head, and how frozen models are placed."""

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.distributed import DistributedBackend
from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.trainer import utils as trl_utils
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head, maybe_gather_lm_head_ctx

from ..head_request import HeadRequest, pick_padded
from ..heads import OutputHead
from ..packing import packed_log_probs, should_pack

# Columns of the vocabulary that are projected at once on the CPU.
_CPU_TILE_WIDTH = 1024


@dataclass
class HeadCausalLMOutput(FusedCausalLMOutput):
    """What a model with a fused head returns, and what was computed from its hidden states beside that."""

    head_output: tuple[Tensor, ...] | None = None


def add_fused_head(model: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool) -> None:
    """Give a frozen model TRL's fused head: log-probs at the student's temperature, logits never built."""
    add_fused_lm_head(_base(model), temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32)
    add_head_output(model)


def add_head_output(model: nn.Module) -> None:
    """Let a model with a fused head answer a `HeadRequest` in its forward, given as the argument `head_output`.

    The answer is part of what the forward returns: replicas and shards take their gradients from there.
    """
    base = _base(model)
    fused: Any = base.forward.__func__
    if hasattr(fused, "answers_requests"):
        return
    # What TRL made of the model's configuration; its names and rules are not repeated here.
    base.sg_opd_head = {name: inspect.getclosurevars(fused).nonlocals[name] for name in _HEAD_SETTINGS}

    # The original signature: `generate` validates its arguments against it.
    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, head_output: Any = None, **kwargs: Any) -> Any:
        if head_output is None:
            return fused(self, *args, **kwargs)
        with _last_hidden_state(getattr(self, self.sg_opd_head["backbone_attr"])) as states:
            outputs = fused(self, *args, **kwargs)
        head = output_head(self)
        # Labels that TRL shifts itself leave the last position without one.
        hidden_states = states[0] if "shift_labels" in kwargs else states[0][:, :-1]
        with head.gathered(head.weight, head.bias):
            answer = head_output(hidden_states.to(head.weight.device), outputs.log_probs, head)
        return HeadCausalLMOutput(**outputs, head_output=answer)

    forward.answers_requests = True  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)


_HEAD_SETTINGS = (
    "backbone_attr",
    "temperature",
    "cast_lm_head_to_fp32",
    "logit_scale",
    "final_logit_softcapping",
)


def output_head(model: nn.Module) -> OutputHead:
    """The output head of a model with a fused head as it is now, computing what the fused head computes."""
    base = _base(model)
    settings, layer = base.sg_opd_head, base.get_output_embeddings()
    weight, bias = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (layer.weight, layer.bias))
    return OutputHead(
        weight,
        bias,
        temperature=settings["temperature"],
        scale=settings["logit_scale"],
        softcap=settings["final_logit_softcapping"],
        full_precision=settings["cast_lm_head_to_fp32"],
        gathered=maybe_gather_lm_head_ctx,
    )


def _base(model: nn.Module) -> Any:
    """The transformers model inside its wrappers."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


@contextmanager
def _last_hidden_state(backbone: nn.Module) -> Iterator[list[Tensor]]:
    states: list[Tensor] = []
    hook = backbone.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    try:
        yield states
    finally:
        hook.remove()


def fused_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    request: HeadRequest | None = None,
) -> Tensor:
    """Log-probs of the last `completion_length` tokens, `(B, completion_length)` float32; 0 where the mask is 0.

    A `request` is answered in the same forward; it may ask for no log-probs, which are 0 then.
    """
    with compact_head(input_ids.device):
        if should_pack(model, attention_mask):
            return packed_log_probs(model, input_ids, attention_mask, completion_length, request)[0]
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :-completion_length] = -100
        shape = len(input_ids), completion_length
        asked: Any = request.asked_of(model, shape, pick_padded(completion_length)) if request else model
        outputs = asked(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    return outputs.log_probs[:, -completion_length:]


@contextmanager
def compact_head(device: torch.device) -> Iterator[None]:
    """Have TRL's fused head project only the positions that count on the CPU too, in tiles that fit its caches.

    TRL asks one function whether the device runs Triton, and projects fewer positions only there, because some other
    devices compile anew for every shape. The CPU does not. Its tiles are as wide as a GPU likes them; the CPU runs the
    same sums about twice as fast, and in a thirtieth of the memory, when a tile stays in the cache.
    """
    if device.type != "cpu":
        yield
        return
    original = trl_utils._use_triton, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl_utils._use_triton = lambda device: device.type == "cpu" or original[0](device)
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = _CPU_TILE_WIDTH
    try:
        yield
    finally:
        trl_utils._use_triton, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = original


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
