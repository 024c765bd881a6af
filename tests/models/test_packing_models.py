"""Models that score the same rows packed and padded: log-probs, entropies, gradients, and the tokens they see."""

from typing import Any

import pytest
import torch
from architectures import EXPERTS, SIZES
from tiny import relative_difference, tiny_model
from torch import Tensor
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head
from varlen_attention import count_tokens, use_kernel

from sg_opd_trl import trl_seam
from sg_opd_trl.models.batch import TokenBatch, score_rows
from sg_opd_trl.models.forward import pack, packed_forward, should_pack
from sg_opd_trl.trl_seam import compact_head, fused_forward

CPU = torch.device("cpu")
GEMMA = {"sliding_window": 3, "query_pre_attn_scalar": 8}
ARCHITECTURES: dict[str, Any] = {
    "qwen3": lambda: tiny_model(0),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=2.0)),
    # Its layers keep the rows' bounds from its attention.
    "nemotron": lambda: NemotronForCausalLM(NemotronConfig(**SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **GEMMA, sliding_window_pattern=2)),
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16], [17, 18]]
COMPLETIONS = [[20, 1], [21, 22, 23, 24, 25, 6, 7], [5], [], [9, 10, 11, 1], [12, 13, 14]]
BATCHES = {
    "ragged": (PROMPTS, COMPLETIONS),
    "one_row": (PROMPTS[:1], COMPLETIONS[:1]),
    "one_long_row": (PROMPTS[1:2], COMPLETIONS[1:2]),
    "one_masked_among_others": (PROMPTS[2:5], COMPLETIONS[2:5]),
    "no_padding": ([[5, 6], [7, 8], [9, 10]], [[11, 12, 1], [13, 14, 1], [15, 16, 17]]),
    "prompts_of_one_token": ([[5], [7], [9]], [[11], [13, 14], [15, 16, 17]]),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
    return model


def batch_of(name: str) -> TokenBatch:
    return TokenBatch.from_lists(*BATCHES[name], 0, CPU)


def padded_log_probs(model: Any, ids: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-width] = -100
    outputs = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return outputs.log_probs[:, -width:], outputs.entropy[:, -width:]


def rows_alone(model: Any, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Each row by itself, from plain logits, without TRL's head."""
    logps, entropies = (torch.zeros(batch.completion_ids.shape) for _ in range(2))
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row, batch.prompt_mask[row] == 1]
        completion = batch.completion_ids[row, batch.completion_mask[row] == 1]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, completion]).unsqueeze(0), use_cache=False).logits[0].double()
        every = (logits / 0.8).log_softmax(-1)[len(prompt) - 1 : -1]
        for position, token in enumerate(completion.tolist()):
            logps[row, position] = every[position, token]
            entropies[row, position] = -(every[position].exp() * every[position]).sum()
    return logps, entropies


def gradient(model: Any, logps: Tensor, entropies: Tensor) -> dict[str, Tensor]:
    """Of a loss whose every token counts differently."""
    weights = torch.linspace(-1.0, 2.0, logps.numel()).view(logps.shape)
    model.zero_grad()
    (weights * logps + weights.flip(1) * entropies).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


KERNELS = ["sdpa", "eager", "flash_attention_2"]
# Gemma 2 caps its attention scores, which SDPA cannot.
PAIRS = [(name, kernel) for name in ARCHITECTURES for kernel in KERNELS if (name, kernel) != ("gemma2", "sdpa")]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "kernel"), PAIRS)
def test_packed_is_padded(monkeypatch: pytest.MonkeyPatch, name: str, batch: str, kernel: str) -> None:
    model, rows = build(name), batch_of(batch)
    expected = rows_alone(model, rows)
    width = rows.completion_ids.size(1)
    padded = padded_log_probs(model, *rows.joined(), width)
    expected_gradient = gradient(model, *padded)
    if kernel == "flash_attention_2":
        calls = use_kernel(monkeypatch, model)
        assert should_pack(model, rows.joined()[1])
    else:
        model.set_attn_implementation(kernel)
        padded_rows = bool((rows.joined()[1] == 0).any())
        assert should_pack(model, rows.joined()[1]) is (kernel == "sdpa" and padded_rows)
    seen = count_tokens(model)
    packed = packed_forward(model, *rows.joined(), width)[:2]
    for ours, theirs, alone in zip(packed, padded, expected, strict=True):
        assert ours.shape == rows.completion_ids.shape
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 1e-5
        assert (ours - alone).abs().max() < 1e-5
        assert (ours[rows.completion_mask == 0] == 0).all()
    assert packed[0].min() < -1
    # Nemotron's squared ReLU and 1 + weight of its norms round more.
    assert relative_difference(gradient(model, *packed), expected_gradient) < (3e-5 if name == "nemotron" else 1e-5)
    lengths = [len(p + c) for p, c in zip(*BATCHES[batch], strict=True)]
    assert seen.shapes == [(1, sum(lengths))]
    # Nemotron's attention finds the rows in the positions, and leaves a single row as it is.
    if kernel == "flash_attention_2" and (name != "nemotron" or len(lengths) > 1):
        assert calls.rows == [lengths] * 2, "one call per layer, with the rows apart"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_that_saw_one_another_would_be_noticed(name: str) -> None:
    model, rows = build(name), batch_of("ragged")
    packed = pack(*rows.joined(), 7)
    inputs = {key: packed.model_inputs[key] for key in ("input_ids", "shift_labels")}
    mixed = packed.unpack(model(**inputs, fused_lm_head=True).log_probs)
    assert (mixed - rows_alone(model, rows)[0])[1:].abs().max() > 0.1


@pytest.mark.parametrize(
    "model",
    [
        FalconForCausalLM(FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=26)),
        StableLmForCausalLM(StableLmConfig(**SIZES)),
    ],
    ids=["falcon", "stablelm"],
)
def test_models_with_attention_of_their_own_stay_padded(model: Any) -> None:
    assert model.config._attn_implementation == "sdpa"
    assert not should_pack(model, batch_of("ragged").joined()[1])


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_the_sliding_windows_of_these_models_hide_something(name: str) -> None:
    model, rows = build(name), batch_of("one_long_row")
    narrow = packed_forward(model, *rows.joined(), 7).logps
    model.config.sliding_window = 64
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "sliding_window") and layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = 64
    assert (packed_forward(model, *rows.joined(), 7).logps - narrow).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(monkeypatch: pytest.MonkeyPatch, reentrant: bool) -> None:
    model, rows = build("qwen3").train(), batch_of("ragged")
    expected = gradient(model, *padded_log_probs(model, *rows.joined(), 7))
    use_kernel(monkeypatch, model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert relative_difference(gradient(model, *packed_forward(model, *rows.joined(), 7)[:2]), expected) < 1e-5


def test_without_any_counted_token_gradients_are_zero_and_reach_every_weight() -> None:
    """All rows were cut off and masked: data parallel training waits for a gradient of every weight."""
    model, rows = build("qwen3"), TokenBatch.from_lists([[5, 6, 7], [8]], [[], []], 0, CPU)
    with compact_head(CPU):
        logps, entropies, *_ = packed_forward(model, *rows.joined(), 1)
    assert logps.tolist() == entropies.tolist() == [[0.0], [0.0]]
    gradients = gradient(model, logps, entropies)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert not any(value.any() for value in gradients.values())


def test_a_bfloat16_model_gives_float32() -> None:
    logps, entropies = packed_forward(build("qwen3").bfloat16(), *batch_of("ragged").joined(), 7)[:2]
    assert logps.dtype == entropies.dtype == torch.float32


def test_a_head_without_entropies_gives_none() -> None:
    model = tiny_model(0)
    trl_seam.add_fused_head(model, 1.0, False)
    assert packed_forward(model, *batch_of("ragged").joined(), 7).entropies is None


# --- scoring ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_scoring_runs_on_tokens_only(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    model, batch, rows = build("qwen3"), batch_of("ragged"), torch.tensor([True, True, True, False, True, True])
    expected = rows_alone(model, batch)[0]
    use_kernel(monkeypatch, model)
    seen = count_tokens(model)

    @torch.no_grad()
    def score(input_ids: Tensor, attention_mask: Tensor, width: int) -> Tensor:
        return fused_forward(model, input_ids, attention_mask, width).logps

    scores = score_rows(score, batch, rows, budget)
    assert (scores - expected).abs().max() < 1e-5
    every_token = [len(p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True) if c]
    assert sum(seen.packed) == sum(every_token)
    assert all(shape[0] == 1 for shape in seen.shapes)
    # lengths 5, 8, 6, 5, 5 within 20 tokens: (8, 6), (5, 5, 5)
    assert len(seen.shapes) == {1: 5, 20: 2, 10_000: 1}[budget]


def test_without_the_kernel_scoring_is_padded() -> None:
    model, batch = build("qwen3"), batch_of("ragged")
    model.set_attn_implementation("eager")
    seen = count_tokens(model)
    scores = fused_forward(model, *batch.joined(), 7).logps
    assert (scores - rows_alone(model, batch)[0]).abs().max() < 1e-5
    assert seen.shapes == [(6, 5 + 7)]
    assert seen.packed == []
