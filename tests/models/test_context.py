"""Positions that a model has: read from its configuration, stretched by RoPE, kept in a table or not."""

from typing import Any

import pytest
import torch
from architectures import tiny_architecture
from transformers import GenerationConfig, LlamaConfig, Qwen3Config

from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.models.context import extended_positions, keeps_a_table
from sg_opd_trl.models.generate import generate_completions
from sg_opd_trl.trl_seam import add_fused_head, fused_forward

POSITIONS = 64  # of every tiny architecture that has any


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 100),
        ({"rope_type": "linear", "factor": 4.0}, 400),
        # As Qwen's cards have it: the configuration keeps the length of training.
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 100}, 200),
        # Llama's and Phi's tell the stretched length themselves.
        (
            {
                "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 25,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            },
            100,
        ),
    ],
)  # fmt: skip
def test_positions_as_far_as_rope_stretches_them(settings: dict, expected: int) -> None:
    rope = {"rope_theta": 1e4, "rope_type": "default"} | settings
    assert extended_positions(LlamaConfig(max_position_embeddings=100, rope_parameters=rope)) == expected


def test_positions_of_a_composite_and_of_a_model_without_any() -> None:
    assert extended_positions(tiny_architecture("emu3").config) == POSITIONS
    assert extended_positions(tiny_architecture("mamba").config) is None
    assert extended_positions(tiny_architecture("bloom").config) is None
    assert extended_positions(Qwen3Config(max_position_embeddings=77)) == 77


# Learned (GPT-2, OPT), sinusoidal (CTRL), rotary from a buffer (GPT-J); rotary as it is now, and states.
@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("gpt2", True),
        ("opt", True),
        ("ctrl", True),
        ("gptj", True),
        ("qwen3", False),
        ("phi3", False),
        ("jamba", False),
    ],
)
def test_a_table_is_told_from_positions_that_go_on(name: str, table: bool) -> None:
    model = tiny_architecture(name)
    assert keeps_a_table(model) is table
    # The oracle: what one token more than there are positions ends in.
    row = torch.full((1, POSITIONS + 1), 7)
    try:
        with torch.no_grad():
            model(input_ids=row)
        ended = False
    except (IndexError, RuntimeError):
        ended = True
    assert ended is table


def scorer(name: str) -> Any:
    model = tiny_architecture(name)
    add_fused_head(model, 1.0, False)
    return model


def test_a_row_beyond_the_table_is_named() -> None:
    ids, mask = torch.full((3, 70), 7), torch.ones(3, 70, dtype=torch.long)
    mask[[0, 2], :10] = 0
    with pytest.raises(
        SGOPDConfigError, match=r"64 positions that GPT2LMHeadModel.*row 1 .*70 tokens.*`max_completion"
    ):
        fused_forward(scorer("gpt2"), ids, mask, 5)
    with torch.no_grad():
        assert fused_forward(scorer("qwen3"), ids, mask, 5).logps.isfinite().all()
        # Padding takes no position.
        mask[1, :6] = 0
        assert fused_forward(scorer("qwen3"), ids, mask, 5).logps.isfinite().all()


def test_a_prompt_without_room_for_its_completion_is_named() -> None:
    config = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=[])
    prompts = [[7], [7] * 58, [7] * 59]
    with pytest.raises(SGOPDConfigError, match=r"the teacher has a table of, got row 2 .*59 tokens.*up to 6"):
        generate_completions(tiny_architecture("gpt2"), prompts, config, role="teacher")
    assert [len(ids) for ids in generate_completions(tiny_architecture("gpt2"), prompts[:2], config)] == [6, 6]
    assert len(generate_completions(tiny_architecture("qwen3"), prompts, config)) == 3
