"""Models in this process that score completions, and the teacher among them that writes rollouts too.

`ModelScorer` is how any of them scores; `LocalTeacher` is a model with weights of its own. `teachers.reference` and
`teachers.adapter` borrow the student instead.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..agreement import check_layers_are_found
from ..errors import NonFiniteTeacherError, SGOPDConfigError, TeacherError
from ..models.batch import Kind, TokenBatch, plan_batches, score_parts, score_rows
from ..models.forward import ForwardOutput, HeadRequest, can_share, scattered
from ..models.generate import generate_completions, written_together
from ..models.head import OutputHead, likeliest_tokens, support_log_probs
from ..models.internals import attention_implementation
from ..models.residual import keep_float32_between_layers, weights_dtype
from ..trl_seam import (
    HeadSettings,
    add_fused_head,
    agree_on_calls,
    create_model_from_path,
    fused_forward,
    get_config_model_id,
    head_in_use,
    is_sharded,
    model_for_generation,
    output_head,
    own_forward,
    prepare_frozen_model,
)
from .base import HiddenScores, Sampling, SupportScores
from .offload import HostWeights, offload_problem

logger = logging.getLogger(__name__)

_NUMBER: Kind = ((), torch.float32)  # one log-prob per token


class ModelScorer:
    """How a model in this process scores completions.

    Every method runs the model's own forward on groups of rows (`_log_probs`, `_run`). What needs more than log-probs
    is computed from the hidden states inside that forward, so that shards and wrappers see one ordinary call.

    A subclass sets the attributes; one without a model of its own borrows it in `lent`.

    Attributes:
        model: plain or wrapped, with a fused head; only inside of `lent` where it is borrowed.
        role: what messages call it.
        vocab_size: rows of its embedding.
        accelerator: of the trainer.
        fused_head: the run's temperature and numerics.
        tokens_scored: completion tokens scored so far by this process.
    """

    model: Any
    role: str
    vocab_size: int
    accelerator: Any
    fused_head: HeadSettings
    tokens_scored: int = 0
    _head: OutputHead | None = None

    def lent(self) -> AbstractContextManager[Any]:
        """Have `model`, in evaluation mode, for the block; here it is there all the time."""
        return nullcontext()

    @property
    def distillation_modes(self) -> frozenset[str]:
        """What it can serve: a sharded head is whole only inside the model's own forward."""
        modes = {"sampled_token", "topk_logits", "asymmetric"}
        return frozenset(modes if is_sharded(self.accelerator) else modes | {"full_logits"})

    @torch.no_grad()
    def score(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Tensor:
        """Log-probs of the completions' own tokens, see `Teacher.score`."""
        check_ids(batch, rows, self.vocab_size, self.role)
        with self.lent():
            logps = score_rows(
                self._log_probs, batch, rows, max_tokens, self._agree_on_calls, by_prompt=self._shares(batch)
            )
        return self._counted(batch, rows, logps)

    def score_support(
        self, batch: TokenBatch, rows: Tensor, max_tokens: int, size: int, vocab_size: int
    ) -> SupportScores:
        """The K = `size` likeliest tokens of each position and their log-probs, see `Teacher.score_support`."""

        def request(part: TokenBatch, numbers: Tensor) -> HeadRequest:
            counted = part.completion_mask != 0
            ids = part.completion_ids[counted]

            def compute(hidden_states: Tensor, head: OutputHead, logps: Tensor) -> tuple[Tensor, ...]:
                return likeliest_tokens(hidden_states, head, ids, size, vocab_size)

            # The log-probs of the completions' own tokens fall out of the same softmax.
            return HeadRequest(counted, compute, needs_logps=False)

        kinds = [_NUMBER, ((size,), torch.long), ((size,), torch.float32)]
        logps, ids, support = self._run(request, kinds, batch, rows, max_tokens)
        check_scores(support, self.role)
        return SupportScores(self._counted(batch, rows, logps), ids, support)

    def score_on_support(self, batch: TokenBatch, rows: Tensor, max_tokens: int, support_ids: Tensor) -> SupportScores:
        """Log-probs of the completions' own tokens and of given ones, `support_ids` `(B, T, K)`."""

        def request(part: TokenBatch, numbers: Tensor) -> HeadRequest:
            counted = part.completion_mask != 0
            ids = support_ids[numbers][:, : counted.size(1)][counted]
            tokens = part.completion_ids[counted]

            def compute(hidden_states: Tensor, head: OutputHead, logps: Tensor) -> tuple[Tensor, ...]:
                return logps, support_log_probs(hidden_states, head, ids, tokens, logps)

            return HeadRequest(counted, compute)

        kinds = [_NUMBER, ((support_ids.size(2),), torch.float32)]
        logps, support = self._run(request, kinds, batch, rows, max_tokens)
        check_scores(support, self.role)
        return SupportScores(self._counted(batch, rows, logps), support_ids, support)

    def score_hidden(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> HiddenScores:
        """The hidden states that predict the completions, see `Teacher.score_hidden`."""

        def request(part: TokenBatch, numbers: Tensor) -> HeadRequest:
            def compute(hidden_states: Tensor, head: OutputHead, logps: Tensor) -> tuple[Tensor, ...]:
                return logps, hidden_states

            return HeadRequest(part.completion_mask != 0, compute)

        weight = self.output_heads()[0].weight
        kinds = [_NUMBER, ((weight.size(1),), weight.dtype)]
        logps, hidden_states = self._run(request, kinds, batch, rows, max_tokens)
        heads = torch.zeros(len(batch), dtype=torch.long, device=rows.device)
        return HiddenScores(self._counted(batch, rows, logps), hidden_states, heads)

    def output_heads(self) -> list[OutputHead]:
        """The one head of the model; its weights never change, so that it is the same at any time."""
        if self._head is None:
            with self.lent():
                self._head = output_head(self.model, self.fused_head)
        return [self._head]

    @torch.no_grad()
    def _run(
        self,
        request_for: Callable[[TokenBatch, Tensor], HeadRequest],
        kinds: Sequence[Kind],
        batch: TokenBatch,
        rows: Tensor,
        max_tokens: int,
    ) -> list[Tensor]:
        """`(B, T, ...)` of every tensor that a request computes, see `score_parts`."""

        def score(part: TokenBatch, numbers: Tensor) -> tuple[Tensor, ...]:
            request = request_for(part, numbers)
            output = self._forward(*part.joined(), part.completion_ids.size(1), request)
            return tuple(scattered(values, request.chosen) for values in output.answer or ())

        check_ids(batch, rows, self.vocab_size, self.role)
        with self.lent():
            return score_parts(
                score, kinds, batch, rows, max_tokens, self._agree_on_calls, by_prompt=self._shares(batch)
            )

    def _shares(self, batch: TokenBatch) -> bool:
        return can_share(self.model, batch.prompt_ids.device)

    def _log_probs(self, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
        return self._forward(input_ids, attention_mask, completion_length).logps

    def _forward(
        self, input_ids: Tensor, attention_mask: Tensor, completion_length: int, request: HeadRequest | None = None
    ) -> ForwardOutput:
        with self.accelerator.autocast(), head_in_use(self.fused_head):
            return fused_forward(self.model, input_ids, attention_mask, completion_length, request)

    def _counted(self, batch: TokenBatch, rows: Tensor, logps: Tensor) -> Tensor:
        """The log-probs, checked, their tokens added to `tokens_scored`."""
        check_scores(logps, self.role)
        self.tokens_scored += int(batch.completion_mask[rows].sum())
        return logps

    def _agree_on_calls(self, calls: int) -> int:
        return agree_on_calls(self.accelerator, calls)


class FrozenModel(ModelScorer):
    """A model whose weights never change, scored with the student's temperature and numerics.

    Args:
        model: causal language model; frozen and put in evaluation mode in place.
        role: what messages call it, `teacher` or `reference`.
        name: where it came from; default: the path in its config.

    Attributes:
        loaded_from: path or Hub id, revision and options of `from_pretrained`; None for a model given as an object.
        is_ours: whether the package has loaded or copied the model, so that nobody runs it elsewhere.
        is_freed: whether its weights are gone, see `free`.
    """

    loaded_from: tuple[str, str | None, dict] | None = None
    is_ours: bool = False
    is_freed: bool = False

    def __init__(self, model: PreTrainedModel, *, role: str, name: str | None = None) -> None:
        own_forward(model)
        self.model: Any = model.requires_grad_(False).eval()
        self.role = role
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.identity = {"name": name or get_config_model_id(model.config), "fingerprint": fingerprint(model)}
        self.accelerator: Any = None

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        role: str,
        like: PreTrainedModel,
        revision: str | None,
        init_kwargs: dict | None,
        on_host: bool = False,
        **extra: Any,
    ) -> "FrozenModel":
        """Load a model with the dtype and attention implementation of `like`, unless `init_kwargs` says otherwise.

        Args:
            name: path or Hub id.
            role: what messages call it.
            like: the student.
            revision: branch, tag or commit of a Hub id.
            init_kwargs: for `from_pretrained` of transformers.
            on_host: leave its weights in host memory.
            extra: further arguments of the class.
        """
        options = dict(init_kwargs or {})
        options.setdefault("dtype", like.dtype)
        options.setdefault("attn_implementation", attention_implementation(like.config))
        if revision is not None:
            options["revision"] = revision
        # Ranks hold a whole model each; `device_map` would spread the one of every rank over all devices. And what
        # waits in host memory is loaded there.
        if on_host or (torch.distributed.is_available() and torch.distributed.is_initialized()):
            options["device_map"] = None
        loaded = cls(create_model_from_path(name, **options), role=role, name=name, **extra)
        loaded.loaded_from, loaded.is_ours = (name, revision, dict(init_kwargs or {})), True
        return loaded

    def prepare(
        self,
        accelerator: Any,
        *,
        temperature: float,
        cast_lm_head_to_fp32: bool,
        student_dtype: torch.dtype = torch.float32,
        on_device: bool = True,
    ) -> None:
        """Attach the fused head and place the model as TRL places its reference model, in the student's precision."""
        check_layers_are_found(self.model, self.role)
        self._compute_as(student_dtype, accelerator)
        self.fused_head = add_fused_head(self.model, temperature, cast_lm_head_to_fp32)
        self.accelerator, self._head = accelerator, None
        self.model = prepare_frozen_model(self.model, accelerator, on_device=on_device)

    def free(self) -> None:
        """Give its memory back, for good; a model that the caller gave, or that shards or others hold, stays."""
        if self.is_freed or not self.is_ours or is_sharded(self.accelerator):
            return
        self.is_freed, self._head = True, None
        for weight in self.model.parameters():
            weight.data = weight.data.new_empty(0)

    def lent(self) -> AbstractContextManager[Any]:
        """Its model, which is there all the time until it is freed.

        Raises:
            SGOPDConfigError: it is.
        """
        if self.is_freed:
            raise SGOPDConfigError(
                f"`teacher_kl_coef` had come to 0, and with it the {self.role} {self.identity['name']} was freed, "
                "which is asked again. Build the trainer anew for another run."
            )
        return super().lent()

    def _compute_as(self, student: torch.dtype, accelerator: Any) -> None:
        """Carry float32 from layer to layer where the student does and this model's weights are in half precision."""
        own = weights_dtype(self.model)
        # A model that was given is the caller's, who may run it elsewhere; shards and packed weights have one dtype.
        ours = self.is_ours and not getattr(self.model, "is_quantized", False)
        mixed = student == torch.float32 and accelerator.mixed_precision in ("bf16", "fp16")
        kept = ours and mixed and not is_sharded(accelerator)
        keep_float32_between_layers(self.model, kept)
        if own != student and not kept and own.is_floating_point:
            logger.warning(
                "The %s (%s) is in %s and the student in %s: for equal weights their log-probs differ by what the "
                "coarser one rounds, and the gate takes that for the %s's opinion. Load it in the student's dtype "
                "(`%s`), or set gate_dead_zone to the size of the noise.",
                self.role,
                self.identity["name"],
                _short(own),
                _short(student),
                self.role,
                "teacher_model_init_kwargs" if self.role != "reference" else "reference_model_init_kwargs",
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class LocalTeacher(FrozenModel):
    """A teacher whose weights live beside the student's.

    Args:
        model: causal language model that shares the student's token ids.
        name: where it came from; default: the path in its config.

    Attributes:
        tokens_generated: tokens generated so far by this process.
        host_weights: where the weights are between its uses; None where they stay on the device.
    """

    tokens_generated: int = 0
    host_weights: HostWeights | None = None

    def __init__(self, model: PreTrainedModel, *, role: str = "teacher", name: str | None = None) -> None:
        super().__init__(model, role=role, name=name)

    def prepare(self, accelerator: Any, *, on_device: bool = True, **settings: Any) -> None:
        """As for any frozen model; or with weights that wait in host memory, see `HostWeights`.

        Raises:
            SGOPDConfigError: weights that no move reaches.
        """
        problem = None if on_device else offload_problem(self.model)
        if problem is not None:
            raise SGOPDConfigError(
                f"`teacher_offload` must be False with the {self.role} {self.identity['name']}, got True with "
                f"{problem}. It would not leave the device whole. Leave it out, or load the teacher another way."
            )
        super().prepare(accelerator, on_device=on_device, **settings)
        self.host_weights = None if on_device else HostWeights(self.model, accelerator.device)

    def free(self) -> None:
        """As for any frozen model; the copy on the host too."""
        super().free()
        if self.is_freed:
            self.host_weights = None

    def lent(self) -> AbstractContextManager[Any]:
        """Have its weights on the device for the block."""
        super().lent()  # raises where there are none
        return self._on_device()

    def _on_device(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.host_weights is None else self.host_weights.on_device()

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int, max_tokens: int) -> list[list[int]]:
        """One completion per prompt, see `Teacher.generate`; prompts of like length share a batch.

        A sharded teacher generates on every rank the same number of times; ranks with fewer prompts repeat a dummy.
        """
        lengths = [len(prompt) + sampling.max_new_tokens for prompt in prompts]
        completions: list[list[int]] = [[] for _ in prompts]
        with self._on_device():
            # What borrows its model has none elsewhere.
            with self.lent():
                groups = [
                    [planned[row] for row in rows]
                    for planned in plan_batches(lengths, max_tokens)
                    for rows in written_together(self.model, [prompts[i] for i in planned], sampling.max_new_tokens)
                ]
            # Before the first forward, see `score_parts`.
            calls = self._agree_on_calls(len(groups))
            with self._generation(seed) as model:
                for group in groups:
                    written = self._generate_batch(model, [prompts[i] for i in group], sampling)
                    for i, ids in zip(group, written, strict=True):
                        completions[i] = ids
                for _ in range(calls - len(groups)):
                    self._generate_batch(model, [[sampling.pad_token_id]], sampling)
        self.tokens_generated += sum(map(len, completions))
        return completions

    def stop_generating(self) -> None:
        """Return the memory of the key-value caches to the device."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _generation(self, seed: int) -> Iterator[Any]:
        """The model as `generate` needs it, drawing from this seed; the caller's random state is left alone."""
        device = self.accelerator.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), model_for_generation(self.model, self.accelerator) as model:
            torch.manual_seed(seed)
            yield model

    def _generate_batch(self, model: Any, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        config = generation_config(sampling)
        with self.accelerator.autocast():
            return generate_completions(
                model, prompts, config, role=self.role, synced_gpus=is_sharded(self.accelerator)
            )


def generation_config(sampling: Sampling) -> GenerationConfig:
    """What `generate` of transformers is told of how a rollout is written."""
    settings = {
        "max_new_tokens": sampling.max_new_tokens,
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "eos_token_id": list(sampling.eos_token_ids),
        "pad_token_id": sampling.pad_token_id,
        # Batches differ in shape, and each would be compiled anew.
        "disable_compile": True,
    }
    return GenerationConfig(**(settings | dict(sampling.generation_kwargs)))


# --- what a score and a fingerprint stand on -------------------------------------------------------------------------
def check_ids(batch: TokenBatch, rows: Tensor, vocab_size: int, role: str) -> None:
    """Refuse token ids that a model has no embedding for.

    Raises:
        TeacherError: names the id, its row and position.
    """
    for part, ids, mask in (
        ("prompt", batch.prompt_ids, batch.prompt_mask),
        ("completion", batch.completion_ids, batch.completion_mask),
    ):
        lacking = (ids >= vocab_size) & (mask != 0) & rows.unsqueeze(1)
        if lacking.any():
            row, position = lacking.nonzero()[0].tolist()
            raise TeacherError(
                f"Token id {int(ids[row, position])} at position {position} of the {part} in row {row} does not exist "
                f"in the {role}, whose vocabulary has {vocab_size} entries. It cannot be scored, and nothing was "
                "updated. Use a teacher and a reference with the student's tokenizer, or suppress the id with "
                "generation_kwargs={'suppress_tokens': [...]}."
            )


# Rounding of a log-softmax can end a hair above 0; more than this is a broken score.
_POSITIVE_TOLERANCE = 1e-3


def check_scores(logps: Tensor, role: str) -> None:
    """Refuse log-probs, `(B, T)` or `(B, T, K)`, that are NaN, infinite or positive.

    Raises:
        NonFiniteTeacherError: names the first bad value with its row and position.
    """
    bad = ~torch.isfinite(logps) | (logps > _POSITIVE_TOLERANCE)
    if bad.any():
        first = bad.nonzero()[0].tolist()
        row, position = first[:2]
        raise NonFiniteTeacherError(
            f"The {role} gave {int(bad.sum())} log-probs that are not finite or above 0, the first "
            f"{float(logps[tuple(first)])} in row {row} at completion token {position}. Nothing was updated. Check "
            f"the {role}'s weights, or load it in float32 or bfloat16."
        )


def fingerprint(model: torch.nn.Module, adapter: str | None = None, left_out: Sequence[str] = ()) -> str | None:
    """Short hash of names, shapes and a few values of all weights; None where this rank holds only shards.

    It tells another set of weights from this one, it does not prove equality.

    Args:
        model: with or without adapters.
        adapter: hash the weights of this adapter alone; its own name does not count.
        left_out: adapters that are not part of it.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if (adapter is not None and adapter not in parts) or not {*left_out}.isdisjoint(parts):
            continue
        if parameter.numel() == 0 or parameter.is_meta:
            return None
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 16)].to("cpu", torch.float64)
        label = name.replace(f".{adapter}.", ".")
        digest.update(f"{label}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
