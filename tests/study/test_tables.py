import json
import re
import sys
from html.parser import HTMLParser

import pytest

from sg_opd_trl.study import page, plan
from sg_opd_trl.study.page import write_study
from sg_opd_trl.study.statistics import Estimate
from sg_opd_trl.study.summary import ALL_PAIRS, summarise
from sg_opd_trl.study.tables import cells, show_estimate, show_tokens, show_weights, to_json, to_markdown

from .fakes import SCORES, evaluation, finish_all, jobs, study, write

VOID = {"meta", "path", "use", "rect", "circle"}


def finished(tmp_path, scores=SCORES, **changes):
    spec = study(tmp_path, **changes)
    found = jobs(spec)
    finish_all(found, scores)
    models = plan.model_jobs_of(spec, found)
    for job in models:
        write(job, 0.9 if job.name == "teacher" else 0.2)
    return spec, found, summarise(spec, found, models)


def test_means_and_paired_differences_by_hand(tmp_path):
    _, _, (group,) = finished(tmp_path)
    opd, gated = group.rows
    # opd 0.5, 0.6, 0.4: mean 0.5, s 0.1, half width 4.3027 * 0.1 / sqrt(3) = 0.2484
    assert (opd.score.mean, opd.score.low, opd.score.high) == pytest.approx((0.5, 0.2516, 0.7484), abs=1e-4)
    assert opd.difference is None
    # differences 0.10, 0.04, 0.13: mean 0.09, s 0.045826, half width 0.11384
    assert gated.differences == pytest.approx({0: 0.10, 1: 0.04, 2: 0.13})
    estimate = gated.difference
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0.09, -0.02384, 0.20384), abs=1e-4)
    assert gated.pass_rate == pytest.approx(0.79)
    assert gated.costs == {
        **{"teacher_tokens_generated": 1000, "teacher_tokens_scored": 2e6, "seconds": 8.0},
        "teacher_tokens_reused": None,
    }
    assert gated.curve == {1: pytest.approx([0.30, 0.32, 0.265]), 2: pytest.approx([0.60, 0.64, 0.53])}
    assert group.models["teacher"] == Estimate(0.9, 0.8, 1.0, 1, "problems")
    assert group.models["student before"].mean == pytest.approx(0.2)


def test_a_lost_seed_leaves_the_pairs_that_are_there_and_unknown_costs_are_not_averaged(tmp_path):
    spec = study(tmp_path)
    found = jobs(spec)
    finish_all(found)
    lost = next(job for job in found if (job.name, job.seed) == ("gated", 1))
    (lost.folder / "result.json").unlink()
    other = next(job for job in found if (job.name, job.seed) == ("gated", 2))
    write(other, 0.53, teacher_tokens_scored=None)
    ((opd, gated),) = [group.rows for group in summarise(spec, found, [])]
    assert (opd.missing, gated.missing) == (0, 1)
    assert gated.differences == pytest.approx({0: 0.10, 2: 0.13})
    assert gated.costs["teacher_tokens_scored"] is None
    assert gated.costs["seconds"] == 8.0


def test_what_has_no_verdict_is_left_out_and_counted(tmp_path):
    spec = study(tmp_path)
    found = jobs(spec)
    finish_all(found)
    for job in found:
        if (job.name, job.seed) == ("gated", 1):
            nothing = {"avg_at_k": None, "avg_interval": None, "pass_at_k": None, "abstained": 48}
            write(job, 0.5, evaluation={"num_samples": 8} | nothing)
        elif job.name == "opd":
            write(job, SCORES["opd"][job.seed], evaluation=evaluation(SCORES["opd"][job.seed]) | {"abstained": 2})
    groups = summarise(spec, found, [])
    opd, gated = groups[0].rows
    assert (gated.missing, gated.abstained, opd.abstained) == (1, 48, 6)
    assert gated.differences == pytest.approx({0: 0.10, 2: 0.13})
    said = "Completions without a verdict, left out of the scores: opd 6, gated 48."
    assert said in to_markdown(spec, groups, None, [])
    assert said in write_study(spec, groups, None, [])[2].read_text(encoding="utf-8")


def test_reused_tokens_are_beside_those_that_were_generated(tmp_path):
    spec = study(tmp_path)
    found = jobs(spec)
    for job in found:
        reused = {"teacher_tokens_reused": 500} if job.name == "gated" else {}
        write(job, 0.5, teacher_tokens_generated=0, **reused)
    opd, gated = (cells(spec, row)[5] for row in summarise(spec, found, [])[0].rows)
    assert (opd, gated) == ("0", "0 (+ 500 reused)")


def test_the_note_says_what_the_pairing_leaves_open(tmp_path):
    spec, _, groups = finished(tmp_path)
    text = to_markdown(spec, groups, None, [])
    assert "Steps and batch sizes are each recipe's own" in text
    assert "of twenty that should hold 0, one is expected to miss it by chance" in text


def test_one_seed_shows_the_interval_over_problems_and_says_so(tmp_path):
    spec, _, groups = finished(tmp_path, seeds=[1])
    text = to_markdown(spec, groups, None, [])
    assert "| opd | 60.0 (50.0 to 70.0, over problems) | baseline |" in text
    assert "+4.0 (one seed)" in text


def test_contrasts_are_taken_seed_by_seed(tmp_path):
    weights = {"twice the gain": {"gated": 2, "opd": -2}}
    spec, _, groups = finished(tmp_path, contrasts=weights)
    estimate = groups[0].contrasts["twice the gain"]
    assert (estimate.mean, estimate.low) == pytest.approx((0.18, -0.04768), abs=1e-4)
    assert "| twice the gain | 2 gated - 2 opd | +18.0 (-4.8 to +40.8) | 3 |" in to_markdown(spec, groups, None, [])


def test_the_mean_over_pairs_is_taken_within_each_seed(tmp_path):
    pairs = [{"name": name, "student": f"s{name}", "teacher": "t"} for name in ("p", "q")]
    spec = study(tmp_path, pairs=pairs)
    found = jobs(spec)
    for job in found:
        write(job, SCORES[job.name][job.seed] + (0.2 if job.pair == "q" else 0.0))
    groups = summarise(spec, found, plan.model_jobs_of(spec, found))
    assert [group.pair for group in groups] == ["p", "q", ALL_PAIRS]
    assert groups[2].rows[0].scores == pytest.approx({0: 0.6, 1: 0.7, 2: 0.5})
    assert groups[2].rows[1].difference.mean == pytest.approx(0.09)
    assert groups[2].rows[1].difference.count == 3
    (found[-1].folder / "result.json").unlink()
    assert summarise(spec, found, [])[2].rows[1].missing == 1


def test_markdown_has_a_line_per_run_and_says_what_failed(tmp_path):
    choices = {
        "field": "learning_rate", "split": "tune",
        "runs": {"opd": {"chosen": 1e-3, "edge": True, "scores": [{"value": 1e-3, "mean": 0.4, "seeds": {}}]}},
    }  # fmt: skip
    spec, _, groups = finished(tmp_path)
    text = to_markdown(spec, groups, choices, ["opd, seed 9: exit status 1"])
    # 0.60, 0.64, 0.53: s 0.055678, half width 4.3027 * 0.055678 / sqrt(3) = 0.13831
    line = "| gated | 59.0 (45.2 to 72.8) | +9.0 (-2.4 to +20.4) | 79.0 | 3 | 1.0 k | 2.00 M | 8 |"
    assert line in text
    assert "| run | avg@8, % | difference to opd, points | pass@8, % |" in text
    assert "| opd | 0.001 (edge of the grid) | 0.001: 40.0 |" in text
    assert "- opd, seed 9: exit status 1" in text
    assert "not corrected for the number of comparisons" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| ") and "%" not in line}) <= 2


def test_json_holds_the_numbers_of_every_seed(tmp_path):
    spec, _, groups = finished(tmp_path)
    values = json.loads(json.dumps(to_json(spec, groups, None, [])))
    gated = values["groups"][0]["runs"][1]
    assert gated["scores"] == {"0": 0.6, "1": 0.64, "2": 0.53}
    assert gated["difference"]["count"] == 3
    assert gated["reward"] == [[1, 0.295], [2, 0.59]]
    assert values["groups"][0]["models"]["teacher"]["kind"] == "problems"


@pytest.mark.parametrize(
    ("tokens", "shown"), [(None, "–"), (0, "0"), (999, "999"), (12_340, "12.3 k"), (1_530_000, "1.53 M")]
)
def test_tokens_are_short(tokens, shown):
    assert show_tokens(tokens) == shown


def test_nothing_finished_is_a_dash_and_weights_are_a_formula():
    assert show_estimate(None) == "–"
    assert show_weights({"a": 1, "b": -1, "c": -0.5}) == "a - b - 0.5 c"


class Page(HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.ids, self.links, self.texts, self.open = [], [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


SWEEP = {"uniform": {"recipe": "e.yaml", "grid": {"lambda_base": [1.0, 1.8]}}}
SWEPT = {**SCORES, "uniform-lambda_base=1.0": SCORES["opd"], "uniform-lambda_base=1.8": SCORES["gated"]}


@pytest.mark.parametrize("pairs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_page_stands_alone_and_every_plot_is_a_file(tmp_path, pairs):
    pytest.importorskip("matplotlib")
    named = [{"name": name, "student": f"s{name}", "teacher": "t"} for name in ("p.1", "q-2")]
    changes = {"pairs": named} if pairs else {}
    spec, _, groups = finished(tmp_path, SWEPT, sweep=SWEEP, **changes)
    written = write_study(spec, groups, None, ["opd, seed 1: <b>bad</b>"])
    source = (tmp_path / "tiny.html").read_text(encoding="utf-8")
    found = Page(source)
    assert len(found.ids) == len(set(found.ids)) > 10
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert re.findall(r"url\(#([^)]+)\)", source)
    assert set(re.findall(r"url\(#([^)]+)\)", source)) <= set(found.ids)
    text = " ".join(" ".join(found.texts).split())
    assert "59.0 (45.2 to 72.8)" in text
    assert "opd, seed 1: <b>bad</b>" in text, "escaped"
    assert "http" not in source.replace("http://www.w3.org", "")
    assert "#0102" not in source, "every colour is the page's"
    pictures = [path for path in written if path.suffix == ".png"]
    kinds = [path.stem.removeprefix("tiny-").partition("-")[0] for path in pictures]
    per_pair = ["scores", "differences", "curves", "sweeps"]
    assert kinds == (per_pair * 2 + ["scores", "differences", "sweeps"] if pairs else per_pair)
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(set(pictures)) == len(pictures)


def test_the_plot_shows_the_intervals_where_they_are(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from sg_opd_trl.study.figures import _PNG_COLOURS, _points

    estimate = Estimate(0.09, -0.02, 0.20, 3, "seeds")
    axes = _points(Figure(), _PNG_COLOURS, [("gated", estimate, [0.1, 0.04], "blue")])
    seeds, interval, mean = axes.lines
    assert list(seeds.get_xdata()) == pytest.approx([10.0, 4.0])
    assert list(interval.get_xdata()) == pytest.approx([-2.0, 20.0])
    assert list(mean.get_xdata()) == pytest.approx([9.0])


def test_without_matplotlib_the_tables_are_written_and_the_page_says_how_to_get_plots(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "can_draw", lambda: False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spec, _, groups = finished(tmp_path)
    written = write_study(spec, groups, None, [])
    assert [path.suffix for path in written] == [".md", ".json", ".html"]
    assert "pip install matplotlib" in (tmp_path / "tiny.html").read_text(encoding="utf-8")


def test_a_study_of_which_nothing_is_done_has_a_page_too(tmp_path):
    spec = study(tmp_path)
    written = write_study(spec, summarise(spec, jobs(spec), []), None, [])
    assert [path.suffix for path in written] == [".md", ".json", ".html"]
    assert "| gated | – | – | – | 0 of 3 |" in written[0].read_text(encoding="utf-8")
