import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from sg_opd_trl.cli import main, study_child
from sg_opd_trl.study import execution, page

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "recipes" / "studies" / "smoke.yaml"


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


def test_a_child_stops_at_the_first_command_that_fails(monkeypatch):
    seen = []
    monkeypatch.setattr(study_child, "main", lambda words: seen.append(words) or (3 if words == ["b"] else 0))
    assert study_child.run_commands([["a"], ["b"], ["c"]]) == 3
    assert seen == [["a"], ["b"]]
    assert study_child.run_commands([["a"]]) == 0


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


@pytest.mark.slow
def test_a_killed_study_leaves_nothing_running_and_goes_on_where_it_was(tiny, tmp_path):
    study = yaml.safe_load(SMOKE.read_text(encoding="utf-8"))
    study["output_dir"] = str(tmp_path / "out")
    study["settings"] |= {
        **{"model_name_or_path": tiny.student, "dataset_name": tiny.data, "per_device_train_batch_size": 4},
        **{"num_generations": 2, "max_completion_length": 8, "teacher_model_name_or_path": tiny.teacher},
    }
    study["evaluate"] |= {"dataset_name": tiny.data, "max_new_tokens": 8, "limit": 4}
    for run in study["runs"].values():
        run["recipe"] = str((SMOKE.parent / run["recipe"]).resolve())
    path = tmp_path / "smoke.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    command = [sys.executable, "-m", "sg_opd_trl.cli", "study", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "first.txt").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        first = tmp_path / "out" / "runs" / "opd" / "seed0" / "result.json"
        second = tmp_path / "out" / "runs" / "sg_opd" / "seed0"
        deadline = time.monotonic() + 400
        while not (second / "log.txt").is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert first.is_file(), (tmp_path / "first.txt").read_text()
        children = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert children
    deadline = time.monotonic() + 20
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, children))
    assert not (second / "result.json").exists()
    stamp = first.stat().st_mtime_ns

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "3 jobs to do" in again.stdout
    assert first.stat().st_mtime_ns == stamp
    table = json.loads((tmp_path / "out" / "smoke.json").read_text(encoding="utf-8"))
    opd, sg_opd = table["groups"][0]["runs"]
    assert (opd["missing"], sg_opd["missing"]) == (0, 0)
    assert sg_opd["difference"]["count"] == 2
    assert opd["teacher_tokens_scored"] > 0
    assert [step for step, _ in opd["reward"]] == [1, 2, 3]
    assert list((tmp_path / "out").rglob("*.safetensors")) == []
    # The first step's entropy is of the first rollouts: the same student, prompts and samples at the same seed.
    first_entropy = {
        (name, seed): json.loads((tmp_path / "out" / "runs" / name / f"seed{seed}" / "log_history.json").read_text())[
            0
        ]["entropy"]
        for name in ("opd", "sg_opd")
        for seed in (0, 1)
    }
    assert first_entropy["opd", 0] == pytest.approx(first_entropy["sg_opd", 0], abs=1e-6)
    assert first_entropy["opd", 1] == pytest.approx(first_entropy["sg_opd", 1], abs=1e-6)
    assert abs(first_entropy["opd", 0] - first_entropy["opd", 1]) > 1e-5


def descendants(pid):
    """Process ids below one process, from `/proc`."""
    found = []
    for path in Path("/proc").glob(f"{pid}/task/*/children"):
        for child in path.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
