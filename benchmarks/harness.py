"""What the benchmarks share: models of a given shape, injected rollouts, medians of interleaved steps, the table.

Rollouts are injected, so that every trainer works on the same rows and generation is not part of the time.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from datasets import disable_progress_bars as hide_data_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PROMPT_TOKENS = (16, 48)
ROLLOUTS_PER_PROMPT = 8


@dataclass(frozen=True)
class Shape:
    """Size of a random Qwen3; what is None follows from the hidden size."""

    hidden_size: int = 256
    layers: int = 4
    vocab_size: int = 8192
    heads: int | None = None
    key_value_heads: int | None = None
    head_dim: int = 64
    intermediate_size: int | None = None
    tied: bool = False

    def config(self) -> Qwen3Config:
        """The model's configuration."""
        return Qwen3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size or 3 * self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads or max(1, self.hidden_size // 64),
            num_key_value_heads=self.key_value_heads or max(1, self.hidden_size // 128),
            head_dim=self.head_dim,
            max_position_embeddings=32768,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )


def build_model(shape: Shape, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Qwen3ForCausalLM:
    """A random model; different seeds disagree about every token."""
    torch.manual_seed(seed)
    with torch.device(device) if device != "cpu" else nullcontext():
        return Qwen3ForCausalLM(shape.config()).to(dtype)


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
    def prompt_tokens(self) -> list[int]:
        """Tokens of every row's prompt."""
        return [len(prompt.split()) for prompt in self.prompts for _ in range(ROLLOUTS_PER_PROMPT)]

    @property
    def padding(self) -> float:
        """Share of padding when all rows are padded to the longest."""
        width = max(map(len, self.completion_ids))
        return 1 - self.tokens / (width * len(self.completion_ids))

    def dataset(self) -> Dataset:
        """One prompt per group."""
        return Dataset.from_dict({"prompt": self.prompts})


def make_rollouts(
    lengths: Sequence[int], vocab_size: int, seed: int = 0, prompt_tokens: tuple[int, int] = PROMPT_TOKENS
) -> Rollouts:
    """Random tokens of the given lengths, ended by the end token; prompts of `low` to `high - 1` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocab_size, (count,), generator=generator).tolist()

    widths = torch.randint(*prompt_tokens, (len(lengths) // ROLLOUTS_PER_PROMPT,), generator=generator).tolist()
    prompts = [" ".join(f"t{i}" for i in ids(width)) for width in widths]
    return Rollouts(prompts, [[*ids(length - 1), 1] for length in lengths])


def without_padding(rollouts: Rollouts, vocab_size: int) -> Rollouts:
    """As many tokens (up to rounding) in as many rows, all prompts and all completions of one length."""
    width = round(statistics.mean(rollouts.prompt_tokens))
    rows = len(rollouts.completion_ids)
    return make_rollouts([round(rollouts.tokens / rows)] * rows, vocab_size, prompt_tokens=(width, width + 1))


def alternating_verifier(completions: list, **_: Any) -> list[float]:
    """Right, wrong, right, ...: every group has variance, so that the gate and the reference have work."""
    return [float(i % 2) for i in range(len(completions))]


def synchronise() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


def interleaved_medians(steps: dict[str, Callable[[], float]], repeats: int, title: str = "") -> dict[str, float]:
    """Median seconds of each step function; they take turns, so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    turns = [(turn, name) for turn in range(repeats + 1) for name in steps]
    with progress(turns, title) as bar:
        for turn, name in bar:
            bar.set_postfix_str(name)
            seconds = steps[name]()
            if turn > 0:  # the first turn warms up
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def progress(items: Iterable, title: str) -> tqdm:
    """A bar on the error stream: the table stays alone on the output."""
    return tqdm(items, desc=title, dynamic_ncols=True, file=sys.stderr)


@dataclass(frozen=True)
class Ratio:
    """One line of a table: what is compared, the ratio, what it should be, and what it is made of."""

    name: str
    value: float | None
    target: str = ""
    detail: str = ""

    def cells(self) -> list[str]:
        """The line's texts."""
        value = "-" if self.value is None else f"{self.value:.3g}" if self.value < 0.1 else f"{self.value:.2f}"
        return [value, self.target, self.name, self.detail]


def show(benchmark: str, ratios: Sequence[Ratio], data: dict) -> None:
    """One table and one JSON line, ratios first."""
    cells = [["ratio", "target", "of", "measured"], *(ratio.cells() for ratio in ratios)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    print(f"\n{benchmark}: {machine()}")
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    line = {
        "benchmark": benchmark,
        "ratios": {ratio.name: ratio.value for ratio in ratios},
        "targets": {ratio.name: ratio.target for ratio in ratios if ratio.target},
        "machine": machine(),
    }
    print(json.dumps(line | data))


def machine() -> str:
    """Device, threads and torch, in words."""
    device = f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return f"{device}, torch {torch.__version__}"


def versus(times: dict[str, float], slow: str, fast: str, prefix: str = "", target: str = "") -> Ratio:
    """How many times longer `slow` takes than `fast`."""
    detail = f"{times[slow] * 1000:.0f} ms / {times[fast] * 1000:.0f} ms"
    return Ratio(f"{prefix}{slow} / {fast}", times[slow] / times[fast], target, detail)


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """Flags by their defaults: a tuple is a choice, its first entry the default; a list takes several numbers."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in ({"threads": 2} | defaults).items():
        if isinstance(value, tuple):
            parser.add_argument(f"--{name}", choices=value, default=value[0])
        elif isinstance(value, list):
            parser.add_argument(f"--{name}", type=type(value[0]), nargs="+", default=value)
        elif isinstance(value, bool):
            parser.add_argument(f"--{name}", action="store_true", default=value)
        else:
            parser.add_argument(f"--{name}", type=str if value is None else type(value), default=value)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    quiet()
    return chosen


def quiet() -> None:
    """Silence what would tear the table apart."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    hide_data_bars()
