import json

import pytest

from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.study.plan import tuning_jobs_of
from sg_opd_trl.study.tables import choice_cells
from sg_opd_trl.study.tuning import choose, load_choices, save_choices

from .fakes import recipes, study, write

TUNE = {"field": "learning_rate", "values": [1e-4, 1e-3, 1e-2], "seeds": [8, 9], "split": "tune"}


@pytest.fixture
def tuned(tmp_path):
    spec = study(tmp_path, tune=TUNE)
    scores = {
        ("opd", 1e-4): (0.1, 0.2), ("opd", 1e-3): (0.5, 0.3), ("opd", 1e-2): (0.3, 0.45),
        ("gated", 1e-4): (0.2, 0.2), ("gated", 1e-3): (0.2, 0.2), ("gated", 1e-2): (0.9, None),
    }  # fmt: skip
    found = tuning_jobs_of(spec, recipes(spec))
    for job in found:
        score = scores[job.name, job.value][job.seed - 8]
        if score is not None:
            write(job, score)
    return spec, choose(spec, found)


def test_the_best_mean_is_chosen_and_a_value_that_lost_a_seed_is_not(tuned):
    _, choices = tuned
    opd, gated = choices["runs"]["opd"], choices["runs"]["gated"]
    assert (opd["chosen"], opd["edge"]) == (1e-3, False)
    assert [item["mean"] for item in opd["scores"]] == pytest.approx([0.15, 0.40, 0.375])
    assert (gated["chosen"], gated["edge"]) == (1e-4, True), "the first of equal ones; 1e-2 failed on a seed"
    assert [item["value"] for item in gated["scores"]] == [1e-4, 1e-3]


def test_another_study_reads_the_choices(tuned, tmp_path):
    spec, choices = tuned
    (lost,) = [job for job in tuning_jobs_of(spec, recipes(spec)) if not (job.folder / "result.json").exists()]
    write(lost, 0.1)
    choices = choose(spec, tuning_jobs_of(spec, recipes(spec)))
    path = save_choices(spec, choices)
    other = study(tmp_path, choices=str(path))
    assert load_choices(other, path)["runs"]["opd"]["chosen"] == 1e-3
    shared = {"opd": {"recipe": "a"}, "new": {"recipe": "a", "tune": "gated"}, "free": {"recipe": "a", "tune": False}}
    assert load_choices(study(tmp_path, choices="c", runs=shared), path)
    with pytest.raises(SGOPDConfigError, match=r"hold a choice for `gate`.*Did you mean `gated`"):
        load_choices(study(tmp_path, choices="c", runs={"opd": {"recipe": "a"}, "gate": {"recipe": "a"}}), path)
    with pytest.raises(SGOPDConfigError, match="`learning_rate` must not be set in run `opd`"):
        load_choices(study(tmp_path, choices="c", settings={"learning_rate": 1.0}), path)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"runs": {"opd": {}}, "field": "x"}'])
def test_a_file_that_holds_no_choices_is_refused(tmp_path, text):
    path = tmp_path / "choices.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SGOPDConfigError, match="Run that study first"):
        load_choices(study(tmp_path), path)


def test_a_run_of_which_nothing_finished_has_no_choice(tmp_path):
    spec = study(tmp_path, tune=TUNE)
    assert choose(spec, tuning_jobs_of(spec, recipes(spec)))["runs"] == {}
    assert json.loads(save_choices(spec, choose(spec, [])).read_text())["field"] == "learning_rate"


def test_a_choice_says_which_values_it_has_not_seen(tuned):
    opd, gated = tuned[1]["runs"]["opd"], tuned[1]["runs"]["gated"]
    assert (opd["complete"], opd["missing"]) == (True, [])
    assert (gated["complete"], gated["missing"]) == (False, [1e-2])
    assert [cells[1] for cells in choice_cells(tuned[1])] == ["0.001", "0.0001 (edge of the grid) (2 of 3 values)"]


def test_an_unfinished_choice_is_refused_where_it_is_needed(tuned, tmp_path):
    spec, choices = tuned
    path = save_choices(spec, choices)
    runs = {"opd": {"recipe": "a"}, "gated": {"recipe": "a", "tune": False}}
    assert load_choices(study(tmp_path, choices="c", runs=runs), path)["runs"]["opd"]["chosen"] == 1e-3
    runs["gated"]["tune"] = "gated"
    with pytest.raises(SGOPDConfigError, match=r"choice for `gated` .*without the values \[0.01\].*Run the study"):
        load_choices(study(tmp_path, choices="c", runs=runs), path)
    for entry in choices["runs"].values():  # as files were before they said so
        del entry["complete"], entry["missing"]
    with pytest.raises(SGOPDConfigError, match=r"choice for `opd` .*does not say so"):
        load_choices(study(tmp_path, choices="c"), save_choices(spec, choices))


def test_a_choice_made_on_the_tables_own_problems_is_refused(tmp_path):
    entry = {"chosen": 1e-3, "edge": False, "complete": True, "missing": [], "scores": []}
    choices = {"field": "x", "dataset": "problems", "split": "test", "runs": {"opd": entry, "gated": entry}}
    path = tmp_path / "choices.json"
    for changes in ({}, {"dataset": None}):
        path.write_text(json.dumps({key: value for key, value in (choices | changes).items() if value is not None}))
        with pytest.raises(SGOPDConfigError, match="another split than `evaluate`, got 'test'"):
            load_choices(study(tmp_path), path)
    for changes in ({"split": "tune"}, {"dataset": "others"}):
        path.write_text(json.dumps(choices | changes))
        assert load_choices(study(tmp_path), path)["field"] == "x"
