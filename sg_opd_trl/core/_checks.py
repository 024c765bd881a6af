"""First-line checks of the equations: kind, dtype, rank and shape only, never values, so nothing waits for a GPU."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_floating(rank: int, **tensors: Tensor) -> None:
    """Require floating-point tensors of one rank and one shape.

    Args:
        rank: Number of dimensions of every tensor.
        **tensors: Tensors under the names that the caller's signature gives them.

    Raises:
        TypeError: An argument is not a tensor, or not of a floating dtype.
        ValueError: An argument has another rank or another shape than the first one.
    """
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(
                f"`{name}` must have a floating dtype, got {tensor.dtype}. It holds real numbers. Set it to "
                f"`{name}.float()`."
            )
        check_rank(name, tensor, rank)
        check_shape(name, tensor, first, tensors[first].shape)


def check_tensor(name: str, value: object) -> None:
    """Require a tensor.

    Raises:
        TypeError: `value` is anything else.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"`{name}` must be a torch.Tensor, got {type(value).__name__}. The equations are vectorised. Set it to "
            f"`torch.as_tensor({name})`."
        )


def check_rank(name: str, tensor: Tensor, rank: int) -> None:
    """Require a number of dimensions.

    Raises:
        ValueError: The tensor has another one.
    """
    if tensor.dim() != rank:
        raise ValueError(
            f"`{name}` must have {rank} dimension(s), got shape {tuple(tensor.shape)}. The first is completions, the "
            f"second tokens. Set its shape with `reshape` or `unsqueeze`."
        )


def check_shape(name: str, tensor: Tensor, other: str, shape: Sequence[int]) -> None:
    """Require the shape of another argument, without broadcasting.

    Raises:
        ValueError: The shapes differ.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"`{name}` must have the shape of `{other}` {tuple(shape)}, got {tuple(tensor.shape)}. Entries are "
            f"matched one to one, without broadcasting. Set both to the same rows and columns."
        )


def check_mask(name: str, mask: Tensor, other: str, shape: Sequence[int]) -> Tensor:
    """Require a mask of the given shape; any dtype, 1 = counts.

    Returns:
        The mask as a bool tensor.

    Raises:
        TypeError: `mask` is not a tensor.
        ValueError: The shape differs.
    """
    check_tensor(name, mask)
    check_shape(name, mask, other, shape)
    return mask != 0


def check_whole(name: str, value: Tensor, other: str | None = None, shape: Sequence[int] = ()) -> None:
    """Require a tensor of whole numbers, of the shape of another argument where that is named.

    Raises:
        TypeError: `value` is not a tensor, or not of an integer dtype.
        ValueError: The shape differs.
    """
    check_tensor(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(
            f"`{name}` must have an integer dtype, got {value.dtype}. It holds whole numbers. Set it to "
            f"`{name}.long()`."
        )
    if other is not None:
        check_shape(name, value, other, shape)


def check_number(name: str, value: float, *, low: float, high: float = math.inf, reason: str) -> None:
    """Require a finite number in `[low, high]`.

    Raises:
        ValueError: `value` is NaN, infinite or out of bounds.
    """
    if not (math.isfinite(value) and low <= value <= high):
        bounds = (
            "finite" if math.isinf(low) else f"in [{low}, {high}]" if math.isfinite(high) else f">= {low} and finite"
        )
        raise ValueError(f"`{name}` must be {bounds}, got {value}. {reason}")


def check_positive(name: str, value: float, *, reason: str) -> None:
    """Require a finite number above zero.

    Raises:
        ValueError: `value` is NaN, infinite, zero or negative.
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be > 0 and finite, got {value}. {reason}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Require one of the given names.

    Raises:
        ValueError: `value` is not among them.
    """
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(choices)}, got {value!r}. Each name is another equation. Set "
            f"`{name}` to one of them."
        )


def detached(tensor: Tensor) -> Tensor:
    """Cut the gradient and widen to float32 at least (float64 stays): half precision loses small ratios."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
