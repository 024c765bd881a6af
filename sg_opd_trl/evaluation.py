"""Sampled accuracy of a model: avg@k and pass@k with bootstrap intervals over problems."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError, SGOPDConfigError
from .evaluation_files import EvaluationFiles
from .evaluation_plan import Decoding, EvaluationPlan, Identity, read_rows
from .files import write_atomically
from .scrubbing import scrubbed_text

if TYPE_CHECKING:
    from .evaluation_sampling import Sample, Sampler

logger = logging.getLogger(__name__)

Interval = tuple[float, float]

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

    Accuracies are shares in [0, 1] of what could be judged. A completion without a verdict is neither right nor
    wrong: it is left out, and so is a problem without any verdict. `avg_bounds` and `pass_bounds` say what the
    accuracy would be if all of them were wrong, and if all were right. Where nothing could be judged, accuracies and
    intervals are None.

    Attributes:
        model: what was evaluated; an adapter under its own name.
        num_problems: problems of the data set.
        num_samples: completions per problem, `n`.
        k: of pass@k.
        avg_at_k: mean over problems of the share of right completions.
        avg_interval: its 95% bootstrap interval over problems.
        pass_at_k: mean over problems of the chance that one of `k` completions is right, or one of those that were
            judged where these are fewer.
        pass_interval: likewise.
        abstained: completions without a verdict.
        truncated: completions that ended at `max_new_tokens`.
        mean_length: of the completions, in tokens.
        temperature: of sampling.
        top_p: of sampling.
        max_new_tokens: longest completion in tokens.
        seed: of sampling and bootstrap.
        seconds: wall time of sampling and judging, of the call that ended it.
        dataset: name of the problems.
        avg_bounds: lowest and highest `avg_at_k` that the missing verdicts leave open.
        pass_bounds: likewise.
        problems_without_verdict: problems of which no completion has a verdict.
        base_model: model that an adapter is on; None for a whole model.
        generation_kwargs: further sampling settings.
        identity: hashes of problems, settings and model, by which a later call knows its files; None without files.
    """

    model: str
    num_problems: int
    num_samples: int
    k: int
    avg_at_k: float | None
    avg_interval: Interval | None
    pass_at_k: float | None
    pass_interval: Interval | None
    abstained: int
    truncated: int
    mean_length: float
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    seconds: float
    dataset: str | None = None
    avg_bounds: Interval | None = None
    pass_bounds: Interval | None = None
    problems_without_verdict: int = 0
    base_model: str | None = None
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, str] | None = None

    @property
    def num_completions(self) -> int:
        """All completions, with and without a verdict."""
        return self.num_problems * self.num_samples

    def to_dict(self) -> dict[str, Any]:
        """All fields, as values that JSON can hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def describe_settings(self) -> str:
        """Problems and sampling settings in a phrase."""
        source = f" of {self.dataset}" if self.dataset else ""
        return (
            f"{self.num_problems} problems{source}, {self.num_samples} samples each, temperature "
            f"{self.temperature:g}, top-p {self.top_p:g}, at most {self.max_new_tokens} new tokens, seed {self.seed}"
            + "".join(f", {name} {value}" for name, value in self.generation_kwargs.items())
        )

    def describe_missing(self) -> str | None:
        """What completions without a verdict leave open, in a sentence; None where there are none."""
        if not self.abstained:
            return None
        found = f"{self.abstained} of {self.num_completions} completions have no verdict and are left out"
        if self.avg_bounds is None or self.pass_bounds is None:
            return f"{found}."
        average, passed = (
            f"{100 * low:.1f}% to {100 * high:.1f}%" for low, high in (self.avg_bounds, self.pass_bounds)
        )
        return f"{found}: from all wrong to all right, avg@{self.num_samples} {average}, pass@{self.k} {passed}."

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EvaluationResult":
        """The inverse of `to_dict`.

        Raises:
            DataError: if fields are missing or unknown.
        """
        known = {each.name for each in fields(cls)}
        needed = {each.name for each in fields(cls) if each.default is MISSING and each.default_factory is MISSING}
        if not needed <= set(values) <= known:
            raise DataError(
                f"an evaluation result must have the fields {sorted(needed)}, got {sorted(values)}. Anything else was "
                "not written by `EvaluationResult.save`. Set the path to a file that was."
            )
        if values["abstained"] and "avg_bounds" not in values:
            raise DataError(
                f"an evaluation result must tell what {values['abstained']} completions without a verdict leave open, "
                "got one of an earlier version, which counted them as wrong. The accuracies are lower bounds. "
                "Evaluate again."
            )
        pairs = {
            name: tuple(value)
            for name, value in values.items()
            if name.endswith(("_interval", "_bounds")) and value is not None
        }
        return cls(**{**values, **pairs})

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
    generation_kwargs: Mapping[str, Any] | None = None,
    reward_func: Callable[..., Any] | None = None,
    seed: int = 0,
    samples_path: str | os.PathLike[str] | None = None,
    output_path: str | os.PathLike[str] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    verifier_timeout: float | None = None,
    name: str | None = None,
    dataset_name: str | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Sample completions for every problem, judge them and return avg@k and pass@k.

    Afterwards torch's random state, the model's train/eval modes and its generation config are as before. Of the
    model's own generation config only the end-of-sequence ids are used; top-k, penalties and the like are off.

    With a file, samples are kept as they come. The same call after an interruption goes on where it stopped, with the
    result of one that was not interrupted, and after the end it samples nothing. What makes it the same: the weights,
    the prompts as token ids, the rows, all settings, the verifier and the version of this package.

    Args:
        model: causal language model, or its name or path, which is then loaded onto the accelerator if there is one.
        processing_class: its tokenizer; `None` loads it from `model`, where that is a name or path.
        dataset: rows with `prompt` (a chat or a string); other columns go to `reward_func`, as TRL passes them.
        num_samples: completions per problem.
        k: of pass@k; `None` means `num_samples`.
        temperature: 0 decodes greedily.
        top_p: nucleus mass in (0, 1].
        max_new_tokens: longest completion in tokens.
        batch_size: completions generated at once; they share random numbers, so that another size gives other samples.
        generation_kwargs: further fields of `transformers.GenerationConfig`, those that `SGOPDConfig` takes.
        reward_func: verifier with TRL's reward signature, answers 1, 0 or `None`; `None` means `math_reward`.
        seed: of sampling and bootstrap.
        samples_path: JSON Lines file that receives every sample as soon as it is judged.
        output_path: JSON file that receives the result; without `samples_path` the samples are beside it until then.
        chat_template_kwargs: passed on to the chat template.
        verifier_timeout: seconds that one call of a `reward_func` of your own may take, see `SGOPDConfig`.
        name: what the result calls the model; `None` means its name or path, with the adapters that are active.
        dataset_name: name of the problems, for reports and the model card.
        progress: show a progress bar.

    Returns:
        Accuracies, intervals and settings.

    Raises:
        SGOPDConfigError: if a setting is out of range, or a file is not this evaluation's or cannot be written.
        DataError: if the data set is empty or a prompt is missing.
        VerifierError: if the verifier answers with something else.
    """
    decoding = Decoding(temperature, top_p, max_new_tokens, batch_size, seed, generation_kwargs or {})
    plan = plan_evaluation(dataset, decoding, num_samples, k, reward_func, chat_template_kwargs, verifier_timeout)
    files = EvaluationFiles(samples_path, output_path)
    files.check(plan.identity)
    # Here and not above: results can be read without torch and transformers.
    from .evaluation_sampling import Sampler

    sampler = Sampler.build(model, processing_class, plan, name)
    result = _evaluate(plan, files, sampler, dataset_name, progress)
    missing = result.describe_missing()
    if missing is not None:
        logger.warning("%s", missing)
    return result


def plan_evaluation(
    dataset: Any,
    decoding: Decoding,
    num_samples: int,
    k: int | None,
    reward_func: Callable[..., Any] | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    verifier_timeout: float | None = None,
) -> EvaluationPlan:
    """All that `evaluate_model` checks of its arguments and can be known without the model.

    Raises:
        SGOPDConfigError: if a count or the limit is out of range.
        DataError: if the data set is empty or a prompt is missing.
    """
    if verifier_timeout is not None:
        # Here and not above: results can be read without torch.
        from .verifiers.bounded import check_limit

        check_limit(verifier_timeout)
    for name, count in (("num_samples", num_samples), ("k", num_samples if k is None else k)):
        if not isinstance(count, int):
            raise SGOPDConfigError(f"`{name}` must be a whole number, got {count!r}. It is a count. Set it to 8, say.")
    k = num_samples if k is None else k
    pass_at_k(num_samples, 0, k)  # for its checks
    rows, kwargs = read_rows(dataset), chat_template_kwargs or {}
    return EvaluationPlan(rows, decoding, num_samples, k, reward_func, kwargs, verifier_timeout)


def _evaluate(
    plan: EvaluationPlan, files: EvaluationFiles, sampler: "Sampler", dataset_name: str | None, progress: bool
) -> EvaluationResult:
    from .evaluation_sampling import Sample, draw_samples, whole_batches

    started = time.perf_counter()
    prompt_ids = [sampler.encode(row["prompt"]) for row in plan.rows]
    identity, known = plan.identity, []
    if files.there:
        identity = replace(identity, model=sampler.model_hash(prompt_ids))
        known = whole_batches(plan, prompt_ids, [Sample(**values) for values in files.samples(identity)])
        done = files.result(identity)
        # Whoever asks for the samples too gets them, though the result be there.
        if done is not None and (not files.lasting or len(known) == len(plan.rows) * plan.num_samples):
            return EvaluationResult.from_dict(done)
        if known:
            logger.info("%d of %d completions are there already", len(known), len(plan.rows) * plan.num_samples)
        files.restart(identity, [sample.to_dict() for sample in known])

    def keep(samples: "list[Sample]") -> None:
        files.add(identity, [sample.to_dict() for sample in samples])

    samples = draw_samples(sampler, plan, prompt_ids, known, keep, progress)
    result = replace(
        _result(sampler, plan, samples, identity if files.there else None),
        seconds=time.perf_counter() - started,
        dataset=None if dataset_name is None else scrubbed_text(dataset_name),
    )
    files.finish(result.to_dict())
    return result


def _result(
    sampler: "Sampler", plan: EvaluationPlan, samples: "list[Sample]", identity: Identity | None
) -> EvaluationResult:
    decoding, num_samples, k = plan.decoding, plan.num_samples, plan.k
    correct, judged = np.zeros((2, len(plan.rows)), dtype=np.int64)
    for sample in samples:
        judged[sample.problem] += sample.verdict is not None
        correct[sample.problem] += sample.verdict == 1.0
    known = judged > 0
    averages = correct[known] / judged[known]
    passes = [pass_at_k(int(n), int(c), min(k, int(n))) for n, c in zip(judged[known], correct[known], strict=True)]
    extremes = (correct, correct + num_samples - judged)
    return EvaluationResult(
        model=sampler.name,
        num_problems=len(plan.rows),
        num_samples=num_samples,
        k=k,
        avg_at_k=float(averages.mean()) if known.any() else None,
        avg_interval=bootstrap_interval(averages, seed=decoding.seed) if known.any() else None,
        pass_at_k=float(np.mean(passes)) if known.any() else None,
        pass_interval=bootstrap_interval(passes, seed=decoding.seed) if known.any() else None,
        abstained=sum(sample.verdict is None for sample in samples),
        truncated=sum(sample.truncated for sample in samples),
        mean_length=sum(sample.num_tokens for sample in samples) / len(samples),
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        max_new_tokens=decoding.max_new_tokens,
        seed=decoding.seed,
        seconds=0.0,  # filled in by the caller, whose clock runs until here
        avg_bounds=_pair(float((right / num_samples).mean()) for right in extremes),
        pass_bounds=_pair(
            float(np.mean([pass_at_k(num_samples, int(count), k) for count in right])) for right in extremes
        ),
        problems_without_verdict=int((~known).sum()),
        base_model=sampler.base_model,
        generation_kwargs=dict(decoding.generation_kwargs),
        identity=None if identity is None else asdict(identity),
    )


def _pair(values: Iterable[float]) -> Interval:
    low, high = values
    return low, high
