"""One forward: exactly what TRL's own trainer gets from the same rows, and the answers of a `HeadRequest`."""

import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from architectures import EXPERTS, SIZES
from tiny import tiny_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from sg_opd_trl import trl_seam
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.models.forward import HeadRequest, scattered
from sg_opd_trl.models.head import OutputHead
from sg_opd_trl.trl_seam import add_head_output, compact_head, fused_forward

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
COMPLETIONS = [[20, 1], [21, 22, 23, 24, 25, 6, 7], [5], []]
BATCH = TokenBatch.from_lists(PROMPTS, COMPLETIONS, 0, CPU)
WIDTH = 7
MODELS: dict[str, Any] = {
    "dense": lambda: tiny_model(0),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS)),
}
#: Forwards of TRL's policy: dense, and with experts with and without their auxiliary loss.
CASES = [("dense", False), ("mixtral", False), ("mixtral", True), ("qwen3_moe", False), ("qwen3_moe", True)]


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().float()
    add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
    add_head_output(model)
    return model


@contextmanager
def layout(monkeypatch: pytest.MonkeyPatch, packed: bool) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(trl_seam, "should_pack", lambda model, mask: packed)
        patch.setattr(trl_seam, "prefixes_to_share", lambda *_: None)
        yield


def gradient(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(logps: Tensor, entropies: Any, auxiliary: Tensor | None) -> Tensor:
    """Every token counts differently."""
    weights = torch.linspace(-1.0, 2.0, logps.numel()).view(logps.shape)
    loss = (weights * logps + weights.flip(1) * entropies).sum()
    return loss if auxiliary is None else loss + 3 * auxiliary


def trls_forward(model: nn.Module, wants_auxiliary: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    trainer: Any = types.SimpleNamespace(accelerator=Accelerator(cpu=True), args=types.SimpleNamespace(report_to=[]))
    return GRPOTrainer._get_per_token_logps_and_entropies(
        trainer, model, *BATCH.joined(), WIDTH, compute_entropy=True, compute_aux_loss=wants_auxiliary
    )


@pytest.mark.parametrize(("name", "wants_auxiliary"), CASES)
@pytest.mark.parametrize("compact", [True, False])
def test_padded_rows_give_what_trl_gives(
    monkeypatch: pytest.MonkeyPatch, name: str, wants_auxiliary: bool, compact: bool
) -> None:
    """To the bit where TRL projects the same positions, and to rounding where it projects padding too."""
    model, exact = build(name), {"rtol": 0, "atol": 0} if compact else {"rtol": 1e-5, "atol": 1e-5}
    with compact_head(CPU) if compact else nullcontext():
        expected = trls_forward(model, wants_auxiliary)
    expected_gradient = gradient(model, loss_of(*expected))
    with layout(monkeypatch, packed=False):
        found = fused_forward(model, *BATCH.joined(), WIDTH, auxiliary_loss=wants_auxiliary)
    assert [x is None for x in found] == [False, False, not wants_auxiliary, True]
    for ours, theirs in list(zip(found[:3], expected, strict=True))[: 2 + wants_auxiliary]:
        assert theirs.detach().abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, **exact)
    found_gradient = gradient(model, loss_of(*found[:3]))
    assert found_gradient.keys() == expected_gradient.keys() == dict(model.named_parameters()).keys()
    for key, value in found_gradient.items():
        torch.testing.assert_close(value, expected_gradient[key], **exact)


def test_experts_are_balanced_over_padded_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_moe")
    with layout(monkeypatch, packed=True):
        assert fused_forward(model, *BATCH.joined(), WIDTH).auxiliary_loss is None
        found = fused_forward(model, *BATCH.joined(), WIDTH, auxiliary_loss=True).auxiliary_loss
    expected = trls_forward(model, True)[2]
    assert found is not None
    assert torch.equal(found, expected)


# --- requests --------------------------------------------------------------------------------------------------------
#: Fewer rows and columns than the forward has, and the last token of a row among them.
CHOSEN = torch.zeros(3, 5, dtype=torch.bool)
CHOSEN[0, 1] = CHOSEN[1, 0] = CHOSEN[1, 4] = CHOSEN[2, 0] = True
TOKENS = torch.tensor([1, 21, 25, 5])


def scores(hidden_states: Tensor, head: OutputHead, logps: Tensor) -> tuple[Tensor, ...]:
    """The tokens' log-probs anew, their distributions, and the log-probs as they are given."""
    every = head.logits(hidden_states @ head.weight.t()).log_softmax(-1)
    return every.gather(1, TOKENS.unsqueeze(1)).squeeze(1), every, logps


@pytest.mark.parametrize("packed", [False, True])
def test_a_request_is_given_the_states_that_predict_the_chosen_tokens(
    monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    model = build("dense")
    plain = model(input_ids=torch.tensor([PROMPTS[1] + COMPLETIONS[1]])).logits[0].div(0.8).log_softmax(-1)
    with layout(monkeypatch, packed):
        output = fused_forward(model, *BATCH.joined(), WIDTH, HeadRequest(CHOSEN, scores))
        without = fused_forward(model, *BATCH.joined(), WIDTH)
    assert torch.equal(output.logps, without.logps), "the forward itself is the same"
    assert output.answer is not None
    again, every, given = output.answer
    assert torch.equal(given, output.logps[:3, :5][CHOSEN])
    torch.testing.assert_close(again, given, rtol=1e-5, atol=1e-5)
    # The second and third chosen token: the first and fifth of the second row's completion.
    torch.testing.assert_close(every[1:3], plain[[0, 4]], rtol=1e-5, atol=1e-5)
    ours, theirs = (gradient(model, (x * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum()) for x in (again, given))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_request_without_log_probs_spares_the_projection(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    model = build("dense")
    with layout(monkeypatch, packed):
        full = fused_forward(model, *BATCH.joined(), WIDTH, HeadRequest(CHOSEN, scores))
        bare = fused_forward(model, *BATCH.joined(), WIDTH, HeadRequest(CHOSEN, scores, needs_logps=False))
    assert full.answer is not None
    assert bare.answer is not None
    assert torch.equal(bare.answer[1], full.answer[1])
    assert not bare.logps.any()
    assert not bare.answer[2].any()


@pytest.mark.parametrize("packed", [False, True])
def test_a_request_may_choose_no_token(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    request = HeadRequest(torch.zeros(4, WIDTH, dtype=torch.bool), lambda states, head, logps: (states, logps))
    with layout(monkeypatch, packed):
        output = fused_forward(build("dense"), *BATCH.joined(), WIDTH, request)
    assert output.answer is not None
    assert [tuple(x.shape) for x in output.answer] == [(0, 32), (0,)]


def test_scattered_is_the_inverse_of_choosing() -> None:
    for values in (torch.arange(1.0, 5.0), torch.arange(1.0, 13.0).view(4, 3)):
        back = scattered(values, CHOSEN)
        assert back.shape == (3, 5, *values.shape[1:])
        assert torch.equal(back[CHOSEN], values)
        assert not back[~CHOSEN].any()
