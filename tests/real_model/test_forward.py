"""Rows of unequal length, scored and continued together, against each of them alone."""

from typing import Any

import pytest
import torch
from oracle import Row
from transformers import GenerationConfig

from real_model.plain import log_probs
from real_model.smollm import BOX, EXAMPLE, NEEDS_MODEL, WORKED_EXAMPLES, question, system_turn
from sg_opd_trl.evaluation_sampling import encode_prompt
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.models.forward import packed_forward, padded_forward, should_pack
from sg_opd_trl.models.generate import generate_completions
from sg_opd_trl.trl_seam import add_fused_head, compact_head

pytestmark = NEEDS_MODEL
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def written(tokenizer: Any) -> list[Row]:
    """Prompts of 20 to 90 tokens with answers of 1 to 22."""
    asked = {"role": "user", "content": question(3)}
    prompts = ([system_turn(""), asked], [system_turn(WORKED_EXAMPLES), *EXAMPLE, asked], [system_turn(BOX), asked])
    answers = (r"\boxed{3}", "She has 3 pens, and the 2 cats do not write. " * 2, "")
    return [
        Row(encode_prompt(tokenizer, prompt, {}), [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def test_packed_and_padded_log_probs_are_those_of_each_row_alone(model: Any, written: list[Row]) -> None:
    with torch.no_grad():
        expected = [log_probs(model, row, TEMPERATURE) for row in written]
    assert min(len(row.prompt) for row in written) < 40 < 80 < max(len(row.prompt) for row in written)
    batch = TokenBatch.from_lists(
        [row.prompt for row in written], [row.completion for row in written], 2, torch.device("cpu")
    )
    ids, mask = batch.joined()
    width = batch.completion_ids.size(1)
    add_fused_head(model, TEMPERATURE, cast_lm_head_to_fp32=False)
    assert should_pack(model, mask)
    for forward in (padded_forward, packed_forward):
        with torch.no_grad(), compact_head(ids.device):
            found = forward(model, ids, mask, width).logps
        for row, own, logps in zip(written, expected, found, strict=True):
            torch.testing.assert_close(logps[: len(row.completion)].double(), own, rtol=0, atol=1e-4)


def test_completions_written_together_are_those_written_alone(model: Any, written: list[Row], tokenizer: Any) -> None:
    prompts = [row.prompt for row in written]
    config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=2, pad_token_id=2)
    found = generate_completions(model, prompts, config)
    alone = [model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist() for ids in prompts]
    assert found == alone
    assert found[1] == [*tokenizer(r"\boxed{3}")["input_ids"], 2]  # the examples are followed, and answered rightly
