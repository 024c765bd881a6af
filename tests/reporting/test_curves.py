"""What is drawn is what was logged."""

import math
import statistics

import pytest
from synthetic_run import log_history

from sg_opd_trl.reporting.curves import PANELS, draw_panels, read_curve, smooth, smoothing_window

pytest.importorskip("matplotlib")


def test_curve_keeps_the_last_finite_value_of_each_step():
    log = [
        {"step": 2, "x": 2.0}, {"step": 1, "x": 1}, {"step": 3, "x": math.nan}, {"step": 4, "x": "text"}, {"x": 9.0},
        {"step": 5, "y": 1.0}, {"step": 2, "x": 2.5}, {"step": 6, "x": math.inf},
    ]  # fmt: skip
    assert read_curve(log, "x") == {1: 1.0, 2: 2.5}
    assert list(read_curve(log, "x")) == [1, 2]


@pytest.mark.parametrize("window", [1, 3, 5])
def test_running_mean_against_a_loop(window):
    values = [0.5, 2.0, -1.0, 4.0, 8.0, 0.25]
    half = window // 2
    expected = [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    assert smooth(values, window) == pytest.approx(expected)


def test_short_runs_are_not_smoothed():
    assert smoothing_window(10) == 1
    assert smoothing_window(80) % 2 == 1
    assert 3 <= smoothing_window(80) <= 8


def test_every_metric_of_the_panels_is_logged_by_a_full_run():
    logged = {key for entry in log_history() for key in entry}
    assert {series.key for panel in PANELS for series in panel.series} <= logged


def test_stacked_layers_reach_the_sum_of_the_parts(monkeypatch):
    """Reads the drawn areas back: the top of the stack is the sum of all parts, missing ones counting 0."""
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.stackplot
    monkeypatch.setattr(Axes, "stackplot", lambda self, *a, **k: drawn.append(original(self, *a, **k)) or drawn[-1])
    log = [{"step": 1, "time/rollout": 1.0, "time/loss": 2.0}, {"step": 2, "time/rollout": 4.0}]
    (figure,) = draw_panels(log)
    assert [series.label for series in figure.series] == ["rollout", "loss"]
    tops = {}
    for step, height in drawn[0][-1].get_paths()[0].vertices:
        tops[step] = max(tops.get(step, 0.0), height)
    assert tops == {1.0: 3.0, 2.0: 4.0}


@pytest.mark.parametrize("num_steps", [1, 2, 5, 40])
def test_any_length_is_drawn(num_steps, recwarn):
    figures = draw_panels(log_history(num_steps))
    assert {"Reward", "Gate", "Gradient norm", "Time per step"} <= {figure.panel.title for figure in figures}
    assert [str(warning.message) for warning in recwarn] == []


def test_constant_and_negative_values_are_drawn(recwarn):
    log = [{"step": step, "reward": -0.5, "grad_norm": 0.0} for step in (1, 2, 3)]
    assert len(draw_panels(log)) == 2
    assert [str(warning.message) for warning in recwarn] == []


def test_global_state_of_matplotlib_is_untouched():
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_panels(log_history(3))
    assert dict(matplotlib.rcParams) == before


def test_the_anchors_yield_is_what_its_caption_says() -> None:
    """Without the filter more rollouts are kept than are judged right."""
    (panel,) = [panel for panel in PANELS if any(series.key == "anchor/verified_share" for series in panel.series)]
    assert "judged right" in panel.caption
    assert "kept" not in panel.caption
