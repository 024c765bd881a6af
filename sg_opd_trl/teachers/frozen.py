"""A frozen model in this process that scores token ids: the local teacher, or a reference of its own."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import NonFiniteError, TeacherError
from ..scoring import TokenBatch, score_rows
from ..trl_seam import (
    add_fused_head,
    create_model_from_path,
    fused_log_probs,
    get_config_model_id,
    is_sharded,
    prepare_frozen_model,
)

# Rounding of a log-softmax can end a hair above 0; more than this is a broken score.
_POSITIVE_TOLERANCE = 1e-3


class FrozenModel:
    """A model whose weights never change, scored with the student's temperature and numerics.

    Args:
        model: causal language model; frozen and put in evaluation mode in place.
        role: what messages call it, `teacher` or `reference`.
        name: where it came from; default: the path in its config.
    """

    def __init__(self, model: PreTrainedModel, *, role: str, name: str | None = None) -> None:
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
        **extra: Any,
    ) -> "FrozenModel":
        """Load a model with the dtype and attention implementation of `like`, unless `init_kwargs` says otherwise."""
        options = dict(init_kwargs or {})
        options.setdefault("dtype", like.dtype)
        options.setdefault("attn_implementation", like.config._attn_implementation)
        if revision is not None:
            options["revision"] = revision
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            options["device_map"] = None
        return cls(create_model_from_path(name, **options), role=role, name=name, **extra)

    def prepare(self, accelerator: Any, *, temperature: float, cast_lm_head_to_fp32: bool) -> None:
        """Attach the fused head and place the model as TRL places its reference model."""
        add_fused_head(self.model, temperature, cast_lm_head_to_fp32)
        self.accelerator = accelerator
        self.model = prepare_frozen_model(self.model, accelerator)

    @torch.no_grad()
    def score(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Tensor:
        """Log-probs of the completions' own tokens, see `Teacher.score`."""
        check_ids(batch, rows, self.vocab_size, self.role)
        logps = score_rows(self._forward, batch, rows, max_tokens, self._agree_on_calls)
        check_scores(logps, self.role)
        return logps

    def _forward(self, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
        with self.accelerator.autocast():
            return fused_log_probs(self.model, input_ids, attention_mask, completion_length)

    def _agree_on_calls(self, calls: int) -> int:
        if not is_sharded(self.accelerator):
            return calls
        return int(self.accelerator.gather(torch.tensor([calls], device=self.accelerator.device)).max())


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


def check_scores(logps: Tensor, role: str) -> None:
    """Refuse log-probs that are NaN, infinite or positive.

    Raises:
        NonFiniteError: names the first bad value with its row and position.
    """
    bad = ~torch.isfinite(logps) | (logps > _POSITIVE_TOLERANCE)
    if bad.any():
        row, position = bad.nonzero()[0].tolist()
        raise NonFiniteError(
            f"The {role} gave {int(bad.sum())} log-probs that are not finite or above 0, the first "
            f"{float(logps[row, position])} in row {row} at completion token {position}. Nothing was updated. Check "
            f"the {role}'s weights, or load it in float32 or bfloat16."
        )


def fingerprint(model: torch.nn.Module) -> str | None:
    """Short hash of names, shapes and a few values of all weights; None where this rank holds only shards.

    It tells another set of weights from this one, it does not prove equality.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0 or parameter.is_meta:
            return None
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 16)].to("cpu", torch.float64)
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
