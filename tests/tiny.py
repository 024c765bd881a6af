"""Tiny models, tokenizer, data and trainers for the tests; nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ["<pad>", "<eos>", "<unk>", "user", "assistant"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def tiny_tokenizer(characters: str = "0123456789+=abcdefgh ") -> PreTrainedTokenizerFast:
    """One token per character, three special tokens and the two roles."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["user", "assistant"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(
    seed: int, *, vocab_size: int = 26, hidden_size: int = 32, layers: int = 2, std: float = 0.5, **config: Any
) -> Qwen3ForCausalLM:
    """A random Qwen3 whose predictions are far from uniform."""
    torch.manual_seed(seed)
    settings = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=std / hidden_size**0.5,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **config,
    )
    return Qwen3ForCausalLM(settings).float()


def tiny_data(rows: int = 16, *, chat: bool = True) -> Dataset:
    """Prompts of different lengths, with a solution column."""
    questions = ["".join(str((i * 7 + j) % 10) for j in range(1 + i % 5)) + "+1=" for i in range(rows)]
    prompts = [[{"role": "user", "content": q}] if chat else q for q in questions]
    return Dataset.from_dict({"prompt": prompts, "solution": [str(i % 3) for i in range(rows)]})


def parity_verifier(completions: list, completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Right where the number of tokens plus the first token is even: mixed groups for random models."""
    return [float((len(ids) + ids[0]) % 2 == 0) for ids in completion_ids]


def save_pair(folder: Path, seed: int, **config: Any) -> str:
    """A tiny model with its tokenizer as a local folder."""
    tiny_model(seed, **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_config(folder: Path, **settings: Any) -> Any:
    """A configuration for 2 optimizer steps on the CPU."""
    from sg_opd_trl import SGOPDConfig

    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "shuffle_dataset": False,
    }
    return SGOPDConfig(**(defaults | settings))


def tiny_trainer(folder: Path, *, settings: dict | None = None, trainer_class: Any = None, **arguments: Any) -> Any:
    """A trainer on random models; teacher and student differ."""
    from sg_opd_trl import SGOPDTrainer

    defaults = {
        "model": tiny_model(0),
        "reward_funcs": parity_verifier,
        "teacher_model": tiny_model(1),
        "teacher_processing_class": tiny_tokenizer(),
        "processing_class": tiny_tokenizer(),
        "train_dataset": tiny_data(),
    }
    return (trainer_class or SGOPDTrainer)(args=tiny_config(folder, **(settings or {})), **(defaults | arguments))
