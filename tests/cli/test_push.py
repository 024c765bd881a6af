"""A Hub that fails costs nothing but the push: the real client against a small Hub on this machine."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from hub_server import Hub, running_hub

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("hub_runs_script.py")
TOKENS = {
    "hub_token": "canary-of-the-hub",
    "model_init_kwargs": '{"token": "canary-of-the-model", "dtype": "float32"}',
}
# method, repository by which the Hub fails, further flags
RUNS = {
    "whole": ("sg_opd", "me/whole", {}),
    "403": ("sft", "me/commit-403", {}),
    "500": ("grpo", "me/commit-500", {"save_strategy": "steps", "save_steps": "1"}),
    "a checkpoint": ("sg_opd", "me/commit-500", {"save_strategy": "steps", "save_steps": "1"}),
    "closes": ("gkd", "me/commit-closes", {}),
    "not authorised": ("seqkd", "me/create-401", {}),
    "may only read": ("sft", "me/auth-403", {}),
    "closes at once": ("sft", "me/create-closes", {}),
    "rollouts": ("teacher-rollouts", "me/rollouts", {}),
    "rollouts 403": ("teacher-rollouts", "me/commit-403-rollouts", {}),
    "rollouts at once": ("teacher-rollouts", "me/create-403", {}),
}
METHODS = ("sg_opd", "sft", "seqkd", "gkd", "grpo")
SAVED = ("model.safetensors", "README.md", "log_history.json", "report.html", "run.json")


class Ended(NamedTuple):
    status: int | str
    seconds: float
    out: str
    err: str
    folder: Path


def run_all(tiny, folder: Path, runs: Mapping[str, tuple], environment: Mapping[str, str]) -> dict[str, Ended]:
    """What became of the runs, each in a folder with its name."""
    commands = []
    for name, (method, repository, more) in runs.items():
        settings = {
            "model_name_or_path": tiny.student, "dataset_name": tiny.data, "method": method,
            "output_dir": str(folder / name), "max_steps": "2", "per_device_train_batch_size": "4",
            "num_generations": "2", "use_cpu": "true", "bf16": "false", "gradient_checkpointing": "false",
            "save_strategy": "no", "logging_steps": "1", "learning_rate": "1e-3", "disable_tqdm": "true",
            "push_to_hub": "true", "hub_model_id": repository, **TOKENS, **more,
        }  # fmt: skip
        settings["max_new_tokens" if method == "gkd" else "max_completion_length"] = "8"
        if method in ("sft", "seqkd"):
            settings["teacher_sampling_filter_correct"] = "false"  # a tiny teacher is seldom right
        if method == "seqkd":
            del settings["num_generations"]
        if method != "grpo":
            settings["teacher_model_name_or_path"] = tiny.teacher
        if method == "teacher-rollouts":
            del settings["method"], settings["push_to_hub"], settings["hub_model_id"]
            settings |= {"teacher_sampling_phase1_end_frac": "1.0", "teacher_sampling_phase2_end_frac": "1.0"}
            recipe = folder / f"{name}.yaml"
            recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
            push = ["--output", str(folder / name / "rollouts"), "--push_to_hub", repository]
            commands.append(["teacher-rollouts", "--config", str(recipe), *push])
            continue
        commands.append(["train", *(word for key, value in settings.items() for word in (f"--{key}", value) if word)])
    variables = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    variables |= {
        "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "home"), **environment,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(commands)],
        env=variables, cwd=folder, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out, err = (re.split(r"^=== \d+\n", text, flags=re.MULTILINE)[1:] for text in (done.stdout, done.stderr))
    ended = {}
    for name, said, errors in zip(runs, out, err, strict=True):
        status, seconds = json.loads(said.rpartition("--- ")[2])
        ended[name] = Ended(status, seconds, said, errors, folder / name)
    return ended


@pytest.fixture(scope="module")
def pushed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed")
    with running_hub() as hub:
        yield hub, run_all(tiny, folder, RUNS, {"HF_ENDPOINT": hub.url})


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    runs = {method: (method, "me/student", {}) for method in METHODS}
    runs["two processes"] = ("sft", "me/student", {"num_processes": "2", "multi_gpu": ""})
    # Port 9 is that of a service that nobody runs.
    return run_all(tiny, tmp_path_factory.mktemp("alone"), runs, {"HF_ENDPOINT": "http://127.0.0.1:9"})


def assert_no_token(text: str | bytes) -> None:
    assert (b"canary-of" if isinstance(text, bytes) else "canary-of") not in text


@pytest.mark.slow
def test_what_arrives_is_whole_and_holds_no_token(pushed: tuple[Hub, dict[str, Ended]]) -> None:
    hub, ended = pushed
    run = ended["whole"]
    assert run.status == 0, run.err
    assert f"Student pushed: {hub.url}/me/whole/commit/" in run.out
    arrived = hub.files["me/whole"]
    assert {"tokenizer.json", "config.json", "training_args.bin", *SAVED} <= arrived.keys()
    for name, content in arrived.items():
        assert content == (run.folder / name).read_bytes(), f"{name} is what the run has left"
        assert_no_token(content)
    # The run's last word was written before.
    assert json.loads(arrived["run.json"])["state"] == "finished"
    assert {header for _, path, header in hub.requests if "whole" in path} == {f"Bearer {TOKENS['hub_token']}"}
    assert not [name for name in arrived if name.startswith(("checkpoint", "student-in", "_"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("403", r"The Hub answers 403: it does not let this token write there"),
        ("500", r"The Hub answers 500: the fault is on its side"),
        ("closes", r"The Hub does not answer"),
    ],
)
def test_a_failed_push_leaves_the_run_whole_and_says_how_to_push(
    pushed: tuple[Hub, dict[str, Ended]], name: str, reason: str
) -> None:
    run = pushed[1][name]
    assert run.status == 2, run.err
    assert len(re.findall(reason, run.err)) == 1
    assert "Traceback" not in run.err
    for file in SAVED:
        assert (run.folder / file).is_file(), file
    assert json.loads((run.folder / "run.json").read_text(encoding="utf-8"))["state"] == "finished"
    command = next(line.strip() for line in run.err.splitlines() if line.strip().startswith("hf upload"))
    assert pushed_again(pushed[0], command, RUNS[name][1]) >= {*SAVED}


def pushed_again(hub: Hub, command: str, repository: str) -> set[str]:
    """What the command that a message gives pushes, carried out as it stands but into a repository that takes it."""
    words = shlex.split(command)
    words[words.index(repository)] = f"{repository.replace('commit', 'again')}"
    program = Path(sys.executable).with_name(words[0])
    variables = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    variables |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "canary-of-the-shell"}
    done = subprocess.run(
        [program, *words[1:]], env=variables, capture_output=True, text=True, check=False, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    arrived = {*hub.files[words[words.index("--") + 1]]}
    assert not [name for name in arrived if name.startswith(("checkpoint", "student-in", "_"))]
    return arrived


@pytest.mark.slow
@pytest.mark.parametrize("name", ["500", "a checkpoint"])
def test_a_checkpoint_that_is_not_pushed_is_a_warning(pushed: tuple[Hub, dict[str, Ended]], name: str) -> None:
    run = pushed[1][name]
    assert "A checkpoint was not pushed; it is in its folder, and training goes on: HfHubHTTPError" in run.err
    assert (run.folder / "checkpoint-2" / "trainer_state.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("not authorised", "The Hub answers 401: it does not let this token write there"),
        ("may only read", "The Hub answers 403: it does not let this token write there"),
        ("closes at once", "The Hub does not answer"),
    ],
)
def test_what_fails_at_the_start_costs_no_rollout(
    pushed: tuple[Hub, dict[str, Ended]], name: str, reason: str
) -> None:
    run = pushed[1][name]
    assert run.status == 2, run.err
    assert "`push_to_hub` must find a Hub that takes `hub_model_id`" in run.err
    assert reason in run.err
    assert "Traceback" not in run.err
    assert list(run.folder.glob("teacher_rollouts*")) == []


@pytest.mark.slow
def test_the_teachers_rollouts_are_pushed_or_pushed_again(pushed: tuple[Hub, dict[str, Ended]]) -> None:
    hub, ended = pushed
    assert ended["rollouts"].status == 0, ended["rollouts"].err
    arrived = hub.files["me/rollouts"]
    assert any(name.endswith(".jsonl") for name in arrived)
    for content in arrived.values():
        assert_no_token(content)
    run = ended["rollouts 403"]
    assert run.status == 2, run.err
    assert "The Hub answers 403: it does not let this token write there" in run.err
    assert f"the rollouts are in {run.folder / 'rollouts'}" in run.err
    command = next(line.strip() for line in run.err.splitlines() if line.strip().startswith("hf upload"))
    assert len(pushed_again(hub, command, "me/commit-403-rollouts")) == len(arrived)
    early = ended["rollouts at once"]
    assert early.status == 2, early.err
    assert "`push_to_hub` must find a Hub" in early.err
    assert not list(early.folder.rglob("*.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "two processes"])
def test_a_hub_that_is_not_there_is_told_before_anything_is_loaded(alone: dict[str, Ended], method: str) -> None:
    run = alone[method]
    assert run.status == 2, run.err
    assert "The Hub does not answer. Look at the network, and at HF_ENDPOINT if it is set." in run.err
    assert "Traceback" not in run.err
    assert list(run.folder.glob("*.safetensors")) + list(run.folder.glob("teacher_rollouts*")) == []


@pytest.mark.slow
def test_no_token_is_shown_or_left_behind(pushed: tuple[Hub, dict[str, Ended]], alone: dict[str, Ended]) -> None:
    for run in (*pushed[1].values(), *alone.values()):
        assert_no_token(run.out + run.err)
        for path in run.folder.rglob("*"):
            if path.is_file():
                assert_no_token(path.read_bytes())
