"""The study's plots: accuracies, paired differences, reward curves and sweeps, each as SVG for the page and as PNG."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..reporting.curves import COLOURS, FONT, inline_svg, render_figure, style_axes
from .spec import Study
from .statistics import Estimate
from .summary import Group, Row

_PNG_COLOURS = {
    **{"blue": "#0b62ab", "orange": "#d1600a", "grey": "#a4abb5", "sky": "#6cb8ea", "sand": "#f3bd78"},
    **{"slate": "#4d5a6b", "ink": "#1d2127", "rule": "#d9dde3", "card": "#ffffff"},
}
_WIDTH = 6.0  # inches
_ROW_HEIGHT = 0.27
_SEED_OFFSET = 0.28  # rows
_DODGE = 0.008  # of the axis, so that intervals of two sweeps at one value do not hide each other
_MOST_COLUMNS = 4
_LINES = (("blue", "o"), ("orange", "s"), ("slate", "^"), ("sky", "D"), ("sand", "v"), ("grey", "x"))

Palette = Mapping[str, str]
Draw = Callable[[Any, Palette], None]


@dataclass(frozen=True)
class Plot:
    """A drawn figure; `name` is part of its file's name, `summary` says in words what is drawn."""

    name: str
    title: str
    caption: str
    summary: str
    svg: str
    png: bytes
    wide: bool = False


def draw_group(study: Study, group: Group, prefix: str) -> list[Plot]:
    """All plots of one pair that there are numbers for.

    Args:
        study: the study.
        group: its rows.
        prefix: of the SVG ids, so that several groups can be on one page.

    Returns:
        Plots: accuracies, differences, reward curves, sweeps.
    """
    rows = [row for row in group.rows if row.score is not None]
    if not rows:
        return []
    suffix = f"-{group.pair.replace(' ', '_')}" if group.pair else ""
    plots = [_scores(study, group, rows, prefix, suffix)]
    if any(row.difference for row in rows):
        plots.append(_differences(study, group, rows, prefix, suffix))
    if any(row.curve for row in rows):
        plots.append(_curves(study, rows, prefix, suffix))
    if lines := _sweep_lines(study, rows):
        plots.append(_sweeps(study, lines, prefix, suffix))
    return plots


def _scores(study: Study, group: Group, rows: Sequence[Row], prefix: str, suffix: str) -> Plot:
    lines = [(row.name, row.score, list(row.scores.values()), "blue") for row in rows if row.score is not None]
    lines += [(name, estimate, [], "slate") for name, estimate in group.models.items()]

    def draw(canvas: Any, colours: Palette) -> None:
        axes = _points(canvas, colours, lines)
        axes.set_xlabel(f"avg@{study.evaluate['num_samples']}, percent", color=colours["ink"])
        axes.axvline(100 * _baseline_score(study, rows), color=colours["grey"], linewidth=1, linestyle=(0, (3, 3)))

    return _plot(
        f"scores{suffix}", "Accuracy",
        f"Mean and 95% interval; small dots are seeds; the dashed line is {study.baseline}.",
        [(name, estimate) for name, estimate, _, _ in lines], draw, (_WIDTH, _height(len(lines))), prefix,
    )  # fmt: skip


def _differences(study: Study, group: Group, rows: Sequence[Row], prefix: str, suffix: str) -> Plot:
    lines = [
        (row.name, row.difference, list(row.differences.values()), "blue")
        for row in rows
        if row.difference is not None
    ]
    lines += [(name, estimate, [], "orange") for name, estimate in group.contrasts.items()]

    def draw(canvas: Any, colours: Palette) -> None:
        axes = _points(canvas, colours, lines)
        axes.set_xlabel("points", color=colours["ink"])
        axes.axvline(0, color=colours["slate"], linewidth=1)

    caption = f"To {study.baseline}, paired by seed: mean, 95% interval, and each seed as a small dot."
    if group.contrasts:
        caption += " Orange: the study's own comparisons."
    return _plot(
        f"differences{suffix}", f"Difference to {study.baseline}", caption,
        [(name, estimate) for name, estimate, _, _ in lines], draw, (_WIDTH, _height(len(lines))), prefix,
    )  # fmt: skip


def _points(canvas: Any, colours: Palette, lines: Sequence[tuple[str, Estimate, list[float], str]]) -> Any:
    """One row per line, the first on top: small dots, interval, mean; all in percent."""
    axes = canvas.add_subplot()
    for place, (_, estimate, seeds, colour) in enumerate(lines):
        below = [place + _SEED_OFFSET] * len(seeds)
        axes.plot([100 * value for value in seeds], below, "o", ms=3, color=colours["grey"], zorder=2)
        if estimate.low is not None and estimate.high is not None:
            ends = [100 * estimate.low, 100 * estimate.high]
            axes.plot(ends, [place, place], color=colours[colour], linewidth=2, solid_capstyle="butt", zorder=3)
        axes.plot([100 * estimate.mean], [place], "o", ms=6, color=colours[colour], zorder=4)
    style_axes(axes, bounded=False, colours=colours)
    axes.grid(axis="x", color=colours["rule"], linewidth=0.6)
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(lines)), [line[0] for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    return axes


def _curves(study: Study, rows: Sequence[Row], prefix: str, suffix: str) -> Plot:
    """Small multiples, because more than a handful of lines in one panel cannot be told apart."""
    drawn = [row for row in rows if row.curve]
    baseline = next((row.curve for row in rows if row.name == study.baseline), {})
    across = min(_MOST_COLUMNS, len(drawn))
    down = math.ceil(len(drawn) / across)

    def draw(canvas: Any, colours: Palette) -> None:
        from matplotlib.ticker import MaxNLocator

        panels = canvas.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for axes, row in zip(panels.flat, drawn, strict=False):
            axes.plot(list(baseline), [fmean(values) for values in baseline.values()], color=colours["grey"], lw=1.2)
            _band(axes, row.curve, colours["blue"])
            axes.set_title(row.name, fontsize=FONT, color=colours["ink"], loc="left")
            style_axes(axes, bounded=False, colours=colours)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for axes in panels.flat[len(drawn) :]:
            axes.set_visible(False)
        canvas.supxlabel("optimizer step", fontsize=FONT, color=colours["ink"])
        canvas.supylabel("mean reward", fontsize=FONT, color=colours["ink"])

    return _plot(
        f"curves{suffix}", "Reward of the student's rollouts",
        f"Mean over seeds; the band reaches from the lowest to the highest seed; grey: {study.baseline}.",
        [(row.name, row.score) for row in drawn if row.score], draw, (2.4 * across + 0.5, 1.6 * down + 0.5), prefix,
        wide=True,
    )  # fmt: skip


def _band(axes: Any, curve: Mapping[int, Sequence[float]], colour: str) -> None:
    """Lowest to highest seed: a t interval of two or three seeds would be wider than the panel."""
    steps = list(curve)
    lows, highs = [min(values) for values in curve.values()], [max(values) for values in curve.values()]
    axes.fill_between(steps, lows, highs, color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, [fmean(values) for values in curve.values()], color=colour, linewidth=1.7)


def _sweep_lines(study: Study, rows: Sequence[Row]) -> dict[str, list[tuple[float, Estimate]]]:
    """Sweeps over one number: label -> points by value."""
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for row in rows:
        run = study.runs[row.name]
        if run.sweep is None or len(run.point) != 1 or row.score is None:
            continue
        ((field, value),) = run.point.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            lines.setdefault(f"{run.sweep} ({field})", []).append((float(value), row.score))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items() if len(points) > 1}


def _sweeps(study: Study, lines: Mapping[str, list[tuple[float, Estimate]]], prefix: str, suffix: str) -> Plot:
    every = [value for points in lines.values() for value, _ in points]
    dodge = _DODGE * (max(every) - min(every))

    def draw(canvas: Any, colours: Palette) -> None:
        axes = canvas.add_subplot()
        for index, (label, points) in enumerate(lines.items()):
            colour, marker = _LINES[index % len(_LINES)]
            values = [value + dodge * (index - (len(lines) - 1) / 2) for value, _ in points]
            for value, (_, score) in zip(values, points, strict=True):
                if score.low is not None and score.high is not None:
                    axes.plot([value] * 2, [100 * score.low, 100 * score.high], color=colours[colour], lw=1, alpha=0.6)
            means = [100 * score.mean for _, score in points]
            axes.plot(values, means, marker=marker, ms=5, color=colours[colour], linewidth=1.5, label=label)
        style_axes(axes, bounded=False, colours=colours)
        axes.set_xlabel("value of the field", color=colours["ink"])
        axes.set_ylabel(f"avg@{study.evaluate['num_samples']}, percent", color=colours["ink"])
        axes.legend(frameon=False, fontsize=FONT, labelcolor=colours["ink"])

    ends = [(f"{name} at {value:g}", score) for name, points in lines.items() for value, score in points]
    return _plot(
        f"sweeps{suffix}", "Sweeps", "Mean and 95% interval at each value.", ends, draw, (_WIDTH, 3.2), prefix
    )


def _plot(
    name: str,
    title: str,
    caption: str,
    said: Sequence[tuple[str, Estimate]],
    draw: Draw,
    size: tuple[float, float],
    prefix: str,
    *,
    wide: bool = False,
) -> Plot:
    """Draw twice: with the page's variables as SVG, with fixed colours as PNG."""
    summary = "; ".join(f"{label} {100 * estimate.mean:.1f}" for label, estimate in said)
    drawing = render_figure(lambda canvas: draw(canvas, COLOURS), size, salt="study").decode()
    svg = inline_svg(drawing, prefix=f"{prefix}{name}-")
    png = render_figure(
        lambda canvas: draw(canvas, _PNG_COLOURS), size, salt="study", png_background=_PNG_COLOURS["card"]
    )
    return Plot(name, title, caption, f"{title}: {summary}", svg, png, wide)


def _baseline_score(study: Study, rows: Sequence[Row]) -> float:
    return next((row.score.mean for row in rows if row.name == study.baseline and row.score), math.nan)


def _height(num_lines: int) -> float:
    return _ROW_HEIGHT * num_lines + 0.75
