import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sg_opd_trl.tasks import arithmetic, chains
from sg_opd_trl.tasks.models import VOCABULARY, build_tokenizer
from sg_opd_trl.tasks.settings import SupervisedSettings

ALPHABET = [token for token in VOCABULARY if not token.startswith("<")]


@pytest.fixture(params=["built", "loaded"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedTokenizerBase:
    built = build_tokenizer()
    if request.param == "built":
        return built
    built.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_vocabulary_is_complete(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == len(set(VOCABULARY)) == 32
    assert [tokenizer.convert_ids_to_tokens(index) for index in range(32)] == list(VOCABULARY)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert set(tokenizer.all_special_tokens) == {"<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>"}
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 256


def test_one_token_for_each_word_and_character(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("user 12=\\boxed{34}\n<|im_end|>") == [
        *("user", " ", "1", "2", "=", "\\boxed{", "3", "4", "}", "\n", "<|im_end|>")
    ]
    # 3 steps of 8 characters, 2 commas, a space, \boxed{, 4 digits, }: 24 + 2 + 1 + 1 + 4 + 1 = 33.
    assert len(tokenizer(r"6+6+0=12,9+4+1=14,8+2+1=11 \boxed{1142}")["input_ids"]) == 33


def test_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerBase) -> None:
    generator = random.Random(0)
    texts = ["".join(generator.choices(ALPHABET, k=30)) for _ in range(200)]
    clean = SupervisedSettings(batch_size=1, max_steps=1, schedule_steps=1, learning_rate=1e-3)
    for task in (arithmetic.TASK, chains.TASK):
        problems = task.draw_problems(50, generator)
        texts += [problem.question + task.write_solution(problem, clean, generator) for problem in problems]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert (
            tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text
        )


def test_decoding_keeps_the_boxed_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(r"8+2+1=11 \boxed{1142}<|im_end|><|endoftext|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == r"8+2+1=11 \boxed{1142}"


def test_other_characters_are_unknown(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("1z2") == ["1", "<unk>", "2"]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_template_equals_encoding_the_rendered_text(
    tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool
) -> None:
    conversations = [
        [{"role": "user", "content": "896+246="}],
        [{"role": "system", "content": "1+1"}, {"role": "user", "content": "896+246="}],
        [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": r"\boxed{2}"}],
    ]
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)["input_ids"]
        assert ids == tokenizer(text)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert text.endswith("<|im_start|>assistant\n") is add_generation_prompt


def test_rendered_prompt_by_hand(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "896+246="}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n896+246=<|im_end|>\n<|im_start|>assistant\n"
    answered = [*messages, {"role": "assistant", "content": r"\boxed{1142}"}]
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    assert whole == prompt + "\\boxed{1142}<|im_end|>\n"


def test_batch_is_padded_on_the_left(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = tokenizer(["1", "123"], padding=True)
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert batch["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2
