"""Supervised training of the built-in teachers and students, and the files of the built-in data sets.

Everything runs on the CPU. The global random state is left as it was found, so that a training run gives the same
numbers whether its models had to be prepared or came from the cache.
"""

import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from .models import build_model, build_tokenizer
from .problems import BaseProblem, ProblemSplits, Task, is_correct
from .settings import DataSettings, ModelSettings, SupervisedSettings

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
MAX_SOLUTION_TOKENS = 40  # a worked solution has at most 34 with its end of turn
SPLIT_NAMES = ("train", "test", "tune")


@contextmanager
def isolated_cpu_generator(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block and give its former state back afterwards.

    `torch.manual_seed` would also reseed every GPU, which this does not touch.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def prepare_dataset(folder: Path, task: Task[Any], settings: DataSettings) -> dict[str, object]:
    """Write the splits as JSON Lines with columns `prompt` (a conversation) and `solution` (the number).

    Args:
        folder: Existing folder to write to.
        task: Kind of problems.
        settings: Sizes and seed.

    Returns:
        dict[str, object]: Numbers worth keeping with the data set.
    """
    splits = task.draw_splits(settings)
    sizes: dict[str, object] = {}
    for name in SPLIT_NAMES:
        problems: list[BaseProblem] = getattr(splits, name)
        rows = [json.dumps({"prompt": problem.messages, "solution": problem.answer}) for problem in problems]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        sizes[f"num_{name}"] = len(problems)
    # Without this `load_dataset` finds only the names it knows, and `tune` is not one of them.
    files = "".join(f"  - split: {name}\n    path: {name}.jsonl\n" for name in SPLIT_NAMES)
    header = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
    (folder / "README.md").write_text(f"{header}\n# builtin/{task.name}\n", encoding="utf-8")
    return sizes


def prepare_model(
    folder: Path,
    task: Task[Any],
    title: str,
    seed: int,
    data: DataSettings,
    shape: ModelSettings,
    training: SupervisedSettings,
) -> dict[str, object]:
    """Train one model and save it with its tokenizer.

    Args:
        folder: Existing folder to write to.
        task: Kind of problems.
        title: What the progress display calls the model.
        seed: Seed of the weights, the training problems and their slips.
        data: Gives the problems to keep out of training.
        shape: Shape of the model.
        training: Data, length and learning rate.

    Returns:
        dict[str, object]: Steps taken, last loss, and the accuracy that stopped the training, if any.
    """
    tokenizer = build_tokenizer(shape.max_position_embeddings)
    splits = task.draw_splits(data)
    with isolated_cpu_generator(seed):
        model = build_model(shape, tokenizer)
        outcome = _train(model, tokenizer, title, random.Random(f"{title} {seed}"), task, splits, training)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return outcome


def encode_examples(
    problems: Sequence[BaseProblem], solutions: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode conversations of a question and its solution.

    Args:
        problems: N problems.
        solutions: N solutions.
        tokenizer: Has the chat template.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: Token ids and labels, both (N, T) int64, padded on the right. Labels cover
        the solution and its end of turn; everything else is -100.
    """
    rows, prompt_lengths = [], []
    # One text at a time: encoding in parallel would make every later fork of the process print a warning.
    for problem, solution in zip(problems, solutions, strict=True):
        prompt = _prompt_text(problem, tokenizer)
        prompt_lengths.append(len(tokenizer(prompt)["input_ids"]))
        rows.append(tokenizer(f"{prompt}{solution}{tokenizer.eos_token}")["input_ids"])
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for index, (row, prompt_length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        labels[index, prompt_length : len(row)] = ids[index, prompt_length : len(row)]
    return ids, labels


@torch.no_grad()
def sampled_accuracy(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[BaseProblem],
    num_samples: int,
    do_sample: bool = True,
) -> float:
    """Share of right answers over several completions of each problem.

    Args:
        model: Put into evaluation mode for the generation and left as it was.
        tokenizer: Has the chat template.
        problems: N problems.
        num_samples: Completions for each problem.
        do_sample: False decodes greedily; temperature 1 otherwise, from the global generator.

    Returns:
        float: Share in [0, 1] of the N x `num_samples` completions that end in the right number.
    """
    prompts = [_prompt_text(problem, tokenizer) for problem in problems]
    # All questions have the same number of tokens, so nothing is padded.
    ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in prompts]).repeat_interleave(num_samples, dim=0)
    was_training = model.training
    model.eval()
    # transformers types `self` by a protocol that its own models do not meet.
    output = model.generate(  # type: ignore[misc]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_SOLUTION_TOKENS,
        do_sample=do_sample,
        # Other ranks may be waiting for this one, so it must not wait for them.
        synced_gpus=False,
    )
    model.train(was_training)
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    right = sum(is_correct(text, problems[index // num_samples].answer) for index, text in enumerate(texts))
    return right / len(texts)


def _prompt_text(problem: BaseProblem, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.apply_chat_template(problem.messages, tokenize=False, add_generation_prompt=True))


def _train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    generator: random.Random,
    task: Task[Any],
    splits: ProblemSplits[Any],
    settings: SupervisedSettings,
) -> dict[str, object]:
    ids, labels = _training_examples(task, tokenizer, generator, splits, settings)
    # 0.95 and not 0.999: an average over a thousand steps is no use to a training of a few hundred.
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
    model.train()
    accuracy, loss, step = None, torch.zeros(()), 0
    with tqdm(total=settings.max_steps, desc=f"{title}: supervised training", unit="step") as bar:
        for step, rows in enumerate(_batches(len(ids), generator, settings), start=1):
            loss = model(input_ids=ids[rows], labels=labels[rows]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            if _is_check(step, settings):
                accuracy = sampled_accuracy(model, tokenizer, splits.validation, settings.check_samples)
            if step % settings.check_every == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", **({} if accuracy is None else {"accuracy": accuracy}))
            if _has_arrived(accuracy, settings):
                break
    _warn_if_short(title, accuracy, settings)
    return {"steps": step, "loss": loss.item(), "validation_accuracy": accuracy}


def _training_examples(
    task: Task[Any],
    tokenizer: PreTrainedTokenizerBase,
    generator: random.Random,
    splits: ProblemSplits[Any],
    settings: SupervisedSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    # Not `tune`: it came later, and keeping it out would have changed the models made before.
    held_out = {problem.identity for problem in (*splits.validation, *splits.test)}
    count = settings.num_problems or settings.batch_size * settings.max_steps
    problems = task.draw_problems(count, generator, held_out)
    solutions = [task.write_solution(problem, settings, generator) for problem in problems]
    return encode_examples(problems, solutions, tokenizer)


def _batches(num_rows: int, generator: random.Random, settings: SupervisedSettings) -> Iterator[list[int]]:
    """Rows of each step: passes over all rows in a new random order, cut into batches across pass borders."""
    # Passes are not rounded to batches: a problem set smaller than a batch works too.
    order: list[int] = []
    for _ in range(settings.max_steps):
        while len(order) < settings.batch_size:
            order += generator.sample(range(num_rows), num_rows)
        yield order[: settings.batch_size]
        del order[: settings.batch_size]


def learning_rate_factor(step: int, settings: SupervisedSettings) -> float:
    """Linear warm-up, then a cosine to zero at `schedule_steps`; a factor in [0, 1] of the learning rate."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    span = max(1, settings.schedule_steps - settings.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - settings.warmup_steps) / span)))


def _is_check(step: int, settings: SupervisedSettings) -> bool:
    if settings.stop_accuracy is None or step < settings.check_from:
        return False
    return (step - settings.check_from) % settings.check_every == 0


def _has_arrived(accuracy: float | None, settings: SupervisedSettings) -> bool:
    return accuracy is not None and settings.stop_accuracy is not None and accuracy >= settings.stop_accuracy


def _warn_if_short(title: str, accuracy: float | None, settings: SupervisedSettings) -> None:
    if settings.stop_accuracy is not None and not _has_arrived(accuracy, settings):
        logger.warning(
            "%s: accuracy on the validation problems is %s after %d steps, below the %.2f at which training stops; "
            "the model is kept as it is.",
            title,
            "unknown" if accuracy is None else f"{accuracy:.2f}",
            settings.max_steps,
            settings.stop_accuracy,
        )
