"""From finished jobs to rows: means, differences to the baseline and contrasts, per pair and over pairs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .plan import STUDENT, TEACHER, Job
from .results import read_result
from .spec import Study
from .statistics import Estimate, contrast_by_seed, t_interval

COSTS = ("teacher_tokens_generated", "teacher_tokens_scored", "seconds", "teacher_tokens_reused")
ALL_PAIRS = "mean over pairs"


@dataclass(frozen=True)
class Row:
    """One run on one pair.

    Accuracies are shares in [0, 1]. `score` and `difference` are None while nothing has finished; `difference` of the
    baseline to itself is None too. `costs` are means over seeds, None where a run did not write them down. `missing`
    counts seeds without a score, `abstained` the completions of all seeds without a verdict, which no score counts.
    """

    name: str
    scores: dict[int, float]
    score: Estimate | None
    differences: dict[int, float]
    difference: Estimate | None
    pass_rate: float | None
    costs: dict[str, float | None]
    curve: dict[int, list[float]]
    missing: int
    abstained: int = 0


@dataclass(frozen=True)
class Group:
    """All rows of one pair; of the only one, whose name is None; or of the mean over pairs.

    `models` are students before training and teachers, `contrasts` the comparisons the study asks for beside those to
    the baseline.
    """

    pair: str | None
    rows: list[Row]
    models: dict[str, Estimate]
    contrasts: dict[str, Estimate]


Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # run -> seed -> result


def summarise(study: Study, runs: Iterable[Job], models: Iterable[Job]) -> list[Group]:
    """Read what has finished and condense it.

    Args:
        study: the study.
        runs: jobs of the tables.
        models: jobs that measure students before training and teachers.

    Returns:
        A group per pair and, with several pairs, one more for the mean over them: there a seed's score is the mean of
        its scores on all pairs, so that its intervals are over seeds, for these pairs.
    """
    jobs = list(runs)
    measured = {job.name: result for job in models if (result := read_result(job)) is not None and _judged(result)}
    groups, by_pair = [], []
    for pair in study.pairs:
        name = pair.name if pair is not None else None
        ours = [job for job in jobs if job.pair == name]
        results = _results(ours)
        by_pair.append(results)
        groups.append(_group(study, name, results, _models(ours, measured)))
    if len(by_pair) > 1:
        groups.append(_group(study, ALL_PAIRS, _mean_over_pairs(study, by_pair), {}))
    return groups


def _results(jobs: Iterable[Job]) -> dict[str, dict[int, Mapping[str, Any]]]:
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for job in jobs:
        result = read_result(job)
        if result is not None and job.seed is not None:
            found.setdefault(job.name, {})[job.seed] = result
    return found


def _group(study: Study, pair: str | None, results: Results, models: dict[str, Estimate]) -> Group:
    scores = {
        name: {seed: float(found["evaluation"]["avg_at_k"]) for seed, found in by_seed.items() if _judged(found)}
        for name, by_seed in results.items()
    }
    contrasts = {
        name: t_interval(list(values.values()))
        for name, weights in study.contrasts.items()
        if (values := contrast_by_seed(scores, weights))
    }
    rows = [_row(study, name, results.get(name, {}), scores) for name in study.runs]
    return Group(pair, rows, models, contrasts)


def _row(
    study: Study, name: str, results: Mapping[int, Mapping[str, Any]], scores: Mapping[str, Mapping[int, float]]
) -> Row:
    differences = {} if name == study.baseline else contrast_by_seed(scores, {name: 1.0, study.baseline: -1.0})
    found = [result for result in results.values() if _judged(result)]
    return Row(
        name=name,
        scores=dict(scores.get(name, {})),
        # A single seed has no interval over seeds; the one over problems says how well that one model is measured.
        score=_over_models([result["evaluation"] for result in found]),
        differences=differences,
        difference=t_interval(list(differences.values())) if differences else None,
        pass_rate=fmean(result["evaluation"]["pass_at_k"] for result in found) if found else None,
        costs={cost: _mean_known(result.get(cost) for result in found) for cost in COSTS},
        curve=_curve(found),
        missing=len(study.seeds) - len(found),
        abstained=sum(result["evaluation"].get("abstained", 0) for result in results.values()),
    )


def _judged(result: Mapping[str, Any]) -> bool:
    """Whether anything could be said of a student."""
    return result["evaluation"]["avg_at_k"] is not None


def _over_models(evaluations: Sequence[Mapping[str, Any]]) -> Estimate | None:
    """Over several models a t interval; for a single one the evaluator's bootstrap interval over problems."""
    if not evaluations:
        return None
    if len(evaluations) > 1:
        return t_interval([evaluation["avg_at_k"] for evaluation in evaluations])
    (only,) = evaluations
    low, high = only.get("avg_interval") or (None, None)
    return Estimate(only["avg_at_k"], low, high, 1, "none" if low is None else "problems")


def _mean_known(values: Iterable[float | None]) -> float | None:
    """None as soon as one is not known: a mean over some of the seeds would be of other runs."""
    given = list(values)
    known = [float(value) for value in given if value is not None]
    return fmean(known) if known and len(known) == len(given) else None


def _curve(results: Iterable[Mapping[str, Any]]) -> dict[int, list[float]]:
    """Step -> reward of every seed that logged that step."""
    curve: dict[int, list[float]] = {}
    for result in results:
        for step, reward in result.get("curve", []):
            curve.setdefault(int(step), []).append(reward)
    return dict(sorted(curve.items()))


def _models(jobs: Iterable[Job], measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    """Students before training over seeds, and teachers; each model counts once."""
    roles: dict[str, dict[str, None]] = {"student before": {}, "teacher": {}}
    for job in jobs:
        for role, key in (("student before", STUDENT), ("teacher", TEACHER)):
            name = (job.recipe or {}).get(key)
            if isinstance(name, str) and name in measured:
                roles[role][name] = None
    evaluations = {role: [measured[name]["evaluation"] for name in names] for role, names in roles.items()}
    return {role: found for role, values in evaluations.items() if (found := _over_models(values)) is not None}


def _mean_over_pairs(study: Study, by_pair: Sequence[Results]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """One result per run and seed: the mean over pairs, where every pair has finished it."""
    merged: dict[str, dict[int, Mapping[str, Any]]] = {}
    for name in study.runs:
        for seed in study.seeds:
            found = [results[name][seed] for results in by_pair if seed in results.get(name, {})]
            if len(found) == len(by_pair) and all(map(_judged, found)):
                evaluation = {
                    key: fmean(result["evaluation"][key] for result in found) for key in ("avg_at_k", "pass_at_k")
                }
                evaluation["abstained"] = sum(result["evaluation"].get("abstained", 0) for result in found)
                costs = {cost: _mean_known(result.get(cost) for result in found) for cost in COSTS}
                merged.setdefault(name, {})[seed] = {"evaluation": evaluation, **costs}
    return merged
