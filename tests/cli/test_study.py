import json
import os
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from sg_opd_trl.cli import main
from sg_opd_trl.study import execution, page, progress

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of which the children train nothing."""
    monkeypatch.setattr(execution, "CHILD", "study.fakes")
    monkeypatch.setattr(execution, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(page, "can_draw", lambda: False)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    (tmp_path / "recipe.yaml").write_text(
        "model_name_or_path: s\nteacher_model_name_or_path: t\ndataset_name: d\n", encoding="utf-8"
    )

    def write(**changes):
        values = {
            **{"name": "tiny", "output_dir": "out", "baseline": "opd", "seeds": [0, 1]},
            "runs": {"opd": {"recipe": "recipe.yaml"}, "gated": {"recipe": "recipe.yaml"}},
            **{"evaluate": {"dataset_name": "d", "max_new_tokens": 8}, **changes},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return write


def results(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("result.json"))}


def test_everything_is_run_once_and_the_table_is_shown(study, tmp_path, capsys):
    assert main(["study", study(), "--jobs", "2"]) == 0
    shown = capsys.readouterr().out
    for part in ("6 jobs to do, 2 at a time", "6/6 ", "| gated | 50.0 ", "student before", "tiny.html"):
        assert part in shown
    first = results(tmp_path / "out")
    assert len(first) == 6
    assert {"tiny.md", "tiny.json", "tiny.html"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert main(["study", study()]) == 0
    assert "0 jobs to do" in capsys.readouterr().out
    assert results(tmp_path / "out") == first


def test_more_seeds_and_changed_settings_run_only_what_is_new(study, tmp_path):
    main(["study", study(measure_models=False)])
    first = results(tmp_path / "out")
    changed = {"opd": {"recipe": "recipe.yaml"}, "gated": {"recipe": "recipe.yaml", "settings": {"lambda_high": 2.0}}}
    main(["study", study(measure_models=False, seeds=[0, 1, 2], runs=changed)])
    second = results(tmp_path / "out")
    again = {name for name, stamp in second.items() if first.get(name) != stamp}
    assert again == {f"runs/{run}/result.json" for run in ("gated/seed0", "gated/seed1", "gated/seed2", "opd/seed2")}


def test_a_failing_run_gives_status_1_a_line_in_the_table_and_another_try(study, tmp_path, capsys):
    runs = {"opd": {"recipe": "recipe.yaml"}, "gated": {"recipe": "recipe.yaml", "settings": {"fake_failure": 1}}}
    assert main(["study", study(runs=runs)]) == 1
    shown = capsys.readouterr().out
    assert "| gated | 50.0 (40.0 to 60.0, over problems) | +0.0 (one seed) | 70.0 | 1 of 2 |" in shown
    assert "- gated, seed 1: exit status 3: Error: it broke" in shown
    assert main(["study", study(runs=runs), "--report_only"]) == 0
    assert "- gated, seed 1: exit status 3" in capsys.readouterr().out
    assert main(["study", study()]) == 0
    assert "## Failed" not in capsys.readouterr().out


def test_only_named_runs_and_sweeps_are_done(study, tmp_path, capsys):
    sweep = {"uniform": {"recipe": "recipe.yaml", "grid": {"lambda_base": [1.0, 1.8]}}}
    path = study(sweep=sweep, measure_models=False)
    main(["study", path, "--only", "uniform", "opd"])
    assert {name.split("/")[1] for name in results(tmp_path / "out")} == {
        *("opd", "uniform-lambda_base=1.0", "uniform-lambda_base=1.8"),
    }
    assert "| gated | – " in capsys.readouterr().out
    assert main(["study", path, "--only", "uniforn"]) == 2
    assert "Did you mean `uniform`?" in capsys.readouterr().err


def test_a_dry_run_lists_and_estimates_and_does_nothing(study, tmp_path, capsys):
    path = study()
    assert main(["study", path, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("to do ") == 6
    assert "no estimate before the first has finished" in shown
    assert not (tmp_path / "out").exists()
    main(["study", path, "--only", "opd"])
    capsys.readouterr()
    main(["study", path, "--dry-run"])
    shown = capsys.readouterr().out
    assert "done  opd, seed 1" in shown
    assert "2 jobs to do, 1 at a time: about " in shown


def test_tuning_comes_first_and_its_choice_is_used_and_shown(study, tmp_path, capsys):
    tune = {"field": "learning_rate", "values": [1e-4, 1e-3], "seeds": [9], "split": "tune"}
    path = study(tune=tune, measure_models=False)
    assert main(["study", path]) == 0
    shown = capsys.readouterr().out
    assert "8 jobs to do" in shown
    assert "| gated | 0.0001 (edge of the grid) | 0.0001: 50.0, 0.001: 50.0 |" in shown
    recipe = yaml.safe_load((tmp_path / "out" / "runs" / "opd" / "seed1" / "recipe.yaml").read_text())
    assert recipe["learning_rate"] == 1e-4
    choices = tmp_path / "out" / "choices.json"
    stored = json.loads(choices.read_text())
    stored["runs"]["gated"]["chosen"] = 1e-3
    choices.write_text(json.dumps(stored))
    other = study(choices="out/choices.json", output_dir="other", measure_models=False, name="other")
    assert main(["study", other]) == 0
    recipe = yaml.safe_load((tmp_path / "other" / "runs" / "gated" / "seed1" / "recipe.yaml").read_text())
    assert recipe["learning_rate"] == 1e-3


def test_a_resumed_study_counts_the_runs_with_the_chosen_values(study, tmp_path, capsys):
    tune = {"field": "learning_rate", "values": [1e-4, 1e-3], "seeds": [9], "split": "tune"}
    path = study(tune=tune, measure_models=False)
    main(["study", path])
    for result in (tmp_path / "out" / "tuning").rglob("result.json"):
        found = json.loads(result.read_text())
        recipe = yaml.safe_load((result.parent / "recipe.yaml").read_text())
        found["evaluation"]["avg_at_k"] = recipe["learning_rate"]  # so that the second value is the better one
        result.write_text(json.dumps(found))
    for count in (4, 0):
        capsys.readouterr()
        assert main(["study", path]) == 0
        assert f"{count} jobs to do" in capsys.readouterr().out


def test_only_finished_tuning_writes_choices(study, tmp_path, capsys, monkeypatch):
    tune = {"field": "learning_rate", "values": [1e-4, 1e-3], "seeds": [9], "split": "tune"}
    path, choices = study(tune=tune, measure_models=False), tmp_path / "out" / "choices.json"

    def interrupted(self, job, *_):
        if (job.name, job.value) == ("opd", 1e-4):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.StudyProgress, "done", interrupted)
        assert main(["study", path]) == 130
    assert "| opd | 0.0001 (edge of the grid) (1 of 2 values) |" in capsys.readouterr().out
    assert not choices.exists()
    assert main(["study", path, "--report_only"]) == 0
    assert "(1 of 2 values)" in capsys.readouterr().out
    assert not choices.exists()
    assert main(["study", path]) == 0
    assert json.loads(choices.read_text())["runs"]["opd"]["complete"] is True
    stamp = choices.stat().st_mtime_ns
    assert main(["study", path, "--dry_run"]) == 0
    assert main(["study", path, "--report_only"]) == 0
    assert choices.stat().st_mtime_ns == stamp


def test_failed_tuning_is_said_in_the_table_and_in_the_file(study, tmp_path, capsys):
    tune = {"field": "fake_failure", "values": [1, 9], "seeds": [9], "split": "tune"}
    assert main(["study", study(tune=tune, seeds=[0], measure_models=False)]) == 1
    assert "| opd | 1 (edge of the grid) (1 of 2 values) |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "choices.json").read_text())["runs"]["opd"]["missing"] == [9]
    other = study(choices="out/choices.json", output_dir="other", name="other")
    assert main(["study", other]) == 2
    assert "without the values [9]" in capsys.readouterr().err


def test_a_report_of_a_running_study_is_shown_and_writes_nothing(study, tmp_path, capsys):
    main(["study", study(seeds=[0])])
    table = tmp_path / "out" / "tiny.md"
    table.unlink()
    capsys.readouterr()
    with FileLock(tmp_path / "out" / ".lock"):
        assert main(["study", study(seeds=[0]), "--report_only"]) == 0
    shown = capsys.readouterr().out
    assert "| gated | 50.0 " in shown
    assert "A study runs in" in shown
    assert not table.exists()
    assert main(["study", study(seeds=[0]), "--report_only"]) == 0
    assert table.exists()


@pytest.mark.parametrize("where", ["evaluate", "tune"])
def test_problems_that_cannot_be_read_stop_the_study_before_it_starts(study, tmp_path, capsys, where):
    tune = {"field": "learning_rate", "values": [1e-4], "seeds": [9], "split": "fake_absent"}
    evaluate = {"dataset_name": "d", "max_new_tokens": 8, "dataset_split": "fake_absent"}
    changes = {"tune": tune} if where == "tune" else {"evaluate": evaluate}
    assert main(["study", study(**changes)]) == 2
    assert "The study is refused. `dataset_split` must be one of the others" in capsys.readouterr().err
    assert list((tmp_path / "out").rglob("log.txt")) == []


def test_a_recipe_that_train_refuses_stops_the_study_before_it_starts(study, tmp_path, capsys):
    runs = {"opd": {"recipe": "recipe.yaml"}, "b": {"recipe": "recipe.yaml", "settings": {"fake_unknown": 1}}}
    assert main(["study", study(runs=runs)]) == 2
    assert "Unknown key `fake_unknown` in recipe .../b.yaml" in capsys.readouterr().err
    assert results(tmp_path / "out") == {}


def test_two_studies_in_one_folder_are_refused(study, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        assert main(["study", study()]) == 2
    assert "one study at a time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--jobs", "0"], "`jobs` must be at least 1"),
        (["--job", "1"], "Unknown key `job`"),
        (["--output-dir"], "expected one argument"),
    ],
)
def test_wrong_flags_are_told(study, capsys, words, said):
    assert main(["study", study(), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_file_is_told(tmp_path, capsys):
    assert main(["study", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in capsys.readouterr().err


@pytest.mark.slow
def test_the_check_of_recipes_is_the_one_of_train(tiny_recipe, tmp_path, capsys):
    values = yaml.safe_load(tiny_recipe.read_text())
    tiny_recipe.write_text(yaml.safe_dump(values | {"lamda_high": 1.0}))
    study = {
        **{
            "name": "t",
            "output_dir": "out",
            "baseline": "a",
            "seeds": [0],
            "runs": {"a": {"recipe": tiny_recipe.name}},
        },
        "evaluate": {"dataset_name": values["dataset_name"], "max_new_tokens": 8},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    assert main(["study", str(tmp_path / "study.yaml")]) == 2
    assert "Did you mean `lambda_high`?" in capsys.readouterr().err.replace("\n", " ")
