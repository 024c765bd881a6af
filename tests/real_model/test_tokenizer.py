"""A tokenizer and a chat template that were not made for us, as our data path uses them."""

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from real_model.smollm import DEFAULT_SYSTEM, EXAMPLE, NEEDS_MODEL, question, rows, system_turn
from sg_opd_trl.data import prepare_dataset
from sg_opd_trl.evaluation_sampling import encode_prompt
from sg_opd_trl.models.sampling import end_tokens
from sg_opd_trl.teachers.fit import check_chat_templates, check_tokenizers
from sg_opd_trl.verifiers.calls import read_completions

pytestmark = NEEDS_MODEL


def test_special_tokens_and_ends(folder: str, tokenizer: Any) -> None:
    known = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    assert list(known.values()) == [0, 1, 2]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # which is why padding is told by masks, never by ids
    assert len(tokenizer) == AutoConfig.from_pretrained(folder).vocab_size == 49152
    assert end_tokens(GenerationConfig.from_pretrained(folder).eos_token_id, tokenizer) == [2]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("17 + 25 = 42", ["1", "7", " +", " ", "2", "5", " =", " ", "4", "2"]),
        (r"\boxed{18}", ["\\", "box", "ed", "{", "1", "8", "}"]),
    ],
)
def test_every_digit_is_a_token(tokenizer: Any, text: str, tokens: list[str]) -> None:
    assert [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]] == tokens


def test_texts_come_back_as_they_were(tokenizer: Any) -> None:
    # An ideograph and an emoji are several tokens each.
    for text in ("  a\n\nb ", "café 你好 \U0001f600", r"\frac{1}{2} \le x", "it 's"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def rendered(system: str, *turns: str) -> str:
    """The template by hand; no end token after the last turn, which is yet to be written."""
    roles = ["system", *["user", "assistant"] * (len(turns) // 2 + 1)]
    closed = "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(roles, (system, *turns), strict=False)
    )
    return f"{closed}<|im_start|>assistant\n"


def test_a_prompt_has_the_default_system_turn_and_an_open_answer(tokenizer: Any) -> None:
    prompt = rows(shown=False)[0]["prompt"]
    ids = encode_prompt(tokenizer, prompt, {})
    assert tokenizer.decode(ids) == rendered(DEFAULT_SYSTEM, question(3))
    assert ids[:3] == [1, *tokenizer("system\n")["input_ids"]]  # one begin token, the template's
    assert ids[-4:] == [1, *tokenizer("assistant\n")["input_ids"]]


def test_a_system_prompt_takes_the_place_of_the_default(tokenizer: Any) -> None:
    prepared = prepare_dataset(rows(shown=False), system_prompt="Be short.", instruction="Now.")
    text = tokenizer.decode(encode_prompt(tokenizer, prepared[0]["prompt"], {}))
    assert text == rendered("Be short.", f"{question(3)}\nNow.")


def test_an_answer_continues_its_prompt_in_the_next_turn(tokenizer: Any) -> None:
    first, second = EXAMPLE[:1], [*EXAMPLE, {"role": "user", "content": question(3)}]
    written = [*tokenizer(EXAMPLE[1]["content"])["input_ids"], tokenizer.eos_token_id]
    start = encode_prompt(tokenizer, first, {}) + written
    whole = encode_prompt(tokenizer, second, {})
    assert whole[: len(start)] == start
    assert (
        tokenizer.decode(whole[len(start) :])
        == f"\n<|im_start|>user\n{question(3)}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_completions_are_read_without_their_end_and_with_every_other_token(tokenizer: Any) -> None:
    ids = [*tokenizer(r" \boxed{3}")["input_ids"], 2]
    read = read_completions(
        tokenizer, [EXAMPLE[:1]], [ids], lambda prompts: [encode_prompt(tokenizer, prompts[0], {})]
    )
    assert read == [[{"role": "assistant", "content": r" \boxed{3}"}]]


def test_student_and_teacher_of_one_family_render_alike(folder: str, tokenizer: Any) -> None:
    other = AutoTokenizer.from_pretrained(folder)
    check_tokenizers(tokenizer, other, "teacher")
    prompts = [*rows()["prompt"], [system_turn("Be short."), *EXAMPLE[:1]]]
    check_chat_templates(prompts, [encode_prompt(tokenizer, prompt, {}) for prompt in prompts], other, "teacher")


def test_the_conversion_says_nothing_of_quantisation_and_keeps_the_embeddings_tied(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
