"""One policy forward over the student's rows and the anchor's rows."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from .head_request import HeadRequest
from .scoring import TokenBatch

PolicyOutput = tuple[Tensor, Tensor | None, Tensor | None]
Run = Callable[..., PolicyOutput]


class JointForward:
    """Appends anchor rows to the forward inside TRL's loss and takes their log-probs out again.

    TRL sees exactly the rows and columns it asked for.

    Args:
        anchor: the anchor's rows, or None.
        on_student_logps: called with the student rows' log-probs `(B, T)`, with gradient, before TRL reads the
            advantages; returns those that TRL goes on with.
        request: answered in the same forward for the student's rows, or None.

    Attributes:
        anchor_logps: log-probs of the anchor's completions `(R, T_anchor)`, with gradient; None without rows.
    """

    def __init__(
        self,
        anchor: TokenBatch | None,
        on_student_logps: Callable[[Tensor], Tensor],
        request: HeadRequest | None = None,
    ) -> None:
        self.anchor = anchor
        self.request = request
        self.on_student_logps = on_student_logps
        self.anchor_logps: Tensor | None = None

    def __call__(self, run: Run, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> PolicyOutput:
        """Run the policy once; see `GRPOSeam.policy_forward`."""
        rows = input_ids.size(0)
        run = run if self.request is None else partial(run, request=self.request)
        if self.anchor is None:
            logps, entropies, auxiliary_loss = run(input_ids, attention_mask, completion_length)
        else:
            joint = _joined(self.anchor, input_ids, attention_mask, completion_length)
            logps, entropies, auxiliary_loss = run(*joint)
            self.anchor_logps = logps[rows:, : self.anchor.completion_ids.size(1)]
            logps = logps[:rows, :completion_length]
            entropies = None if entropies is None else entropies[:rows, :completion_length]
        return self.on_student_logps(logps), entropies, auxiliary_loss


def _joined(
    anchor: TokenBatch, input_ids: Tensor, attention_mask: Tensor, completion_length: int
) -> tuple[Tensor, Tensor, int]:
    """Both sets of rows, the last prompt token of all rows in the same column."""
    anchor_ids, anchor_mask = anchor.joined()
    prompt_widths = input_ids.size(1) - completion_length, anchor.prompt_ids.size(1)
    widths = completion_length, anchor.completion_ids.size(1)

    def aligned(student_part: Tensor, anchor_part: Tensor) -> Tensor:
        parts = zip((student_part, anchor_part), prompt_widths, widths, strict=True)
        return torch.cat([functional.pad(part, (max(prompt_widths) - p, max(widths) - t)) for part, p, t in parts])

    return aligned(input_ids, anchor_ids), aligned(attention_mask, anchor_mask), max(widths)
