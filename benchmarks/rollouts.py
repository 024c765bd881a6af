"""Time of the student's rollouts without vLLM: our decoding loop against TRL's path.

    python benchmarks/rollouts.py [--repeats 5] [--limit 256] [--hidden 256] [--layers 4] [--vocab 8192]

Cases:

- `built-in task`: 16 prompts of one length x 8 rollouts of about 34 tokens, the built-in student of 0.1 M parameters.
- `long-tailed`: 8 prompts of 16 to 47 tokens x 8 rollouts, random model. A bias gives the end token a probability of
  4 / `limit` at each step, so that a rollout has about `limit` / 4 tokens and a few rows run into the limit.
- `fixed`: the same with no end token, a quarter as long: no row can be dropped.

TRL's path is `GRPOTrainer._generate_single_turn` itself. The others run with the same settings: TRL's path with a
static cache, TRL's path in batches of prompts of like length, and our loop with one of its parts taken out. Every one
draws its own tokens, so that lengths differ a little. A ratio above 1 means that the one named last is faster.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset, load_dataset
from harness import (
    ROLLOUTS_PER_PROMPT,
    Ratio,
    Shape,
    alternating_verifier,
    arguments,
    build_model,
    build_tokenizer,
    interleaved_medians,
    make_rollouts,
    show,
    timed,
    versus,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from sg_opd_trl.models import generate as decoding
from sg_opd_trl.models.generate import generate_completions
from sg_opd_trl.tasks import resolve

Rollouts = list[list[int]]
END = 1
OURS, TRL = "ours", "TRL"


def trl_trainer(model: Any, tokenizer: Any, limit: int, **settings: Any) -> GRPOTrainer:
    """TRL's trainer, of which only the rollouts are used."""
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=ROLLOUTS_PER_PROMPT,
        num_generations=ROLLOUTS_PER_PROMPT,
        max_completion_length=limit,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        **settings,
    )
    rows = Dataset.from_dict({"prompt": ["t3"] * ROLLOUTS_PER_PROMPT})
    return GRPOTrainer(model, alternating_verifier, args, rows, processing_class=tokenizer)


def builtin_case(student: str, dataset: str) -> tuple[Any, Any, Rollouts, int, dict]:
    """The built-in student and its problems."""
    folder = resolve(student or "builtin/arithmetic-student")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = load_dataset(resolve(dataset or "builtin/arithmetic"), split="test")["prompt"][:16]
    prompts = [
        tokenizer.apply_chat_template(problem, add_generation_prompt=True, return_dict=True)["input_ids"]
        for problem in problems
    ]
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer, prompts, 40, {}


def random_case(shape: Shape, limit: int, chance: float) -> tuple[Any, Any, Rollouts, int, dict]:
    """A random model, whose tokens are about equally likely, with a bias for the end token."""
    tokenizer = build_tokenizer(shape.vocab_size)
    texts = make_rollouts([1] * 8 * ROLLOUTS_PER_PROMPT, shape.vocab_size).prompts
    bias = math.log(chance / (1 - chance) * shape.vocab_size) if chance else -1e9
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    return build_model(shape, 0), tokenizer, prompts, limit, {"sequence_bias": [[[END], bias]]}


@contextmanager
def without(**parts: Any) -> Iterator[None]:
    """Parts of our loop replaced for the time of the block."""
    original = {name: getattr(decoding, name) for name in parts}
    for name, part in parts.items():
        setattr(decoding, name, part)
    try:
        yield
    finally:
        for name, part in original.items():
            setattr(decoding, name, part)


def by_length(generate: Callable[[Rollouts], Any], prompts: Rollouts, batches: int) -> Rollouts:
    """Completions made in batches of prompts of like length."""
    ordered = sorted(prompts, key=len)
    size = -(-len(ordered) // batches)
    return [ids for i in range(0, len(ordered), size) for ids in generate(ordered[i : i + size])]


def ways(case: tuple[Any, Any, Rollouts, int, dict]) -> dict[str, Callable[[], Rollouts]]:
    """All ways of making the rollouts of one case."""
    model, tokenizer, unique, limit, options = case
    prompts = [prompt for prompt in unique for _ in range(ROLLOUTS_PER_PROMPT)]
    trainer = trl_trainer(model, tokenizer, limit, generation_kwargs=options)
    static = trl_trainer(model, tokenizer, limit, generation_kwargs=options, cache_implementation="static")

    def trl(rows: Rollouts, trainer: GRPOTrainer = trainer) -> Rollouts:
        return trainer._generate_single_turn(rows, None, {}, ROLLOUTS_PER_PROMPT)[0]

    def ours(**parts: Any) -> Rollouts:
        with without(**parts):
            return generate_completions(trainer.model, prompts, trainer.generation_config)

    return {
        TRL: lambda: trl(prompts),
        OURS: ours,
        "TRL with a static cache": lambda: trl(prompts, static),
        "TRL in 4 batches by length": lambda: by_length(trl, prompts, 4),
        "ours, no row dropped": lambda: ours(DROP_SHARE=2.0),
        "ours, every prompt prefilled": lambda: ours(_runs=lambda rows: (torch.arange(len(rows)),) * 2),
        "ours, cache copied per token": lambda: ours(give_room=lambda cache: None),
        "ours, torch.multinomial": lambda: ours(draw_tokens=lambda p: torch.multinomial(p, 1).squeeze(1)),
    }


def measure(name: str, case: tuple, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and mean tokens per way."""
    counts: dict[str, list[int]] = {}

    def step(way: str, generate: Callable[[], Rollouts]) -> Callable[[], float]:
        def run() -> float:
            written = counts.setdefault(way, [])
            torch.manual_seed(len(written))
            rollouts: list[Rollouts] = []
            seconds = timed(lambda: rollouts.append(generate()))
            written.append(sum(map(len, rollouts[0])))
            return seconds

        return run

    seconds = interleaved_medians({way: step(way, generate) for way, generate in ways(case).items()}, repeats, name)
    return seconds, {way: statistics.mean(written) for way, written in counts.items()}


def main() -> None:
    args = arguments(__doc__ or "", repeats=5, limit=256, hidden=256, layers=4, vocab=8192, student="", dataset="")
    shape = Shape(args.hidden, args.layers, args.vocab)
    cases = {
        "built-in task": builtin_case(args.student, args.dataset),
        "long-tailed": random_case(shape, args.limit, 4 / args.limit),
        "fixed": random_case(shape, args.limit // 4, 0.0),
    }
    lines: list[Ratio] = []
    data: dict = {"seconds": {}, "tokens": {}}
    for name, case in cases.items():
        seconds, tokens = measure(name, case, args.repeats * (5 if name == "built-in task" else 1))
        data["seconds"][name], data["tokens"][name] = seconds, tokens
        lines += [versus(seconds, TRL, OURS, f"{name}: ", ">= 1.15" if name != "fixed" else ">= 1")]
        lines += [versus(seconds, TRL, way, f"{name}: ") for way in seconds if way not in (TRL, OURS)]
    show("rollouts", lines, data | {"shape": vars(shape), "settings": vars(args)})


if __name__ == "__main__":
    main()
