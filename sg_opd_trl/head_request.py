"""What is computed from hidden states inside a model's own forward, where wrappers have its weights whole."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .heads import OutputHead

Compute = Callable[[Tensor, OutputHead, Tensor], tuple[Tensor, ...]]
"""`(hidden states (N, H), head, log-probs (N,)) -> tensors (N, ...)`, of the N chosen tokens."""
Pick = Callable[[Tensor, Tensor], Tensor]
"""`(values per position of the model, chosen (rows, T)) -> values of the positions that predict the chosen tokens`."""


class HeadRequest:
    """A second output of one forward, computed from the hidden states that predict chosen completion tokens.

    Args:
        chosen: `(B, T)` bool, completion tokens of the forward's first rows and columns.
        compute: gets, for the chosen tokens in row-major order, the hidden states that predict them, the model's head
            and the tokens' log-probs, with gradient where the model has one.
        needs_logps: False spares the forward its own log-probs, which are 0 then.

    Attributes:
        output: what `compute` returned; None before the forward.
    """

    def __init__(self, chosen: Tensor, compute: Compute, *, needs_logps: bool = True) -> None:
        self.chosen = chosen
        self.compute = compute
        self.needs_logps = needs_logps
        self.output: tuple[Tensor, ...] | None = None

    def asked_of(self, model: Any, shape: Sequence[int], pick: Pick) -> Callable[..., Any]:
        """The model with this request as an argument of its forward; the wrappers around it pass that on.

        Args:
            model: with `head_output` among the arguments of its forward.
            shape: rows and completion columns of the forward, not less than those of `chosen`.
            pick: the layout of the forward's positions.
        """
        missing = shape[0] - self.chosen.size(0), shape[1] - self.chosen.size(1)
        chosen = functional.pad(self.chosen, (0, missing[1], 0, missing[0]))

        def head_output(hidden_states: Tensor, logps: Tensor, head: OutputHead) -> tuple[Tensor, ...]:
            return self.compute(pick(hidden_states, chosen), head, pick(logps, chosen))

        def forward(**inputs: Any) -> Any:
            if not self.needs_logps:
                inputs |= {k: torch.full_like(inputs[k], -100) for k in ("labels", "shift_labels") if k in inputs}
            outputs = model(**inputs, head_output=head_output)
            self.output = outputs.head_output
            return outputs

        return forward


def pick_padded(width: int) -> Pick:
    """The layout of padded rows whose last `width` positions predict the completions."""
    return lambda values, chosen: values[:, -width:][chosen]


def scattered(values: Tensor, chosen: Tensor) -> Tensor:
    """Values `(N, ...)` of the chosen tokens back to `(B, T, ...)`, 0 elsewhere; connected without a token too."""
    if values.dim() == 1:
        return values.new_zeros(chosen.shape).masked_scatter(chosen, values)
    result = values.new_zeros(*chosen.shape, *values.shape[1:])
    result[chosen] = values
    return result
