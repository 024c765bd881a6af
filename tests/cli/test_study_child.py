"""What the child processes of a study do, check and leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from repository import PATIENCE, python_path

from sg_opd_trl.cli import study_child

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "recipes" / "studies" / "smoke.yaml"


def test_a_child_stops_at_the_first_command_that_fails(monkeypatch):
    seen = []
    monkeypatch.setattr(study_child, "main", lambda words: seen.append(words) or (3 if words == ["b"] else 0))
    assert study_child.run_commands([["a"], ["b"], ["c"]]) == 3
    assert seen == [["a"], ["b"]]
    assert study_child.run_commands([["a"]]) == 0


def test_a_child_trains_with_the_secrets_that_its_recipe_does_not_show(monkeypatch):
    seen = []
    monkeypatch.setattr(study_child, "main", lambda words: seen.append(words) or 0)
    monkeypatch.setenv(
        "SG_OPD_STUDY_SECRETS", json.dumps({"hub_token": "canary", "model_init_kwargs": {"token": "c"}})
    )
    assert study_child.run_commands([["train", "--config", "a"], ["evaluate"]]) == 0
    flags = ["--hub_token", "canary", "--model_init_kwargs", '{"token": "c"}']
    assert seen == [["train", "--config", "a", *flags], ["evaluate"]]
    assert "SG_OPD_STUDY_SECRETS" not in os.environ, "no process below has it"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"--dataset_split": "tets"}, "`dataset_split` must be one of ['train'], got 'tets'"),
        ({"--num_samples": "eight"}, "invalid int value: 'eight'"),
        ({"--k": "9"}, "`k` must be between 1 and `num_samples`"),
        ({"--top_p": "2"}, "`top_p` must be in (0, 1]"),
        ({"--reward_func": "math_rewards"}, "math_reward"),
        ({"--question_column": "absent"}, "absent"),
        ({"--dataset_name": "/absent/problems.jsonl"}, "/absent/problems.jsonl"),
    ],
)
def test_the_check_of_the_evaluation_does_all_that_needs_no_model(tmp_path, capsys, changes, said):
    data = tmp_path / "problems.jsonl"
    data.write_text('{"prompt": "1 + 1", "solution": "2"}\n', encoding="utf-8")
    options = {"--dataset_name": str(data), "--dataset_split": "train", "--max_new_tokens": "8", "--model": "later"}
    words = [word for pair in (options | changes).items() for word in pair]
    assert study_child.run_commands([["check_evaluation", *words]]) == (0 if said is None else 2)
    assert (said or "") in capsys.readouterr().err


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
    environment = {**os.environ, "PYTHONPATH": python_path(ROOT), "OMP_NUM_THREADS": "1"}
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

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
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
