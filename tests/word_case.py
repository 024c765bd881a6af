"""A random model over sixteen words, four problems and an evaluation of three samples each."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from sg_opd_trl.evaluation import evaluate_model

WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", *(f"w{index}" for index in range(11))]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )


def word_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, eos_token_id=1, pad_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def word_data() -> Dataset:
    texts = ["w0", "w1 w2 w3 w4", "w5 w6", "w7 w8 w9"]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    return Dataset.from_dict({"prompt": prompts, "solution": [0, 1, 2, 3], "level": [5, 6, 7, 8]})


def even_length(completions, completion_ids, **kwargs):
    return [float(len(ids) % 2 == 0) for ids in completion_ids]


def run(model, tokenizer, dataset, **changes):
    settings = {"num_samples": 3, "max_new_tokens": 6, "batch_size": 4, "reward_func": even_length, "progress": False}
    return evaluate_model(model, tokenizer, dataset, **(settings | changes))
