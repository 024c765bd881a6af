"""A stand-in for the variable-length attention kernel that runs on the CPU: the rest of the path is the real one."""

import types
from typing import Any

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash


class VariableLengthAttention:
    """The kernels' interface, one row after another in plain torch; it counts the calls and their rows."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, softmax_scale: float | None,
              window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0) -> torch.Tensor:  # fmt: skip
        """`(B, L, heads, dim)` with rows of one length."""
        return torch.stack([_attend(*row, causal, softmax_scale, window_size, softcap) for row in zip(q, k, v)])  # noqa: B905

    def varlen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
               cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, causal: bool,
               softmax_scale: float | None, window_size: tuple[int, int] = (-1, -1),
               softcap: float = 0.0) -> torch.Tensor:  # fmt: skip
        """`(N, heads, dim)`, rows between the bounds."""
        bounds = cu_seqlens_q.tolist()
        lengths = cu_seqlens_q.diff().tolist()
        assert bounds[0] == 0
        assert bounds[-1] == len(q)
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert cu_seqlens_q.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        self.rows.append(lengths)
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([_attend(*part, causal, softmax_scale, window_size, softcap) for part in parts])


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None,
            window: tuple[int, int], softcap: float) -> torch.Tensor:  # fmt: skip
    """One row, `(L, heads, dim)`."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.size(-1) ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    back = torch.arange(len(q)).unsqueeze(1) - torch.arange(len(k))
    hidden = (back < 0) if causal else torch.zeros_like(back, dtype=torch.bool)
    if window[0] >= 0:
        hidden |= back > window[0]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def use_kernel(monkeypatch: pytest.MonkeyPatch, *models: Any, name: str = "flash_attention_2") -> Any:
    """Have the models attend through transformers' flash attention path, with the stand-in at its end."""
    kernel = VariableLengthAttention()
    functions = (kernel.dense, kernel.varlen, None, flash._pad_input, flash._unpad_input)
    arguments = flash._lazy_define_process_function(kernel.varlen)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: (functions, (arguments, None)))
    for model in models:
        model.config._attn_implementation = name
    return kernel


def count_tokens(model: Any) -> types.SimpleNamespace:
    """Shapes of the model's scoring forwards, and the packed ones among them."""
    seen = types.SimpleNamespace(shapes=[], packed=[])

    def record(module: Any, arguments: tuple, keywords: dict) -> None:
        if keywords.get("fused_lm_head"):
            seen.shapes.append(tuple(keywords["input_ids"].shape))
            if "shift_labels" in keywords:
                seen.packed.append(keywords["input_ids"].numel())

    model.register_forward_pre_hook(record, with_kwargs=True)
    return seen
