import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repository import python_path

from sg_opd_trl.study import execution, results
from sg_opd_trl.study.execution import child_environment, num_cores, run_jobs

from .fakes import jobs, study

TESTS = Path(__file__).resolve().parents[1]


class Recorder:
    def __init__(self):
        self.ended, self.most = [], 0

    def tick(self, waiting, running):
        self.most = max(self.most, len(list(running)))

    def done(self, job, result, waiting, running):
        self.ended.append((job.label, result["evaluation"]["avg_at_k"]))

    def failed(self, failure):
        self.ended.append((failure.job.label, failure.reason))


@pytest.fixture
def fake_child(monkeypatch):
    monkeypatch.setattr(execution, "CHILD", "study.fakes")
    monkeypatch.setattr(execution, "_POLL_SECONDS", 0.02)
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent}{os.pathsep}{TESTS}")


def run(found, at_once=1, keep=False):
    recorder = Recorder()
    return run_jobs(found, at_once=at_once, watcher=recorder, keep_models=keep), recorder


def test_a_run_leaves_its_numbers_and_not_its_model(fake_child, tmp_path):
    job = jobs(study(tmp_path))[0]
    failures, _ = run([job])
    assert failures == []
    result = results.read_result(job)
    assert result["evaluation"]["avg_at_k"] == 0.5
    assert (result["seconds"], result["teacher_tokens_scored"], result["teacher_tokens_generated"]) == (4.5, 7, None)
    assert result["curve"] == [[1, 0.25]]
    assert result["wall_seconds"] > 0
    kept = {path.name for path in job.folder.iterdir()}
    assert {"result.json", "recipe.yaml", "log.txt", "log_history.json", "run.json", "evaluation.json"} <= kept
    assert not (job.folder / "student").exists()


def test_no_file_of_a_job_holds_a_secret_and_its_process_has_them(fake_child, tmp_path):
    secrets = {
        "hub_token": "canary-hub",
        "model_init_kwargs": {"token": "canary-model", "dtype": "float32"},
        "teacher_model_server_url": "http://host:1/KEY-canary0123abcd4567/v1",
    }
    job = jobs(study(tmp_path, settings={**secrets, "run_name": "shown"}))[0]
    failures, _ = run([job])
    assert failures == []
    files = {path: path.read_text() for path in job.folder.rglob("*") if path.is_file()}
    assert [path for path, text in files.items() if "canary" in text] == []
    assert "run_name: shown" in files[job.folder / "recipe.yaml"]
    assert "dtype: float32" in files[job.folder / "recipe.yaml"]
    assert f"Beside the recipe: {sorted(secrets)}" in files[job.folder / "log.txt"]
    assert results.secret_settings(job) == secrets


def test_models_are_kept_where_asked_for(fake_child, tmp_path):
    job = jobs(study(tmp_path))[0]
    run([job], keep=True)
    assert (job.folder / "student" / "model.safetensors").is_file()


def test_a_failing_run_is_reported_and_the_others_go_on(fake_child, tmp_path):
    found = jobs(study(tmp_path, settings={"fake_failure": 1}))
    failures, recorder = run(found, at_once=2)
    assert sorted(failure.job.label for failure in failures) == ["gated, seed 1", "opd, seed 1"]
    assert all(failure.reason == "exit status 3: Error: it broke" for failure in failures)
    assert len(recorder.ended) == 6
    assert [results.read_result(job) is None for job in found] == [False, False, True, True, False, False]
    assert results.failures_of(found) == [
        f"{name}, seed 1: exit status 3: Error: it broke" for name in ("opd", "gated")
    ]


def test_the_next_attempt_starts_anew_and_forgets_the_failure(fake_child, tmp_path):
    job = jobs(study(tmp_path))[0]
    student = job.folder / "student"
    student.mkdir(parents=True)  # the fake child's own `mkdir` fails if this is still there
    (job.folder / results.FAILED).write_text("once")
    failures, _ = run([job])
    assert failures == []
    assert results.failures_of([job]) == []


def test_several_processes_run_at_once_and_no_more(fake_child, tmp_path):
    found = jobs(study(tmp_path, settings={"fake_seconds": 0.5}))
    failures, recorder = run(found[:4], at_once=2)
    assert failures == []
    assert recorder.most == 2


def test_an_interruption_ends_the_children(fake_child, tmp_path, monkeypatch):
    started = []
    start = execution._start
    monkeypatch.setattr(execution, "_start", lambda *given: started.append(start(*given)) or started[-1])

    class Interrupting(Recorder):
        def tick(self, waiting, running):
            raise KeyboardInterrupt

    found = jobs(study(tmp_path, settings={"fake_seconds": 60}))
    with pytest.raises(KeyboardInterrupt):
        run_jobs(found, at_once=2, watcher=Interrupting(), keep_models=False)
    assert len(started) == 2
    assert all(item.process.returncode is not None for item in started)


def test_a_result_that_cannot_be_read_is_a_failure(fake_child, tmp_path, monkeypatch):
    job = jobs(study(tmp_path))[0]
    monkeypatch.setattr(type(job), "commands", [])
    failures, _ = run([job])
    assert "the result cannot be read" in failures[0].reason


def test_a_folder_that_cannot_be_made_is_a_failure_of_its_run_alone(fake_child, tmp_path):
    first, second = jobs(study(tmp_path))[:2]
    first.folder.parent.mkdir(parents=True)
    first.folder.write_text("a file where the folder should be")
    failures, recorder = run([first, second])
    assert [failure.job for failure in failures] == [first]
    assert failures[0].reason.startswith("cannot be started: ")
    assert [label for label, _ in recorder.ended] == [first.label, second.label]
    assert results.read_result(second) is not None


def test_what_cannot_be_removed_of_an_earlier_attempt_is_not_built_upon(tmp_path, monkeypatch):
    job = jobs(study(tmp_path))[0]
    monkeypatch.setattr(results.shutil, "rmtree", lambda *_, **__: None)
    job.folder.mkdir(parents=True)
    (job.folder / ".nfs0001").touch()
    results.prepare(job)
    assert (job.folder / "recipe.yaml").is_file()
    with pytest.raises(OSError, match=r"cannot be emptied, \['commands.json', 'recipe.yaml'\]"):
        results.prepare(job)


@pytest.mark.parametrize("cost", [{}, {"teacher_tokens_reused": 12}])
def test_reused_tokens_are_kept_where_a_run_has_them(tmp_path, cost):
    job = jobs(study(tmp_path))[0]
    (job.folder / "student").mkdir(parents=True)
    (job.folder / "student" / "run.json").write_text(json.dumps({"seconds": 1.0, **cost}))
    (job.folder / "evaluation.json").write_text("{}")
    found = results.finish(job, 2.0, keep_model=False)
    assert {name: value for name, value in found.items() if "reused" in name} == cost


def test_the_real_child_ends_with_the_pipe_that_the_study_holds(tmp_path):
    commands = json.dumps([["train", "--config", str(tmp_path / "absent.yaml")]])
    environment = {**os.environ, "PYTHONPATH": python_path(TESTS.parent)}
    waiting = "import sys, time; sys.modules['sg_opd_trl.cli.train'] = type('m', (), {'run': lambda *a, **k: "
    waiting += "print('trains', flush=True) or time.sleep(60)}); sys.argv[1:] = ['--watch', sys.argv[1]]; "
    waiting += "import runpy; runpy.run_module('sg_opd_trl.cli.study_child', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", waiting, commands],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == b"trains\n"
    assert process.poll() is None
    process.stdin.close()
    started = time.monotonic()
    assert process.wait(20) == -signal.SIGTERM
    assert time.monotonic() - started < 10
    process.stdout.close()


def test_cores_are_divided_unless_the_shell_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(execution, "num_cores", lambda: 8)
    assert [child_environment(count)["OMP_NUM_THREADS"] for count in (1, 3, 100)] == ["8", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert child_environment(2)["OMP_NUM_THREADS"] == "5"
    assert num_cores() >= 1


def test_a_result_of_other_settings_does_not_count(fake_child, tmp_path):
    job = jobs(study(tmp_path))[0]
    run([job])
    assert results.read_result(jobs(study(tmp_path))[0]) is not None
    assert results.read_result(jobs(study(tmp_path), max_steps=7)[0]) is None
    (job.folder / results.RESULT).write_text("{broken")
    assert results.read_result(job) is None
