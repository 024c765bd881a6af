"""`report.html`: one static file with the run's accuracies, training curves, settings and versions."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..evaluation import EvaluationResult
from ..files import write_atomically
from .curves import can_draw, draw_panels, read_curve
from .settings import shown_results, shown_settings
from .templates import render

_PACKAGES = ("sg-opd-trl", "torch", "trl", "transformers", "accelerate", "peft", "datasets", "math-verify", "vllm")


def write_report(
    output_dir: str | os.PathLike[str],
    *,
    title: str,
    config: Any,
    log_history: Iterable[Mapping[str, Any]],
    evaluations: Mapping[str, EvaluationResult | Mapping[str, Any]],
    path: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the report of a run; the page loads nothing from anywhere.

    Without matplotlib, the `plot` extra, the curves are left out and the page says how to get them.

    Args:
        output_dir: folder of the run.
        title: heading of the page.
        config: `SGOPDConfig`, of which the values that differ from the defaults are shown, or a mapping. Secrets are
            never shown, local folders by their last part.
        log_history: `trainer.state.log_history`.
        evaluations: label -> result (or its `to_dict`), in the order of the table; a label with "before" and one with
            "after" are compared in a sentence.
        path: where to write, instead of `output_dir/report.html`.

    Returns:
        Path of the page.
    """
    log = list(log_history)
    results = shown_results(evaluations)
    figures = draw_panels(log) if can_draw() else []
    page = render(
        "report.html.jinja",
        title=title,
        facts=_facts(log),
        finding=compare(results),
        results=results,
        average_label=metric_label("avg", [result.num_samples for result in results.values()]),
        pass_label=metric_label("pass", [result.k for result in results.values()]),
        decoding=dict.fromkeys(result.describe_settings() for result in results.values()),
        figures=[(figure, Markup(figure.svg)) for figure in figures],
        can_draw=can_draw(),
        settings=shown_settings(config),
        versions=installed_versions(),
    )
    return write_atomically(path if path is not None else Path(output_dir) / "report.html", page)


def compare(results: Mapping[str, EvaluationResult]) -> str | None:
    """The change from "before" to "after" in a sentence, or `None` where there is no such pair."""
    before = [result for label, result in results.items() if "before" in label.lower()]
    after = [result for label, result in results.items() if "after" in label.lower()]
    if len(before) != 1 or len(after) != 1:
        return None
    first, last = before[0], after[0]
    if first.avg_at_k is None or last.avg_at_k is None or first.avg_interval is None or last.avg_interval is None:
        return None
    change = 100 * (last.avg_at_k - first.avg_at_k)
    verb = "rose" if change > 0 else "fell" if change < 0 else "stayed the same"
    size = f" by {abs(change):.1f} points" if change else ""
    apart = first.avg_interval[1] < last.avg_interval[0] or last.avg_interval[1] < first.avg_interval[0]
    intervals = "do not overlap" if apart else "overlap"
    return (
        f"{metric_label('avg', [first.num_samples, last.num_samples])} {verb}{size}, from {first.avg_at_k:.1%} to "
        f"{last.avg_at_k:.1%}; the 95% intervals {intervals}."
        + (" Completions without a verdict are left out." if first.abstained or last.abstained else "")
    )


def metric_label(name: str, counts: list[int]) -> str:
    """`avg@8`, or `avg@k` where results differ in their number of samples."""
    return f"{name}@{counts[0]}" if len(set(counts)) == 1 else f"{name}@k"


def installed_versions() -> list[tuple[str, str]]:
    """Name and version of Python and of the packages that shape a run, where installed."""
    found = [("python", platform.python_version())]
    for name in _PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _facts(log: list[Mapping[str, Any]]) -> list[str]:
    """The run in a few words: its length and its time."""
    steps = max((int(entry["step"]) for entry in log if "step" in entry), default=0)
    facts = [f"{steps} optimizer steps"] if steps else []
    if runtime := read_curve(log, "train_runtime"):
        minutes, seconds = divmod(round(list(runtime.values())[-1]), 60)
        facts.append(f"{minutes} min {seconds:02d} s of training")
    return facts
