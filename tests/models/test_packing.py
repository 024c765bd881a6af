"""Rows without padding: packing and unpacking by hand, and the models that it is used for."""

from typing import Any

import pytest
import torch
from architectures import EXPERTS, SIZES
from tiny import tiny_model
from torch import nn
from transformers import FalconH1Config, FalconH1ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.models.forward import pack, should_pack

CPU = torch.device("cpu")
# 2 + 3, 1 + 2 and 3 + 0 tokens in rows of 3 + 4 columns.
HAND = TokenBatch.from_lists([[5, 6], [7], [8, 9, 10]], [[11, 12, 1], [13, 1], []], 0, CPU)
HAND = TokenBatch(HAND.prompt_ids, HAND.prompt_mask, *(nn.functional.pad(x, (0, 1)) for x in
                  (HAND.completion_ids, HAND.completion_mask)))  # fmt: skip


# --- by hand ---------------------------------------------------------------------------------------------------------
def test_pack_by_hand() -> None:
    inputs = pack(*HAND.joined(), 4).model_inputs
    assert inputs["input_ids"].tolist() == [[5, 6, 11, 12, 1, 7, 13, 1, 8, 9, 10]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2]]
    # The last prompt token predicts the first of the completion, the last token of a row nothing.
    assert inputs["shift_labels"].tolist() == [[-100, 11, 12, 1, -100, 13, 1, -100, -100, -100, -100]]
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 5, 8, 11]
    assert inputs["max_length_q"] == inputs["max_length_k"] == 5
    assert "attention_mask" not in inputs
    assert "labels" not in inputs


def test_unpack_by_hand() -> None:
    packed = pack(*HAND.joined(), 4)
    values = torch.arange(11.0).unsqueeze(0)
    assert packed.unpack(values).tolist() == [[1.0, 2.0, 3.0, 0.0], [5.0, 6.0, 0.0, 0.0], [0.0] * 4]
    assert packed.unpack(values.double()).dtype == torch.float64


def test_packing_leaves_its_arguments_as_they_are() -> None:
    ids, mask = HAND.joined()
    before = ids.clone(), mask.clone()
    pack(ids, mask, 4)
    assert torch.equal(ids, before[0])
    assert torch.equal(mask, before[1])


def test_a_row_without_any_token_has_no_bounds_and_no_scores() -> None:
    ids = torch.tensor([[0, 0, 0, 0], [3, 4, 5, 0], [0, 0, 0, 0]])
    packed = pack(ids, torch.tensor([[0] * 4, [1, 1, 1, 0], [0] * 4]), 2)
    assert packed.model_inputs["cu_seq_lens_q"].tolist() == [0, 3]
    assert packed.unpack(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]]


def test_the_first_token_of_a_row_without_a_prompt_is_predicted_by_nothing() -> None:
    batch = TokenBatch.from_lists([[], [5]], [[6, 7, 8], [9, 1]], 0, CPU)
    packed = pack(*batch.joined(), 3)
    assert packed.model_inputs["shift_labels"].tolist() == [[7, 8, -100, 9, 1, -100]]
    assert packed.unpack(torch.arange(6.0).unsqueeze(0)).tolist() == [[0.0, 0.0, 1.0], [3.0, 4.0, 0.0]]


def test_random_rows_against_lists() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        lengths = torch.randint(0, 6, (int(torch.randint(1, 6, (1,), generator=generator)), 2), generator=generator)
        rows = [(list(range(3, 4 + p)), list(range(20, 20 + c))) for p, c in lengths.tolist()]
        batch = TokenBatch.from_lists([p for p, _ in rows], [c for _, c in rows], 0, CPU)
        width = batch.completion_ids.size(1)
        packed = pack(*batch.joined(), width)
        assert packed.model_inputs["input_ids"].tolist() == [[t for p, c in rows for t in p + c]]
        assert packed.model_inputs["position_ids"].tolist() == [[i for p, c in rows for i in range(len(p + c))]]
        labels = [[-100] * (len(p) - 1) + c + [-100] for p, c in rows]
        assert packed.model_inputs["shift_labels"].tolist() == [[t for row in labels for t in row]]
        # A value that is its own label comes back at the place of that token.
        unpacked = packed.unpack(packed.model_inputs["shift_labels"].float())
        assert unpacked.tolist() == [[float(t) for t in c] + [0.0] * (width - len(c)) for _, c in rows]


# --- where it is used ------------------------------------------------------------------------------------------------
IMPLEMENTATIONS = {
    "flash_attention_2": True,
    "flash_attention_3": True,
    "kernels-community/flash-attn2": True,
    "kernels-community/flash-attn3@main": True,
    "kernels-community/vllm-flash-attn3": True,
    "someone/flash_attn:flash_attn_varlen_func": True,
    "sdpa": True,
    "eager": False,
    "flex_attention": False,
    "paged|flash_attention_2": False,
    "paged|kernels-community/flash-attn2": False,
    "kernels-community/metal-flash-sdpa": False,
}


MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])


def packs_exactly(model: nn.Module) -> bool:
    """For rows with padding."""
    return should_pack(model, MASK)


def with_kernel(model: Any, name: str | None = "flash_attention_2") -> Any:
    model.config._attn_implementation = name
    return model


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_attention_implementations(name: str) -> None:
    assert packs_exactly(with_kernel(tiny_model(0), name)) is IMPLEMENTATIONS[name]


def test_on_the_cpu_the_default_attention_packs_where_padding_is_saved() -> None:
    model, dense = tiny_model(0), torch.ones(4, 10, dtype=torch.long)
    assert should_pack(model, MASK)
    assert not should_pack(model, dense)
    assert should_pack(with_kernel(model), dense), "a kernel keeps rows apart at no cost"


def test_checkpointing_needs_a_kernel_with_gradient_only() -> None:
    """Its second forward would run with the model's own attention, where packed rows see one another."""
    model = tiny_model(0).train()
    model.gradient_checkpointing_enable()
    assert not should_pack(model, MASK)
    with torch.no_grad():
        assert should_pack(model, MASK)
    assert should_pack(with_kernel(model), MASK)


def test_other_devices_need_a_kernel() -> None:
    with torch.device("meta"):
        assert not should_pack(tiny_model(0), MASK.to("meta").new_ones(2, 3))


def test_wrappers_do_not_hide_the_model() -> None:
    peft = pytest.importorskip("peft")
    model = with_kernel(tiny_model(0))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for wrapped in (adapted, nn.DataParallel(model), nn.DataParallel(adapted), torch.compile(model)):
        assert packs_exactly(wrapped)
    assert not packs_exactly(nn.Linear(2, 2))


def test_virtual_tokens_are_not_packed() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    assert not packs_exactly(peft.get_peft_model(with_kernel(tiny_model(0)), settings))


RECURRENT = {
    "linear_attention": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, **EXPERTS)),
    "mamba": lambda: FalconH1ForCausalLM(FalconH1Config(**SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8)),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_states_that_run_on_from_row_to_row_are_not_packed(kind: str) -> None:
    with torch.device("meta"):
        assert not packs_exactly(with_kernel(RECURRENT[kind]()))


@pytest.mark.parametrize(
    ("types", "packed"),
    [
        (["full_attention", "sliding_attention"], True),
        (["full_attention", "linear_attention"], False),
        (["full_attention", "conv"], False),
        (["full_attention", "chunked_attention"], False),
        (None, True),
    ],
)
def test_kinds_of_layers(types: list[str] | None, packed: bool) -> None:
    model = with_kernel(tiny_model(0))
    model.config.layer_types = types
    assert packs_exactly(model) is packed


def test_a_model_around_a_language_model_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_kernel(tiny_model(0))
    inner = type(model.config)()
    monkeypatch.setattr(type(model.config), "get_text_config", lambda self, **_: inner)
    assert not packs_exactly(model)
