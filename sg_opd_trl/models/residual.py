"""A frozen model in half precision that computes as autocast has a student with float32 weights compute.

Autocast multiplies in half precision and adds in float32: what runs from layer to layer stays float32. A model that
was loaded in half precision rounds there too, at every layer, so that equal weights have different log-probs, and the
gate takes the difference for the teacher's opinion. With the embeddings' output, norms and biases in float32 the two
compute the same, number by number, and the large weights still take two bytes.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)

_undo: WeakKeyDictionary[nn.Module, Callable[[], None]] = WeakKeyDictionary()


def weights_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's large weights, whatever adapters and norms are in."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    # Some architectures put their embeddings together from several.
    return getattr(embeddings, "weight", next(model.parameters())).dtype


def keep_float32_between_layers(model: nn.Module, wanted: bool) -> None:
    """Have a frozen model carry float32 from layer to layer, or as it was loaded again.

    Only for forwards under autocast: outside of it the layers refuse what is not of their weights' dtype.

    Args:
        model: causal language model.
        wanted: whether it should, where its weights are in half precision.
    """
    undo = _undo.pop(model, None)
    if undo is not None:
        undo()
    if not wanted or weights_dtype(model) not in _HALF:
        return
    # Norms and biases: some kernels take no norm in half precision beside hidden states in float32.
    small = [(weight, weight.data) for weight in model.parameters() if weight.dim() < 2 and weight.dtype in _HALF]
    for weight, half in small:
        weight.data = half.float()
    hook = model.get_input_embeddings().register_forward_hook(_to_float32)  # type: ignore[operator]

    def restore() -> None:
        hook.remove()
        for weight, half in small:
            weight.data = half

    _undo[model] = restore


def _to_float32(module: nn.Module, inputs: tuple, embedded: Tensor) -> Tensor:
    if not isinstance(module, nn.Embedding) or type(module).forward is nn.Embedding.forward or not inputs:
        return embedded.float()
    # Gemma and others multiply in there, which has rounded already: once more, with the rows that are asked for.
    (ids, *_), half, padding = inputs, module.weight.data, module.padding_idx
    numbers = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    # Padding only matters to gradients.
    module.weight.data, module.padding_idx = half[ids.flatten()].float(), None
    try:
        return module.forward(numbers)
    finally:
        module.weight.data, module.padding_idx = half, padding
