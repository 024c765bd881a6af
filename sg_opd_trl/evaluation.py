"""Sampled accuracy of a model: avg@k and pass@k with bootstrap intervals over problems."""

import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .data import ends_with_an_answer, is_empty_prompt
from .errors import DataError, SGOPDConfigError
from .files import write_atomically

if TYPE_CHECKING:
    from .evaluation_sampling import Sample, Sampler

_RESAMPLED_AT_ONCE = 4_000_000  # values: 32 MB of float64, and as much of indices


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that at least one of `k` samples is right: `1 - C(n - c, k) / C(n, k)`.

    Args:
        num_samples: samples drawn for the problem, `n >= 1`.
        num_correct: right ones among them, `0 <= c <= n`.
        k: size of a draw without replacement, `1 <= k <= n`. With `k = n` it is "any sample right".

    Returns:
        A probability in [0, 1].

    Raises:
        SGOPDConfigError: if a count is out of range.
    """
    if not 1 <= k <= num_samples:
        raise SGOPDConfigError(
            f"`k` must be between 1 and `num_samples`, got {k} with `num_samples` {num_samples}. pass@k draws k of "
            f"the samples without replacement. Set `num_samples` to at least {max(k, 1)}, or lower `k`."
        )
    if not 0 <= num_correct <= num_samples:
        raise SGOPDConfigError(
            f"`num_correct` must be between 0 and `num_samples`, got {num_correct} with `num_samples` {num_samples}. "
            "It counts the right samples. Set `num_samples` to the number of samples that were judged."
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def bootstrap_interval(
    values: Iterable[float], *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over problems.

    Problems, not samples, are drawn with replacement: samples of one problem depend on each other. Where all values
    are equal (one problem included) the width is 0, which says that no spread was seen, not that the mean is exact.

    Args:
        values: one number per problem, shape (N,), N >= 1.
        level: coverage in (0, 1).
        num_resamples: resampled data sets.
        seed: of a private generator.

    Returns:
        Lower and upper bound of the mean.

    Raises:
        DataError: if there are no values.
    """
    observed = np.asarray(list(values), dtype=np.float64)
    if observed.size == 0:
        raise DataError("`values` must hold a number per problem, got none. A mean needs one. Evaluate some problems.")
    if np.ptp(observed) == 0:
        return float(observed[0]), float(observed[0])
    generator = np.random.default_rng(seed)
    rows = max(1, _RESAMPLED_AT_ONCE // observed.size)
    means = [
        observed[generator.integers(observed.size, size=(min(rows, num_resamples - start), observed.size))].mean(1)
        for start in range(0, num_resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class EvaluationResult:
    """Accuracy of one model on one data set, with the settings it belongs to.

    Accuracies are shares in [0, 1], intervals 95% bootstrap intervals over problems. `abstained` counts completions
    without a verdict, which count as not right; `truncated` those that ended at `max_new_tokens`. `mean_length` is in
    tokens, `seconds` is the wall time of sampling and judging.
    """

    model: str
    num_problems: int
    num_samples: int
    k: int
    avg_at_k: float
    avg_interval: tuple[float, float]
    pass_at_k: float
    pass_interval: tuple[float, float]
    abstained: int
    truncated: int
    mean_length: float
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    seconds: float
    dataset: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields, as values that JSON can hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def describe_settings(self) -> str:
        """Problems and sampling settings in a phrase."""
        source = f" of {self.dataset}" if self.dataset else ""
        return (
            f"{self.num_problems} problems{source}, {self.num_samples} samples each, temperature "
            f"{self.temperature:g}, top-p {self.top_p:g}, at most {self.max_new_tokens} new tokens, seed {self.seed}"
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvaluationResult":
        """The inverse of `to_dict`.

        Raises:
            DataError: if fields are missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if names != set(values):
            raise DataError(
                f"an evaluation result must have the fields {sorted(names)}, got {sorted(values)}. Anything else was "
                "not written by `EvaluationResult.save`. Set the path to a file that was."
            )
        intervals = {name: tuple(values[name]) for name in ("avg_interval", "pass_interval")}
        return cls(**{**values, **intervals})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_dict` as JSON, whole or not at all, and return the path."""
        return write_atomically(path, json.dumps(self.to_dict(), indent=2) + "\n")


def evaluate_model(
    model: Any,
    processing_class: Any,
    dataset: Any,
    *,
    num_samples: int = 8,
    k: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 1024,
    batch_size: int = 64,
    reward_func: Callable[..., Any] | None = None,
    seed: int = 0,
    samples_path: str | os.PathLike[str] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    dataset_name: str | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Sample completions for every problem, judge them and return avg@k and pass@k.

    Afterwards torch's random state, the model's train/eval modes and its generation config are as before. Of the
    model's own generation config only the end-of-sequence ids are used; top-k, penalties and the like are off.

    Args:
        model: causal language model, or its name or path, which is then loaded onto the accelerator if there is one.
        processing_class: its tokenizer; `None` loads it from `model`, where that is a name or path.
        dataset: rows with `prompt` (a chat or a string); other columns go to `reward_func`, as TRL passes them.
        num_samples: completions per problem.
        k: of pass@k; `None` means `num_samples`.
        temperature: 0 decodes greedily.
        top_p: nucleus mass in (0, 1].
        max_new_tokens: longest completion in tokens.
        batch_size: completions generated at once.
        reward_func: verifier with TRL's reward signature, answers 1, 0 or `None`; `None` means `math_reward`.
        seed: of sampling and bootstrap.
        samples_path: JSON Lines file that receives every sample as soon as it is judged.
        chat_template_kwargs: passed on to the chat template.
        dataset_name: name of the problems, for reports and the model card.
        progress: show a progress bar.

    Returns:
        Accuracies, intervals and settings.

    Raises:
        SGOPDConfigError: if a setting is out of range.
        DataError: if the data set is empty or a prompt is missing.
        VerifierError: if the verifier answers with something else.
    """
    k = num_samples if k is None else k
    pass_at_k(num_samples, 0, k)  # for its checks, before a model is loaded
    # Here and not above: results can be read without torch and transformers.
    from .evaluation_sampling import Decoding, Sampler, draw_samples

    decoding = Decoding(temperature, top_p, max_new_tokens, batch_size, seed)
    rows = _read_rows(dataset)
    sampler = Sampler.build(model, processing_class, decoding, chat_template_kwargs or {})
    started = time.perf_counter()
    drawn = draw_samples(sampler, rows, num_samples, reward_func or _math_reward(), progress)
    samples = _collect(drawn, samples_path)
    result = _result(sampler, samples, len(rows), num_samples, k)
    return replace(result, seconds=time.perf_counter() - started, dataset=dataset_name)


def _math_reward() -> Callable[..., Any]:
    from .verifiers import math_reward

    return math_reward


def _collect(drawn: "Generator[Sample, None, None]", path: str | os.PathLike[str] | None) -> "list[Sample]":
    """All samples, each written as soon as it is there."""
    samples = []
    # Closed by hand: after an error or Ctrl-C the model is as before at once, not when the generator is collected.
    with _open_samples(path) as file, closing(drawn):
        for sample in drawn:
            samples.append(sample)
            if file is not None:
                # A solution of any type must not end an evaluation: what JSON does not know is written as text.
                file.write(json.dumps(sample.to_dict(), ensure_ascii=False, default=str) + "\n")
    return samples


def _result(
    sampler: "Sampler", samples: "list[Sample]", num_problems: int, num_samples: int, k: int
) -> EvaluationResult:
    decoding = sampler.decoding
    correct = np.zeros(num_problems, dtype=np.int64)
    for sample in samples:
        correct[sample.problem] += sample.verdict == 1.0
    averages = correct / num_samples
    passes = [pass_at_k(num_samples, int(count), k) for count in correct]
    return EvaluationResult(
        model=sampler.name,
        num_problems=num_problems,
        num_samples=num_samples,
        k=k,
        avg_at_k=float(averages.mean()),
        avg_interval=bootstrap_interval(averages, seed=decoding.seed),
        pass_at_k=float(np.mean(passes)),
        pass_interval=bootstrap_interval(passes, seed=decoding.seed),
        abstained=sum(sample.verdict is None for sample in samples),
        truncated=sum(sample.truncated for sample in samples),
        mean_length=sum(sample.num_tokens for sample in samples) / len(samples),
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        max_new_tokens=decoding.max_new_tokens,
        seed=decoding.seed,
        seconds=0.0,  # filled in by the caller, whose clock runs until here
    )


def _read_rows(dataset: Any) -> list[dict[str, Any]]:
    if isinstance(dataset, Mapping):
        raise DataError(
            f"`dataset` must be one split, got the splits {list(dataset)}. One result belongs to one set of problems. "
            "Set `dataset=dataset[...]` to one of them."
        )
    rows = [dict(row) for row in dataset]
    if not rows:
        raise DataError("`dataset` must have rows, got none. An accuracy needs problems. Set another split or filter.")
    if "prompt" not in rows[0]:
        raise DataError(
            f"`dataset` must have the column `prompt`, got {sorted(rows[0])}. Completions are sampled from it. "
            "Set it with `dataset.rename_column` or `sg_opd_trl.data.prepare_dataset`."
        )
    for index, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise DataError(
                f"the rows of `dataset` must have the same columns, got {sorted(row)} in row {index} and "
                f"{sorted(rows[0])} in row 0. Columns go to the verifier as lists. Set what is missing to None."
            )
        if not isinstance(row["prompt"], (str, list)) or is_empty_prompt(row["prompt"]):
            raise DataError(
                f"`prompt` must be a chat or a string that is not empty, got {row['prompt']!r} in row {index}. There "
                "is nothing to answer. Drop the row with `dataset.filter`."
            )
        if ends_with_an_answer(row["prompt"]):
            raise DataError(
                f"`prompt` must not end with an assistant's message, got one in row {index}. Templates close it, and "
                "the model would answer anew instead of going on with it. Drop the message, or move its text into the "
                "question."
            )
    return rows


def _open_samples(path: str | os.PathLike[str] | None) -> Any:
    if path is None:
        return nullcontext()
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.open(
        "w", encoding="utf-8", buffering=1
    )  # line by line, so that a killed evaluation leaves its samples
