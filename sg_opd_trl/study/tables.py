"""The study's numbers as Markdown and as JSON."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..reporting.settings import show_value
from .spec import Study
from .statistics import Estimate
from .summary import COSTS, Group, Row

NOTHING = "–"
INTERVALS = (
    "Intervals: 95% Student t over seeds. Differences are paired: the same seed means the same student before "
    "training and the same order of problems. Steps and batch sizes are each recipe's own: where they differ, so does "
    "the number of problems seen. Intervals are not corrected for the number of comparisons: of twenty that should "
    "hold 0, one is expected to miss it by chance."
)


def columns(study: Study) -> list[str]:
    """Headings of the main table."""
    samples = study.evaluate["num_samples"]
    return [
        *("run", f"avg@{samples}, %", f"difference to {study.baseline}, points"),
        *(f"pass@{study.evaluate.get('k', samples)}, %", "seeds", "teacher tokens generated", "teacher tokens scored"),
        "training, s",
    ]


def cells(study: Study, row: Row) -> list[str]:
    """One row of the main table."""
    tokens = [show_tokens(row.costs[cost]) for cost in COSTS[:2]]
    if reused := row.costs["teacher_tokens_reused"]:
        tokens[0] += f" (+ {show_tokens(reused)} reused)"
    return [
        row.name,
        show_estimate(row.score),
        "baseline" if row.name == study.baseline else show_estimate(row.difference, signed=True),
        NOTHING if row.pass_rate is None else f"{100 * row.pass_rate:.1f}",
        f"{len(row.scores)}" if not row.missing else f"{len(row.scores)} of {len(study.seeds)}",
        *tokens,
        NOTHING if row.costs["seconds"] is None else f"{row.costs['seconds']:.0f}",
    ]


def model_cells(study: Study, group: Group) -> list[list[str]]:
    """Rows of students before training and of teachers, as wide as the main table."""
    return [
        [name, show_estimate(estimate), *([NOTHING] * (len(columns(study)) - 2))]
        for name, estimate in group.models.items()
    ]


def contrast_cells(study: Study, group: Group) -> list[list[str]]:
    """Rows of the contrasts: name, formula, estimate, seeds."""
    return [
        [name, show_weights(study.contrasts[name]), show_estimate(estimate, signed=True), str(estimate.count)]
        for name, estimate in group.contrasts.items()
    ]


def without_verdict(group: Group) -> str:
    """What no score of a group counts, in a sentence; empty where everything has a verdict."""
    counts = ", ".join(f"{row.name} {row.abstained}" for row in group.rows if row.abstained)
    return f"Completions without a verdict, left out of the scores: {counts}." if counts else ""


CONTRAST_COLUMNS = ["comparison", "of", "points", "seeds"]
CHOICE_COLUMNS = ["run", "chosen", "scores on the tuning problems, %"]


def choice_cells(choices: Mapping[str, Any] | None) -> list[list[str]]:
    """Rows of the choices: run, value, all means; a choice among some of the values only says so."""
    rows = []
    for name, entry in (choices or {"runs": {}})["runs"].items():
        scores = ", ".join(f"{item['value']}: {100 * item['mean']:.1f}" for item in entry["scores"])
        edge = " (edge of the grid)" if entry["edge"] else ""
        finished, missing = len(entry["scores"]), len(entry.get("missing", ()))
        part = f" ({finished} of {finished + missing} values)" if missing else ""
        rows.append([name, f"{entry['chosen']}{edge}{part}", scores])
    return rows


def to_markdown(
    study: Study, groups: Iterable[Group], choices: Mapping[str, Any] | None, failures: Sequence[str]
) -> str:
    """The whole study as a Markdown page."""
    parts = [f"# {study.name}", describe(study)]
    for group in groups:
        if group.pair is not None:
            parts.append(f"## {group.pair}")
        rows = [cells(study, row) for row in group.rows]
        parts.append(_table(columns(study), [*rows, *model_cells(study, group)]))
        if note := without_verdict(group):
            parts.append(note)
        if group.contrasts:
            parts.append(_table(CONTRAST_COLUMNS, contrast_cells(study, group)))
    if choices is not None:
        parts += [choice_title(choices), _table(CHOICE_COLUMNS, choice_cells(choices))]
    if failures:
        parts += ["## Failed", "\n".join(f"- {line}" for line in failures)]
    return "\n\n".join([*parts, INTERVALS]) + "\n"


def describe(study: Study) -> str:
    """How all runs are measured, in a sentence."""
    evaluate = study.evaluate
    limit = f", the first {evaluate['limit']} problems" if evaluate.get("limit") else ""
    seeds = ", ".join(map(str, study.seeds))
    further = "".join(f", {name} {value}" for name, value in evaluate.get("generation_kwargs", {}).items())
    return (
        f"Seeds {seeds}. Every student is measured on {show_value(evaluate['dataset_name'])}, split "
        f"{evaluate['dataset_split']}{limit}: {evaluate['num_samples']} samples per problem, temperature "
        f"{evaluate.get('temperature', 1.0)}, top-p {evaluate.get('top_p', 1.0)}, at most "
        f"{evaluate['max_new_tokens']} new tokens, sampling seed {evaluate['seed']}{further}."
    )


def choice_title(choices: Mapping[str, Any]) -> str:
    """What was chosen, and where."""
    return f"`{choices['field']}` of each run, chosen on split {choices['split']}:"


def to_json(
    study: Study, groups: Iterable[Group], choices: Mapping[str, Any] | None, failures: Sequence[str]
) -> dict[str, Any]:
    """All numbers of the table, per seed too, and the mean reward curves; small enough to keep."""
    return {
        "study": study.name,
        "baseline": study.baseline,
        "seeds": list(study.seeds),
        "evaluate": {**study.evaluate, "dataset_name": show_value(study.evaluate["dataset_name"])},
        "choices": choices,
        "groups": [
            {
                "pair": group.pair,
                "models": {name: estimate.to_dict() for name, estimate in group.models.items()},
                "contrasts": {
                    name: {"weights": study.contrasts[name], **estimate.to_dict()}
                    for name, estimate in group.contrasts.items()
                },
                "runs": [_row_values(row) for row in group.rows],
            }
            for group in groups
        ],
        "failures": list(failures),
    }


def _row_values(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "score": row.score.to_dict() if row.score else None,
        "difference": row.difference.to_dict() if row.difference else None,
        "pass_rate": row.pass_rate,
        **row.costs,
        "scores": {str(seed): score for seed, score in row.scores.items()},
        "reward": [[step, round(sum(values) / len(values), 4)] for step, values in row.curve.items()],
        "missing": row.missing,
        "abstained": row.abstained,
    }


def show_estimate(estimate: Estimate | None, *, signed: bool = False) -> str:
    """`60.4 (57.1 to 63.6)` in percent; what is not over seeds says so."""
    if estimate is None:
        return NOTHING
    sign = "+" if signed else ""
    mean = f"{100 * estimate.mean:{sign}.1f}"
    if estimate.low is None or estimate.high is None:
        return f"{mean} (one seed)"
    suffix = ", over problems" if estimate.kind == "problems" else ""
    return f"{mean} ({100 * estimate.low:{sign}.1f} to {100 * estimate.high:{sign}.1f}{suffix})"


def show_weights(weights: Mapping[str, float]) -> str:
    """`gate_only - uniform`."""
    parts = []
    for name, weight in weights.items():
        size = "" if abs(weight) == 1 else f"{abs(weight):g} "
        parts.append(("- " if weight < 0 else "+ ") + size + name)
    return " ".join(parts).removeprefix("+ ")


def show_tokens(tokens: float | None) -> str:
    """`12 k` or `1.53 M`."""
    if tokens is None:
        return NOTHING
    if tokens >= 1e6:
        return f"{tokens / 1e6:.2f} M"
    return f"{tokens / 1e3:.1f} k" if tokens >= 1e3 else f"{tokens:.0f}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
