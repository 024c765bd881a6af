"""Training curves as small inline SVG figures that follow the page's light or dark colours."""

import importlib.util
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

# Blue and orange families: told apart with every common kind of colour blindness. Written into the SVG as these odd
# colours, which are then replaced by the page's variables.
COLOURS = {"blue": "#010203", "orange": "#010204", "grey": "#010205", "sky": "#010206", "sand": "#010207",
            "slate": "#010208", "ink": "#010209", "rule": "#01020a", "card": "#01020b"}  # fmt: skip
_SIZE = (4.4, 2.35)  # inches; one SVG unit is about one pixel at phone width, so 9 points stay readable
FONT = 9  # points
_SMOOTHED_FROM = 20  # logged steps; below, a running mean would hide the few points there are


@dataclass(frozen=True)
class Series:
    """One curve: its metric, its name in the legend, its look. An `exact` one gets no running mean."""

    key: str
    label: str
    colour: str = "blue"
    dashed: bool = False
    exact: bool = False


@dataclass(frozen=True)
class Panel:
    """One figure. `stacked` fills the series on top of each other; `share` shows values in [0, 1] as percent."""

    title: str
    unit: str
    caption: str
    series: tuple[Series, ...]
    stacked: bool = False
    share: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawn panel: `series` are the ones that had data, `summary` says in words what is drawn."""

    panel: Panel
    series: tuple[Series, ...]
    svg: str
    summary: str


PANELS = (
    Panel("Reward", "mean reward", "Of the student's rollouts.", (Series("reward", "reward"),)),
    Panel(
        "Gate", "share of tokens",
        "Consensus: verifier and teacher agree on the token's sign. The paper's Figure 7.",
        (Series("gate/consensus", "consensus", "blue"), Series("gate/conflict", "conflict", "orange"),
         Series("gate/neutral", "neutral", "grey")),
        stacked=True, share=True,
    ),
    Panel(
        "Advantage by class", "mean advantage", "What the loss sees, before weights; 0 is no push.",
        (Series("gate/advantage_consensus", "consensus", "blue"),
         Series("gate/advantage_conflict", "conflict", "orange", dashed=True),
         Series("gate/advantage_neutral", "neutral", "grey")),
    ),
    Panel(
        "KL to the teacher", "nats per token", "Two estimates on the student's own tokens; falling is learning.",
        (Series("teacher/kl_k3", "k3"), Series("teacher/kl_k1", "k1", "orange", dashed=True)),
    ),
    Panel(
        "KL to the teacher, by verdict", "nats per token (k3)", "Rollouts the verifier judged right or wrong.",
        (Series("teacher/kl_k3/right", "right"), Series("teacher/kl_k3/wrong", "wrong", "orange", dashed=True)),
    ),
    Panel(
        "Anchor weight and yield", "weight, share",
        "Weight α of the teacher anchor; share of its rollouts judged right.",
        (Series("anchor/alpha", "α", exact=True),
         Series("anchor/verified_share", "verified share", "orange", dashed=True)),
    ),
    Panel(
        "Anchor loss", "loss, before α", "Cross-entropy on the teacher rollouts that were kept.",
        (Series("anchor/loss", "anchor loss"),),
    ),
    Panel("Entropy", "nats per token", "Of the student; at 0 it no longer explores.", (Series("entropy", "entropy"),)),
    Panel("Completion length", "tokens", "Mean over rollouts.", (Series("completions/mean_length", "mean length"),)),
    Panel(
        "Truncated completions", "share of rollouts", "Cut at the longest allowed length.",
        (Series("completions/clipped_ratio", "truncated", "orange"),), share=True,
    ),
    Panel("Gradient norm", "norm", "Before clipping.", (Series("grad_norm", "gradient norm"),)),
    Panel(
        "Time per step", "seconds", "Where the wall time went.",
        (Series("time/rollout", "rollout", "blue"), Series("time/verify", "verify", "sky"),
         Series("time/teacher", "teacher", "orange"), Series("time/reference", "reference", "sand"),
         Series("time/loss", "loss", "slate"), Series("time/anchor", "anchor", "grey")),
        stacked=True,
    ),
)  # fmt: skip


def can_draw() -> bool:
    """Whether matplotlib, the `plot` extra, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_panels(log_history: Iterable[Mapping[str, Any]], panels: Iterable[Panel] = PANELS) -> list[Figure]:
    """Draw every panel that the log has data for.

    Args:
        log_history: `trainer.state.log_history`.
        panels: what to draw, in order.

    Returns:
        Figures; panels without any data are left out.
    """
    log = list(log_history)
    last_step = max((int(entry["step"]) for entry in log if "step" in entry), default=1)
    figures = []
    for index, panel in enumerate(panels):
        curves = {series: curve for series in panel.series if (curve := read_curve(log, series.key))}
        if curves:
            svg = inline_svg(_draw(panel, curves, last_step), prefix=f"p{index}-")
            figures.append(Figure(panel, tuple(curves), svg, _summary(panel, curves)))
    return figures


def read_curve(log: Iterable[Mapping[str, Any]], key: str) -> dict[int, float]:
    """Step -> finite value of one metric; the last entry of a step counts."""
    curve = {
        int(entry["step"]): float(entry[key])
        for entry in log
        if "step" in entry and isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key])
    }
    return dict(sorted(curve.items()))


def smooth(values: list[float], window: int) -> list[float]:
    """Centred running mean over `window` values, shorter at the ends."""
    totals = [0.0, *accumulate(values)]  # differences of running totals: linear in the number of values
    half = window // 2
    bounds = [(max(0, index - half), min(len(values), index + half + 1)) for index in range(len(values))]
    return [(totals[stop] - totals[start]) / (stop - start) for start, stop in bounds]


def _summary(panel: Panel, curves: dict[Series, dict[int, float]]) -> str:
    parts = []
    for series, curve in curves.items():
        first, last = next(iter(curve.values())), list(curve.values())[-1]
        numbers = (f"{first:.1%}", f"{last:.1%}") if panel.share else (f"{first:.3g}", f"{last:.3g}")
        parts.append(f"{series.label} from {numbers[0]} to {numbers[1]}")
    return f"{panel.title}: {'; '.join(parts)}"


def _draw(panel: Panel, curves: dict[Series, dict[int, float]], last_step: int) -> str:
    """One figure as SVG text."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    def draw(canvas: Any) -> None:
        axes = canvas.add_subplot()
        (_stack if panel.stacked else _lines)(axes, curves)
        axes.set_xlabel("optimizer step", color=COLOURS["ink"])
        axes.set_ylabel(panel.unit, color=COLOURS["ink"])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if panel.share:
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
        axes.set_xlim(min(1, *map(min, curves.values())), max(last_step, 2))
        style_axes(axes, bounded=panel.share and panel.stacked)

    return render_figure(draw, _SIZE, salt=panel.title).decode()


def _lines(axes: Any, curves: dict[Series, dict[int, float]]) -> None:
    for series, curve in curves.items():
        steps, values = list(curve), list(curve.values())
        look = {"color": COLOURS[series.colour], "linestyle": (0, (4, 2)) if series.dashed else "-"}
        window = 1 if series.exact else smoothing_window(len(steps))
        if window > 1:
            axes.plot(steps, values, **(look | {"linestyle": "-"}), linewidth=0.8, alpha=0.4)
        marker = "o" if len(steps) < _SMOOTHED_FROM else None
        axes.plot(steps, smooth(values, window), **look, linewidth=1.9, marker=marker, markersize=3)
    # The axis begins at 0, unless the curve would then be pressed into its upper half.
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.0) if low < 0.5 * high else low, high)


def smoothing_window(num_steps: int) -> int:
    """Steps in the running mean of a line: about a twentieth of the run, 1 for short runs."""
    return 1 if num_steps < _SMOOTHED_FROM else max(3, num_steps // 20 | 1)  # odd, so that it has a centre


def _stack(axes: Any, curves: dict[Series, dict[int, float]]) -> None:
    steps = sorted({step for curve in curves.values() for step in curve})
    layers = [[curve.get(step, 0.0) for step in steps] for curve in curves.values()]
    if len(steps) == 1:  # an area needs two points
        steps, layers = [steps[0], steps[0] + 1], [layer * 2 for layer in layers]
    colours = [COLOURS[series.colour] for series in curves]
    axes.stackplot(steps, layers, colors=colours, linewidth=0.5, edgecolor=COLOURS["card"])


def render_figure(
    draw: Callable[[Any], None], size: tuple[float, float], *, salt: str, png_background: str | None = None
) -> bytes:
    """Draw a figure and return the file: SVG on nothing, or PNG where a background is given.

    The same data give the same bytes: dates and versions are left out, and the ids in an SVG come from `salt`.

    Args:
        draw: draws on the `matplotlib.figure.Figure` that it is given.
        size: width and height in inches.
        salt: of the ids in an SVG, which matplotlib would else draw at random.
        png_background: colour; None makes an SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    data = io.BytesIO()
    # "none" keeps text as text: it takes the page's font and can be searched, and the file stays small.
    with rc_context({"svg.fonttype": "none", "font.size": FONT, "svg.hashsalt": salt}):
        # No pyplot: a notebook's backend and its list of open figures are not ours to touch.
        canvas = Canvas(figsize=size, layout="constrained")
        draw(canvas)
        if png_background is None:
            canvas.savefig(data, format="svg", transparent=True, metadata={"Date": None})
        else:
            canvas.savefig(data, format="png", dpi=150, facecolor=png_background, metadata={"Software": None})
    return data.getvalue()


def style_axes(axes: Any, bounded: bool, colours: Mapping[str, str] = COLOURS) -> None:
    """The look of all figures: horizontal rules only, no frame; `bounded` fixes the vertical range to [0, 1]."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(colours["rule"])
    axes.tick_params(colors=colours["ink"], length=0)
    axes.tick_params(axis="x", length=3, color=colours["rule"])
    axes.grid(axis="y", color=colours["rule"], linewidth=0.6)
    axes.set_axisbelow(True)
    if bounded:
        axes.set_ylim(0, 1)


def inline_svg(svg: str, prefix: str) -> str:
    """SVG file -> element for an HTML page: no prolog, no metadata, unique ids, the page's colours."""
    # Regular expressions are enough: matplotlib wrote this, in one way, and nothing in it comes from a stranger.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    # Without a size of its own, `viewBox` keeps the shape and the page's style sheet sets the width.
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    # Several figures on one page would share ids, and every clip path would be the first one's.
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\1{prefix}", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()
