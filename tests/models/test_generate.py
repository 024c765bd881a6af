"""Completions: end tokens, options, adapters and batch layout against loops without cache, padding or sharing."""

import logging
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_model
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from sg_opd_trl import NonFiniteError
from sg_opd_trl.models import generate as decoding
from sg_opd_trl.models.generate import cut_after_eos, generate_completions, written_together

VOCABULARY, END = 26, 1
SHORT, LONG, OTHER = [3, 7], [4, 9, 10, 11, 12, 4], [5, 5, 8]
PROMPTS = [SHORT, SHORT, LONG, LONG, LONG, OTHER, SHORT]
LEFT = "left to the decoding loop"


def settings(**changes: Any) -> GenerationConfig:
    defaults = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [END], "pad_token_id": 0}
    return GenerationConfig(**(defaults | changes))


def sampled(**changes: Any) -> GenerationConfig:
    return settings(do_sample=True, **({"top_k": 0} | changes))


def greedy_oracle(model: Any, prompt: list[int], limit: int, ends: tuple[int, ...] = (END,)) -> list[int]:
    """One row, no cache, no padding: the whole sequence is run again for every token."""
    completion: list[int] = []
    while len(completion) < limit and not (completion and completion[-1] in ends):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits
        completion.append(int(logits[0, -1].argmax()))
    return completion


def plain(model: Any, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """The same through the loop of transformers, every row on its own padded place."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [cut_after_eos(row, config.eos_token_id) for row in output[:, width:].tolist()]


@pytest.fixture(autouse=True)
def no_warning_yet() -> None:
    """Every reason warns once in a process."""
    decoding._warn_of_slow_loop.cache_clear()


@pytest.fixture
def own_loop(caplog: pytest.LogCaptureFixture) -> Any:
    """The test fails if anything was left to the loop of transformers."""
    yield
    # Those of the test itself: `caplog.text` is empty again by now.
    assert not any(LEFT in record.getMessage() for record in caplog.get_records("call"))


@pytest.mark.usefixtures("own_loop")
def test_the_seed_decides() -> None:
    model = tiny_model(0, std=0.2)

    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return generate_completions(model, PROMPTS, sampled())

    assert drawn(3) == drawn(3) != drawn(4)


@pytest.mark.parametrize(("options", "told"), [({}, True), ({"num_beams": 2}, False)], ids=["own loop", "beams"])
def test_only_the_own_loop_tells_of_rows_that_end(options: dict, told: bool) -> None:
    found: dict[int, list[int]] = {}
    config = settings(eos_token_id=[END, *range(5, 26, 4)], **options)
    completions = generate_completions(
        tiny_model(2), PROMPTS, config, on_ended=lambda *pair: found.update(zip(*pair, strict=True))
    )
    ended = {row: ids for row, ids in enumerate(completions) if ids[-1] in config.eos_token_id}
    assert ended, "the case occurs"
    assert found == (ended if told else {})


# --- greedy: equal to one row at a time ------------------------------------------------------------------------------
def small(kind: str) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.4, "pad_token_id": 0}
    ends = {"eos_token_id": END, "bos_token_id": None}
    if kind == "qwen3":
        return tiny_model(0)
    if kind == "gpt2":  # learned positions
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **shape, **ends)).eval()
    if kind == "bloom":  # no positions at all
        return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **shape, **ends)).eval()
    shape |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, **ends}
    if kind == "sliding window":
        return MistralForCausalLM(MistralConfig(sliding_window=5, **shape)).eval()
    if kind == "dynamic":
        rope = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
        return LlamaForCausalLM(LlamaConfig(rope_parameters=rope, max_position_embeddings=BORDER, **shape)).eval()
    rope = {"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 8.0]}
    shape |= {"max_position_embeddings": 96, "original_max_position_embeddings": BORDER, "rope_parameters": rope}
    if kind == "phi3":
        return Phi3ForCausalLM(Phi3Config(**shape)).eval()
    rope |= {"short_mscale": 1.0, "long_mscale": 1.2, "original_max_position_embeddings": BORDER}
    return PhimoeForCausalLM(PhimoeConfig(num_local_experts=2, **shape)).eval()


BORDER = 16  # tokens beyond which the RoPE of these models changes for every token


@pytest.mark.usefixtures("own_loop")
@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "bloom", "sliding window", "phi3", "phimoe"])
@pytest.mark.parametrize("prompts", [PROMPTS, [OTHER, OTHER, OTHER]], ids=["padded", "one length"])
def test_greedy_equals_one_row_at_a_time(kind: str, prompts: list[list[int]]) -> None:
    """70 tokens: the key-value buffers grow several times."""
    model, ends = small(kind), () if kind.startswith("phi") else (END,)
    limit = 70 if ends else 2 * BORDER
    wanted = [greedy_oracle(model, prompt, limit, ends) for prompt in prompts]
    assert generate_completions(model, prompts, settings(max_new_tokens=limit, eos_token_id=list(ends))) == wanted


# A prompt that ends before the border, at it, and beyond it; equal rows, and one that ends early and leaves the batch.
@pytest.mark.usefixtures("own_loop")
@pytest.mark.parametrize("length", [3, BORDER - 1, BORDER, BORDER + 1, BORDER + 5])
def test_a_model_that_drops_its_cache_writes_what_plain_forwards_say(length: int) -> None:
    """Phi-3 and Phi-4-mini types. The logits of every token, and one forward of all tokens where RoPE changes."""
    model, prompts = (
        small("phi3"),
        [list(range(3, 3 + length)), [*range(4, 3 + length), 9], list(range(3, 3 + length))],
    )
    shapes: list[tuple[int, ...]] = []
    logits: list[Tensor] = []

    def look(_: Any, __: Any, inputs: dict[str, Any], output: Any) -> None:
        shapes.append(tuple(inputs["input_ids"].shape))
        logits.append(output.logits[0, -1])

    hook = model.register_forward_hook(look, with_kwargs=True)
    ends = [greedy_oracle(model, prompts[1], 20, ends=())[4]]
    shapes.clear()
    logits.clear()
    written = generate_completions(model, prompts, settings(max_new_tokens=20, eos_token_id=ends))
    hook.remove()
    assert written == [greedy_oracle(model, prompt, 20, tuple(ends)) for prompt in prompts]
    for step, found in enumerate(logits[: len(written[0])]):
        with torch.no_grad():
            plain_logits = model(input_ids=torch.tensor([prompts[0] + written[0][:step]]), use_cache=False).logits
        torch.testing.assert_close(found, plain_logits[0, -1], atol=1e-4, rtol=1e-4)
    whole = [width for _, width in shapes[1:] if width > 1]
    crosses = length <= BORDER < length + len(written[0]) - 1
    assert whole == ([BORDER + 1] if crosses else [])


@pytest.mark.usefixtures("own_loop")
def test_dynamic_rope_is_that_of_generate_for_each_row_alone() -> None:
    """Beside a longer row, a shorter one would get frequencies of the longer."""
    model, config = small("dynamic"), settings(max_new_tokens=30)
    wanted = [ids for prompt in PROMPTS for ids in plain(model, [prompt], config)]
    assert generate_completions(model, PROMPTS, config) == wanted
    assert plain(model, PROMPTS, config) != wanted, "the case occurs"


@pytest.mark.parametrize(("completion", "batches"), [(10, 1), (11, 3)])
def test_prompts_are_written_together_until_one_of_them_passes_the_border(completion: int, batches: int) -> None:
    assert len(written_together(small("phi3"), PROMPTS, completion)) == batches
    assert len(written_together(small("sliding window"), PROMPTS, completion)) == 1


@pytest.mark.usefixtures("own_loop")
@pytest.mark.parametrize("limit", [1, 2, 30])
def test_rows_end_at_any_end_token_or_the_limit(limit: int) -> None:
    model = tiny_model(0)
    ends = (END, 13, 17, 24)
    wanted = [greedy_oracle(model, prompt, limit, ends) for prompt in PROMPTS]
    config = settings(max_new_tokens=limit, eos_token_id=list(ends))
    assert generate_completions(model, PROMPTS, config) == wanted
    cold = sampled(max_new_tokens=limit, eos_token_id=list(ends), temperature=1e-5)
    assert generate_completions(model, PROMPTS, cold) == wanted
    if limit == 30:
        assert len({len(ids) for ids in wanted}) > 1
        assert any(ids[-1] in ends for ids in wanted)


@pytest.mark.usefixtures("own_loop")
@pytest.mark.parametrize(
    "option",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9},
        {"suppress_tokens": [4, 9, 13]},
        {"begin_suppress_tokens": [4, 9, 13]},
        {"bad_words_ids": [[15], [22, 4]]},
        {"sequence_bias": [[[END], 4.0]]},
        {"forced_eos_token_id": END},
        {"exponential_decay_length_penalty": (2, 1.5)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_are_those_of_transformers(option: dict[str, Any]) -> None:
    model = tiny_model(2)
    prompts = [[token, 5] for token in range(3, 26)] + PROMPTS
    config = settings(max_new_tokens=16, **option)
    wanted = plain(model, prompts, config)
    assert generate_completions(model, prompts, config) == wanted
    if "min_new_tokens" not in option:
        assert wanted != plain(model, prompts, settings(max_new_tokens=16)), "the option must matter here"


def test_nothing_is_left_out_of_a_short_list() -> None:
    assert generate_completions(tiny_model(0), [], settings()) == []
    assert generate_completions(tiny_model(0), [SHORT], settings()) == [greedy_oracle(tiny_model(0), SHORT, 12)]


def test_under_autocast_and_in_training_mode() -> None:
    model = tiny_model(0).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        completions = generate_completions(model, PROMPTS, sampled())
    assert all(1 <= len(ids) <= 12 for ids in completions)
    assert model.training


# --- what is left to transformers ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"max_time": 60.0},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 2},
    ],
    ids=lambda option: next(iter(option)),
)
def test_other_options_are_left_to_transformers(option: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    config = settings(disable_compile=True, **option)
    wanted = plain(tiny_model(2), PROMPTS, config)
    assert generate_completions(tiny_model(2), PROMPTS, config) == wanted
    assert warnings_of(caplog) == 1


def warnings_of(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelno == logging.WARNING and LEFT in record.getMessage() for record in caplog.records)


def test_each_reason_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    for options in ({"max_time": 60.0}, {"max_time": 60.0}, {"num_beams": 3}, {"max_time": 60.0}):
        generate_completions(tiny_model(2), [SHORT], settings(**options))
    assert warnings_of(caplog) == 2
    assert "options ['MaxTimeCriteria']" in caplog.text
    assert "BEAM_SEARCH" in caplog.text


def test_what_is_left_to_transformers_starts_from_an_untouched_random_state() -> None:
    config = sampled(max_time=60.0)
    model = tiny_model(2)
    torch.manual_seed(3)
    wanted = plain(model, PROMPTS, config)
    torch.manual_seed(3)
    assert generate_completions(model, PROMPTS, config) == wanted


def test_a_sharded_model_keeps_the_loop_that_ranks_agree_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(0)
    seen: list[dict[str, Any]] = []

    def generate(input_ids: Tensor, **arguments: Any) -> Tensor:
        seen.append(arguments)
        return torch.cat([input_ids, input_ids[:, -1:]], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert generate_completions(model, PROMPTS, settings(), synced_gpus=True) == [[prompt[-1]] for prompt in PROMPTS]
    assert [(x["synced_gpus"], "custom_generate" in x) for x in seen] == [(True, False)]
    assert "the model is sharded" in caplog.text


# --- adapters and errors ---------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("own_loop")
def test_a_lora_student() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(0), config).eval()
    wanted = [greedy_oracle(model, prompt, 12) for prompt in PROMPTS]
    assert generate_completions(model, PROMPTS, settings()) == wanted
    assert wanted != [greedy_oracle(tiny_model(0), prompt, 12) for prompt in PROMPTS]


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False, alora_invocation_tokens=[11]
        ),
    ],
    ids=["prompt", "prefix", "activated LoRA"],
)
def test_adapters_that_prepare_every_row_are_left_to_transformers(
    config: PeftConfig, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(0), config).eval()
    wanted = plain(model, PROMPTS, settings())
    assert generate_completions(model, PROMPTS, settings()) == wanted
    assert "an adapter prepares inputs" in caplog.text
    assert wanted != [greedy_oracle(tiny_model(0), prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("options", [{}, {"max_time": 60.0}], ids=["own loop", "transformers"])
def test_logits_that_are_not_finite(options: dict[str, Any]) -> None:
    model = tiny_model(0)
    with torch.no_grad():
        model.lm_head.weight[7, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"The student's logits are not finite.*Check the student's weights"):
        generate_completions(model, PROMPTS, sampled(**options))


@pytest.mark.parametrize(
    ("ids", "ends", "cut"),
    [
        ([5, 1, 6, 1], (1, 2), [5, 1]),
        ([5, 6], (1, 2), [5, 6]),
        ([1], 1, [1]),
        ([], (1,), []),
        ([5, 2, 1], [1, 2], [5, 2]),
        ([5, 2, 1], None, [5, 2, 1]),
    ],
)
def test_cut_after_the_first_end_token(ids: list[int], ends: Any, cut: list[int]) -> None:
    assert cut_after_eos(ids, ends) == cut
