"""What the benchmarks share: models of a given shape, injected rollouts, single optimizer steps, a table.

Rollouts are injected, so that every trainer works on the same rows and generation is not part of the time.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PROMPT_TOKENS = (16, 48)
ROLLOUTS_PER_PROMPT = 8


@dataclass(frozen=True)
class Shape:
    """Size of a random Qwen3."""

    hidden_size: int = 256
    layers: int = 4
    vocab_size: int = 8192


def quiet() -> None:
    """Silence what would tear the table apart."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def build_model(shape: Shape, seed: int) -> Qwen3ForCausalLM:
    """A random float32 model; different seeds disagree about every token."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=3 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.hidden_size // 64),
        num_key_value_heads=max(1, shape.hidden_size // 128),
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).float()


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word per id, so that every id decodes."""
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"t{i}": i for i in range(3, vocab_size)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def completion_lengths(kind: str, rows: int, longest: int, seed: int = 0) -> list[int]:
    """Tokens per row: `long-tailed` is log-normal with one row of `longest`, `fixed` is its mean for every row."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.exp(1.1 * torch.randn(rows, generator=generator))
    lengths = (draws / draws.max() * longest).round().clamp(min=4).int().tolist()
    return lengths if kind == "long-tailed" else [round(statistics.mean(lengths))] * rows


@dataclass
class Rollouts:
    """The same rows for every trainer."""

    prompts: list[str]
    completion_ids: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens of all completions."""
        return sum(map(len, self.completion_ids))

    @property
    def padding(self) -> float:
        """Share of padding when all rows are padded to the longest."""
        width = max(map(len, self.completion_ids))
        return 1 - self.tokens / (width * len(self.completion_ids))

    def dataset(self) -> Dataset:
        """One prompt per group."""
        return Dataset.from_dict({"prompt": self.prompts})


def make_rollouts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> Rollouts:
    """Random tokens of the given lengths, ended by the end token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocab_size, (count,), generator=generator).tolist()

    widths = torch.randint(*PROMPT_TOKENS, (len(lengths) // ROLLOUTS_PER_PROMPT,), generator=generator).tolist()
    prompts = [" ".join(f"t{i}" for i in ids(width)) for width in widths]
    return Rollouts(prompts, [[*ids(length - 1), 1] for length in lengths])


def alternating_verifier(completions: list, **_: Any) -> list[float]:
    """Right, wrong, right, ...: every group has variance, so that the gate and the reference have work."""
    return [float(i % 2) for i in range(len(completions))]


def common_settings(micro_batch: int, micro_batches: int, **settings: Any) -> dict:
    """Configuration of one optimizer step over injected rollouts, valid for all of TRL's trainers here."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_completion_length": 1024,
        "learning_rate": 1e-6,
        "max_steps": 1000,
        "save_strategy": "no",
        "logging_strategy": "no",
    } | settings


class Stepper:
    """Runs single optimizer steps of a trainer on injected rollouts."""

    def __init__(self, trainer: Any, rollouts: Rollouts, rows_per_prompt: int = ROLLOUTS_PER_PROMPT) -> None:
        self.trainer = trainer
        self.examples = [{"prompt": p} for p in rollouts.prompts for _ in range(rows_per_prompt)]
        with_log_probs = rollouts.completion_ids, None
        single = rollouts.completion_ids
        name = type(trainer).__name__
        result = single if name == "DistillationTrainer" else with_log_probs
        trainer._generate_single_turn = lambda *args, **kwargs: result
        trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps

    def __call__(self) -> float:
        """One optimizer step; returns its seconds."""
        trainer, count = self.trainer, self.trainer.args.gradient_accumulation_steps
        trainer.model.train()
        synchronise()
        start = time.perf_counter()
        for i in range(count):
            trainer.accelerator.gradient_state._set_sync_gradients(i == count - 1)
            trainer.training_step(trainer.model, list(self.examples), None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        synchronise()
        return time.perf_counter() - start


def synchronise() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved_medians(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each step function; they take turns, so that a busy moment hits all of them."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(step())
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, rows: Sequence[Sequence[Any]], headings: Sequence[str], data: dict) -> None:
    """One table and one JSON line."""
    cells = [[str(cell) for cell in row] for row in [headings, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    print(f"\n{title}")
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(json.dumps({"benchmark": title, **data}))


def arguments(description: str, **defaults: int) -> argparse.Namespace:
    """Integer flags with defaults, and the number of threads."""
    parser = argparse.ArgumentParser(description=description)
    for name, value in ({"threads": 2} | defaults).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    quiet()
    return chosen
