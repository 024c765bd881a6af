"""Rows in half precision: a token is rounded alike wherever its row is scored, and in float32 rows stay as TRL's."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from architectures import tiny_architecture
from peft import PromptTuningConfig, get_peft_model
from repository import PATIENCE
from torch import Tensor

from sg_opd_trl import trl_seam
from sg_opd_trl.models import forward
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.models.forward import (
    HeadRequest,
    Layouts,
    computing_dtype,
    layouts_of,
    move_left,
    padded_forward,
    padding_behind,
    restrict_layouts,
    should_pack,
)
from sg_opd_trl.trl_seam import add_fused_head, add_head_output, fused_forward

CPU = torch.device("cpu")
LEFT = Layouts(behind=False)
Precision = tuple[torch.dtype, Callable[[], AbstractContextManager]]
AUTOCAST: Precision = (torch.float32, partial(torch.autocast, "cpu", torch.bfloat16))
WEIGHTS: Precision = (torch.bfloat16, nullcontext)
HALF = pytest.mark.parametrize("precision", [AUTOCAST, WEIGHTS], ids=["autocast", "weights"])


def ids(length: int, seed: int) -> list[int]:
    return [5 + (31 * i + 7 * seed + i * i % 13) % 55 for i in range(length)]


def batch_of(prompts: list[int], completions: list[int]) -> TokenBatch:
    rows = [ids(p + c, seed) for seed, (p, c) in enumerate(zip(prompts, completions, strict=True))]
    return TokenBatch.from_lists(
        [row[:p] for row, p in zip(rows, prompts, strict=True)],
        [row[p:] for row, p in zip(rows, prompts, strict=True)],
        0,
        CPU,
    )


#: The longest completions behind the shortest prompts: on the left most of a row would be padding.
BATCH = batch_of([3, 30, 12, 1, 21, 8, 17, 5], [28, 4, 16, 31, 9, 22, 13, 27])


def build(model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_architecture(model_type).to(dtype)
    add_fused_head(model, 0.8, False)
    add_head_output(model)
    return model


def as_trained(model: Any, **options: Any) -> Tensor:
    """A graph and gradient checkpointing, two rows at a time, the last ones first."""
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    result = torch.zeros(BATCH.completion_ids.shape)
    for rows in torch.arange(len(BATCH)).flip(0).split(2):
        part = BATCH.select(rows)
        width = part.completion_ids.size(1)
        result[rows, :width] = fused_forward(model, *part.joined(), width, **options).logps.detach().float()
    return result


@torch.no_grad()
def as_scored(model: Any) -> Tensor:
    """Without a graph, all rows at once."""
    model.eval()
    model.gradient_checkpointing_disable()
    return fused_forward(model, *BATCH.joined(), BATCH.completion_ids.size(1)).logps.float()


def noise(model: Any, precision: Precision, **options: Any) -> Tensor:
    """`(N,)`, of tokens that two forwards of one model say the same of."""
    with precision[1]():
        return (as_trained(model, **options) - as_scored(model))[BATCH.completion_mask != 0].abs()


# --- the same rounding in every layout -------------------------------------------------------------------------------
ROTARY = ("llama", "qwen3", "mistral", "gpt_neox", "phi3", "gemma2")


@HALF
@pytest.mark.parametrize("model_type", ROTARY)
def test_training_and_scoring_agree(model_type: str, precision: Precision) -> None:
    model = build(model_type, precision[0])
    behind = noise(model, precision)
    restrict_layouts(model, LEFT)
    left = noise(model, precision)
    # The control: these tokens have the noise of half precision once prompts are padded on the left.
    assert float((left > 1e-3).float().mean()) > 0.5
    assert float(behind.mean()) < 0.05 * float(left.mean())
    assert float((behind > 1e-4).float().mean()) < 0.05


def test_the_loss_that_balances_experts_leaves_their_rounding_as_it_is() -> None:
    """It takes padded rows in training where frozen models' are packed, also without checkpointing."""
    model = build("mixtral")
    behind = noise(model, AUTOCAST, auxiliary_loss=True)
    restrict_layouts(model, LEFT)
    left = noise(model, AUTOCAST, auxiliary_loss=True)
    assert float(behind.mean()) < 0.1 * float(left.mean())


def test_experts_are_balanced_over_the_same_tokens_wherever_their_padding_stands() -> None:
    model, rows = build("mixtral"), (*BATCH.joined(), BATCH.completion_ids.size(1))
    losses = [
        padded_forward(model, *rows, auxiliary_loss=True, flush_left=flush).auxiliary_loss for flush in (False, True)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


@HALF
def test_virtual_tokens_stand_before_the_rows(precision: Precision) -> None:
    base = tiny_architecture("llama").to(precision[0])
    torch.manual_seed(0)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    add_fused_head(model.get_base_model(), 0.8, False)
    assert not should_pack(model, BATCH.joined()[1])
    width = BATCH.completion_ids.size(1)
    with precision[1](), torch.no_grad():
        together = fused_forward(model, *BATCH.joined(), width).logps
        for row in range(len(BATCH)):
            part = BATCH.select(torch.tensor([row]))
            alone = fused_forward(model, *part.joined(), part.completion_ids.size(1)).logps[0]
            assert float((together[row, : len(alone)] - alone).abs().mean()) < 1e-3


@HALF
def test_requests_read_the_states_of_the_same_forward(precision: Precision) -> None:
    model, chosen = build("qwen3", precision[0]), BATCH.completion_mask != 0
    request = HeadRequest(chosen, lambda hidden_states, head, logps: (hidden_states, logps))
    with precision[1]():
        output = fused_forward(model.train(), *BATCH.joined(), chosen.size(1), request, auxiliary_loss=False)
        without = fused_forward(model, *BATCH.joined(), chosen.size(1))
    assert torch.equal(output.logps, without.logps)
    assert output.answer is not None
    assert torch.equal(output.answer[1], output.logps[chosen])
    assert output.answer[0].shape == (int(chosen.sum()), 32)


# --- when ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_full_precision_keeps_the_rows_as_they_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", dtype)
    monkeypatch.setattr(trl_seam, "should_pack", lambda model, mask: False)
    monkeypatch.setattr(trl_seam, "prefixes_to_share", lambda *_: None)
    with torch.no_grad():
        found, expected = (
            run(model, *BATCH.joined(), BATCH.completion_ids.size(1)).logps for run in (fused_forward, padded_forward)
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_decide_without_autocast(dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    assert computing_dtype(model, CPU) == dtype
    assert padding_behind(model, CPU) == (dtype in (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_where_it_is_on(dtype: torch.dtype) -> None:
    model = build("llama")
    with torch.autocast("cpu", dtype):
        assert computing_dtype(model, CPU) == dtype
        assert padding_behind(model, CPU)
        with torch.autocast("cpu", enabled=False):
            assert not padding_behind(model, CPU)


def test_a_model_of_other_layouts_keeps_to_them() -> None:
    model = build("gpt2")
    restrict_layouts(model, Layouts(padded=False))
    assert padding_behind(model, CPU)
    restrict_layouts(model, LEFT)
    assert not padding_behind(model.to(torch.bfloat16), CPU)
    assert layouts_of(model) == LEFT


@pytest.mark.slow
def test_tf32_rounds_as_float16_does() -> None:
    """Both ways of PyTorch to ask for it, in a process of its own: the old one cannot be read once the new is set."""
    script = (
        "import torch; from torch import nn; from sg_opd_trl.models import forward\n"
        "forward.inner_model = lambda model: type('Model', (), {'dtype': torch.float32})\n"
        "def tell(): print(forward.computing_dtype(nn.Linear(1, 1), torch.device('cuda')))\n"
        "tell()\ntorch.backends.cuda.matmul.allow_tf32 = True\ntell()\n"
        "torch.backends.cuda.matmul.fp32_precision = 'ieee'\ntell()\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\ntell()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.split() == ["torch.float32", "torch.float16"] * 2, done.stderr


# --- on an accelerator -----------------------------------------------------------------------------------------------
def test_moving_rows_never_waits_for_the_device() -> None:
    """A tensor without data has no values to wait for: whatever reads one raises."""
    nowhere = [tensor.to("meta") for tensor in BATCH.joined()]
    moved = move_left(*nowhere, 31)
    assert moved.model_inputs["input_ids"].shape == nowhere[0].shape
    assert moved.unpack(torch.zeros(8, nowhere[0].size(1) - 1, device="meta")).shape == (8, 31)


def test_columns_that_no_row_needs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chosen = build("llama"), BATCH.completion_mask != 0
    request = HeadRequest(chosen, lambda hidden_states, head, logps: (hidden_states, logps))

    def run() -> Any:
        return padded_forward(model, *BATCH.joined(), chosen.size(1), request, flush_left=True)

    trimmed = run()
    monkeypatch.setattr(forward, "_columns", lambda present: present.size(1))
    whole = run()
    torch.testing.assert_close(whole.logps, trimmed.logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.answer, trimmed.answer, rtol=1e-4, atol=1e-4)
