"""Tiny models, tokenizer, data and trainers for the tests; nothing is downloaded."""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

SPECIAL = ["<pad>", "<eos>", "<unk>", "user", "assistant"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)

#: The anchor at full weight from the first step to the last: two steps have no phase 1 otherwise.
ANCHOR = {"teacher_sampling_phase1_end_frac": 1.0, "teacher_sampling_phase2_end_frac": 1.0}


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


class GradientRecorder(TrainerCallback):
    """Keeps the gradient of every optimizer step, all micro-batches and ranks merged, as it reaches the optimizer."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append(
            {name.removeprefix("module."): p.grad.detach().clone() for name, p in named if p.grad is not None}
        )


def copied_weights(model: Any) -> dict[str, torch.Tensor]:
    """All weights as they are now."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same_saved_student(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, in every bit."""
    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def changed_weights(model: Any, before: dict[str, torch.Tensor]) -> list[str]:
    """Names of the weights that differ from `before` in any bit, NaN included."""
    return [name for name, parameter in model.named_parameters() if not torch.equal(parameter.detach(), before[name])]


def inject_rollouts(trainer: Any, write: Callable[[list[int], int], list[int]]) -> None:
    """Have `write(prompt ids, row of the global batch)` make the student's rollouts."""

    def generate(prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        first = trainer.accelerator.process_index * len(prompt_ids)
        return [write(ids, first + row) for row, ids in enumerate(prompt_ids)], None

    trainer._generate_single_turn = generate


def inject_teacher_rollouts(trainer: Any, write: Callable[[list[int]], list[int]]) -> None:
    """Have `write(prompt ids)` make the rollouts of the teacher, or of each of several."""
    for teacher in getattr(trainer.teacher, "distinct", [trainer.teacher]):
        teacher.generate = lambda prompts, *_, **__: [write(ids) for ids in prompts]


def logged(trainer: Any, name: str) -> list[float]:
    """Logged values of one metric, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class ScriptedVerifier:
    """Verdicts by row for a batch of `len(verdicts)` completions, parity for any other (the teacher's rollouts)."""

    __name__ = "scripted_verifier"

    def __init__(self, verdicts: list[float | None]) -> None:
        self.verdicts = verdicts
        self.calls: list[tuple[list, list[list[int]]]] = []

    def __call__(self, prompts: list, completions: list, completion_ids: list[list[int]], **_: Any) -> list:
        self.calls.append((prompts, completion_ids))
        if len(completion_ids) == len(self.verdicts):
            return list(self.verdicts)
        return parity_verifier(completions, completion_ids)


class StepRecorder(GradientRecorder):
    """Keeps the weights of every optimizer step too, as they are before the step."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.weights.append(copied_weights(kwargs["model"]))


def script_generation(model: Any, max_new_tokens: int = 6, vocab_size: int = 26) -> Any:
    """Make `generate` a function of the prompt and of how often it occurs in the batch, so that runs can be compared.

    Half of the completions end with the end token (id 1), the others are as long as allowed.
    """

    def completion(prompt: list[int], occurrence: int) -> list[int]:
        draw = random.Random(f"{prompt}{occurrence}")
        ids = [draw.randrange(3, vocab_size) for _ in range(max_new_tokens)]
        length = draw.randrange(1, 2 * max_new_tokens)
        return [*ids[: length - 1], 1] if length <= max_new_tokens else ids

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        seen: Counter = Counter()
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = ids[mask == 1].tolist()
            row = completion(prompt, seen[tuple(prompt)])
            seen[tuple(prompt)] += 1
            rows.append(row + [0] * (max_new_tokens - len(row)))
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    model.generate = generate
    return model


def relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the second, all parameters together, in float64."""
    assert left.keys() == right.keys()
    difference = sum(float((left[name].double() - right[name].double()).square().sum()) for name in left)
    return (difference / sum(float(value.double().square().sum()) for value in right.values())) ** 0.5
