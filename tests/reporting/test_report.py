"""The page holds what it is given, nothing it must not hold, and stands alone."""

import re
from html.parser import HTMLParser

import pytest
from synthetic_run import log_history, result

from sg_opd_trl.reporting import report as report_module
from sg_opd_trl.reporting import write_report
from sg_opd_trl.reporting.report import compare, installed_versions, metric_label

VOID = {"meta", "br", "img", "link", "input", "hr", "path", "use", "rect", "line", "circle"}
EVALUATIONS = {
    "student before": result(0.195, (0.165, 0.226)),
    "student after": result(0.604, (0.571, 0.636), pass_at_k=0.992, pass_interval=(0.98, 1.0), truncated=4),
    "teacher": result(0.895, (0.878, 0.912), "teacher"),
}


class Page(HTMLParser):
    """Text, tags and attributes of a page; complains about tags that are not closed."""

    def __init__(self, source: str):
        super().__init__()
        self.texts, self.tags, self.attributes, self.open = [], [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def write(tmp_path, **changes):
    arguments = {"title": "A run", "config": {"learning_rate": 7e-4}, "log_history": [], "evaluations": {}}
    return write_report(tmp_path, **(arguments | changes)).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    pytest.importorskip("matplotlib")
    return write(tmp_path_factory.mktemp("run"), log_history=log_history(), evaluations=EVALUATIONS)


def test_headline_table(full):
    text = Page(full).text
    assert "student before 19.5% 16.5 to 22.6 90.0% 85.0 to 95.0 35 17 3" in text
    assert "student after 60.4% 57.1 to 63.6 99.2% 98.0 to 100.0 35 4 3" in text
    assert "teacher 89.5% 87.8 to 91.2" in text
    assert "avg@8" in text
    assert "pass@8" in text
    assert "200 problems, 8 samples each, temperature 0.7, top-p 0.95, at most 48 new tokens, seed 1" in text
    assert text.count("200 problems") == 1, "settings that agree are said once"
    assert "avg@8 rose by 40.9 points, from 19.5% to 60.4%; the 95% intervals do not overlap." in text
    assert "80 optimizer steps · 1 min 33 s of training" in text


def test_bars_are_where_the_intervals_are(full):
    bars = re.findall(r'<b style="left:([\d.]+)%;width:([\d.]+)%"></b><i style="left:([\d.]+)%">', full)
    assert [tuple(map(float, bar)) for bar in bars] == [(16.5, 6.1, 19.5), (57.1, 6.5, 60.4), (87.8, 3.4, 89.5)]


def test_every_panel_is_there_for_a_full_log(full):
    titles = re.findall(r"<h3>(.*?)</h3>", full)
    assert titles == [
        "Reward", "Gate", "Advantage by class", "KL to the teacher", "KL to the teacher, by verdict",
        "Anchor weight and yield", "Anchor loss", "Entropy", "Completion length", "Truncated completions",
        "Gradient norm", "Time per step",
    ]  # fmt: skip
    assert full.count("<svg") == len(titles)
    for part in ("rollout", "verify", "teacher", "reference", "loss", "anchor"):
        assert re.search(rf"</i>{part}</li>", full)


def test_missing_metrics_leave_their_panels_out(tmp_path):
    pytest.importorskip("matplotlib")
    page = write(tmp_path, log_history=[{"step": 1, "reward": 0.1, "time/loss": 0.5}, {"step": 2, "reward": 0.2}])
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["Reward", "Time per step"]
    assert "</i>loss</li>" not in page, "a single series needs no legend"


def test_stands_alone(full):
    page = Page(full)
    assert "http" not in full
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(value.startswith("#") for name, value in page.attributes if name in ("href", "src"))
    assert not re.search(r"@import|url\((?!#)", full)


def test_ids_are_unique_and_references_lead_somewhere(full):
    ids = re.findall(r'\bid="([^"]+)"', full)
    assert len(ids) == len(set(ids)) > 0
    references = re.findall(r'(?:url\(#|href="#)([^")]+)', full)
    assert references
    assert set(references) <= set(ids)


def test_follows_dark_mode_and_phone_width(full):
    assert "prefers-color-scheme: dark" in full
    assert 'name="viewport" content="width=device-width' in full
    svg = "".join(re.findall(r"<svg.*?</svg>", full, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", svg), "figures take the page's colours"
    assert not re.search(r'<svg[^>]*\b(width|height)="', full), "figures take the page's width"
    style = full[full.index("<style>") : full.index("</style>")]
    for name in set(re.findall(r"var\(--([a-z]+)\)", svg)):
        assert style.count(f"--{name}:") == 2, f"{name} has a light and a dark value"


def test_figures_are_described_in_words(full):
    labels = [value for name, value in Page(full).attributes if name == "aria-label"]
    assert any(re.fullmatch(r"Reward: reward from 0\.\d+ to 0\.\d+", label) for label in labels)
    assert any(re.fullmatch(r"Gate: consensus from [\d.]+% to .*; neutral from .*", label) for label in labels)


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>&\"{{ 7 * 7777 }}"
    page = write(
        tmp_path,
        title=evil,
        config={"instruction": evil, evil: 1},
        evaluations={evil: result(0.5, (0.4, 0.6), evil, dataset=evil)},
        log_history=[{"step": 1, "reward": 0.5}],
    )
    assert "<script" not in page
    assert "54439" not in Page(page).text
    assert Page(page).text.count("<script>alert('x')</script>&\"{{ 7 * 7777 }}") >= 5


def test_secrets_and_folders_are_not_shown(tmp_path):
    config = {
        "hub_token": "hf_SECRETSECRETSECRET", "model_init_kwargs": {"token": "SECRET", "dtype": "float32"},
        "wandb_api_key": "SECRET", "teacher_model_server_url": "http://me:SECRET@host:8000",
        "output_dir": str(tmp_path), "special_token_mask": "shown", "num_generations": 4,
    }  # fmt: skip
    page = write(tmp_path, config=config)
    assert "SECRET" not in page
    assert "hub_token" not in page
    assert str(tmp_path) not in page
    assert tmp_path.name in page
    for shown in ("float32", "special_token_mask", "num_generations"):
        assert shown in page


def test_without_matplotlib_there_are_tables_and_a_hint(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "can_draw", lambda: False)
    monkeypatch.setattr(report_module, "draw_panels", None)
    page = write(tmp_path, log_history=log_history(), evaluations=EVALUATIONS)
    assert "pip install matplotlib" in Page(page).text
    assert "student after 60.4%" in Page(page).text
    assert "<svg" not in page


def test_nothing_to_show_is_still_a_page(tmp_path):
    text = Page(write(tmp_path, config={})).text
    assert "No model was evaluated." in text
    assert "All settings are at their defaults." in text


def test_path_and_results_as_dicts(tmp_path):
    target = tmp_path / "new" / "page.html"
    evaluations = {"student": result(0.5, (0.4, 0.6)).to_dict()}
    path = write_report("unused", title="t", config={}, log_history=[], evaluations=evaluations, path=target)
    assert path == target
    assert "student 50.0% 40.0 to 60.0" in Page(target.read_text()).text
    assert [file.name for file in target.parent.iterdir()] == ["page.html"]


def test_what_has_no_verdict_is_neither_right_nor_wrong_on_the_page(tmp_path):
    nothing = {"avg_at_k": None, "pass_at_k": None, "pass_interval": None, "abstained": 1600}
    bounds = {"avg_bounds": (0.0, 1.0), "pass_bounds": (0.0, 1.0)}
    evaluations = {
        "student before": result(0.5, (0.4, 0.6)),
        "student after": result(**{"avg": 0.0, "interval": None} | nothing | bounds),
    }
    text = Page(write(tmp_path, evaluations=evaluations)).text
    assert "student after no verdict no verdict 35 17 1600 of 1600" in text
    assert "student after: 1600 of 1600 completions have no verdict and are left out" in text
    assert "3 of 1600" in text
    assert compare(evaluations) is None


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ((0.5, (0.4, 0.6)), (0.4, (0.3, 0.5)), "fell by 10.0 points, from 50.0% to 40.0%; the 95% intervals overlap."),
        ((0.5, (0.4, 0.6)), (0.5, (0.4, 0.6)), "stayed the same, from 50.0% to 50.0%; the 95% intervals overlap."),
        ((0.9, (0.8, 1.0)), (0.1, (0.0, 0.2)), "fell by 80.0 points, from 90.0% to 10.0%; the 95% intervals do not"),
    ],
)
def test_comparison(before, after, sentence):
    found = compare({"Student before": result(*before), "Student after": result(*after), "teacher": result(1, (1, 1))})
    assert sentence in found


def test_no_comparison_without_a_pair():
    assert compare({"student": result(0.5, (0.4, 0.6))}) is None


def test_labels():
    assert metric_label("avg", [8, 8]) == "avg@8"
    assert metric_label("avg", [8, 32]) == "avg@k"


def test_versions():
    versions = dict(installed_versions())
    assert set(versions) >= {"python", "torch", "trl", "transformers"}
