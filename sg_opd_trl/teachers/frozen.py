"""A frozen model in this process that scores token ids: the local teacher, or a reference of its own."""

import hashlib
from typing import Any

import torch
from transformers import PreTrainedModel

from ..trl_seam import add_fused_head, create_model_from_path, get_config_model_id, prepare_frozen_model
from .model_scoring import ModelScorer


class FrozenModel(ModelScorer):
    """A model whose weights never change, scored with the student's temperature and numerics.

    Args:
        model: causal language model; frozen and put in evaluation mode in place.
        role: what messages call it, `teacher` or `reference`.
        name: where it came from; default: the path in its config.

    Attributes:
        loaded_from: path or Hub id, revision and options of `from_pretrained`; None for a model given as an object.
    """

    loaded_from: tuple[str, str | None, dict] | None = None

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
        loaded = cls(create_model_from_path(name, **options), role=role, name=name, **extra)
        loaded.loaded_from = name, revision, dict(init_kwargs or {})
        return loaded

    def prepare(self, accelerator: Any, *, temperature: float, cast_lm_head_to_fp32: bool) -> None:
        """Attach the fused head and place the model as TRL places its reference model."""
        add_fused_head(self.model, temperature, cast_lm_head_to_fp32)
        self.accelerator = accelerator
        self.model = prepare_frozen_model(self.model, accelerator)


def fingerprint(model: torch.nn.Module, adapter: str | None = None) -> str | None:
    """Short hash of names, shapes and a few values of all weights; None where this rank holds only shards.

    It tells another set of weights from this one, it does not prove equality.

    Args:
        model: with or without adapters.
        adapter: hash the weights of this adapter alone; its own name does not count.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if adapter is not None and adapter not in name.split("."):
            continue
        if parameter.numel() == 0 or parameter.is_meta:
            return None
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 16)].to("cpu", torch.float64)
        label = name.replace(f".{adapter}.", ".")
        digest.update(f"{label}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
