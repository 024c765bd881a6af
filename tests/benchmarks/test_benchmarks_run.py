"""Every benchmark runs at tiny sizes and prints one table and one JSON line; no time is asserted."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from repository import PATIENCE, ROOT, python_path, read
from teachers.model_server import model_server
from transformers import AutoModelForCausalLM, AutoTokenizer

from sg_opd_trl.tasks import resolve
from sg_opd_trl.tasks.settings import ArithmeticSettings, DataSettings, ModelSettings, SupervisedSettings

pytestmark = pytest.mark.slow

FOLDER = ROOT / "benchmarks"
SHAPE = ["--hidden", "64", "--layers", "1", "--vocab", "512"]
RANDOM_MODELS = {
    "step_time": [*SHAPE, "--longest", "24", "--repeats", "1", "--large_vocab", "2000", "--large_longest", "12"],
    "memory": [*SHAPE, "--lengths", "16"],
    "scaling": [*SHAPE, "--doublings", "1", "--repeats", "1", "--rows", "8", "--length", "12"],
    "rollouts": [*SHAPE, "--limit", "8", "--repeats", "1"],
    "gpu_step": ["--device", "cpu", "--tiny", "--rows", "8", "--longest", "12", "--repeats", "1"],
}
BUILT_IN_TASK = {
    "noise": ["--problems", "4", "--rows", "2"],
    "overhead": [*SHAPE, "--tokens", "64", "--repeats", "1", "--steps", "2"],
    "end_to_end": ["--max_steps", "2", "--every", "1", "--problems", "2"],
}


@dataclass(frozen=True)
class Task:
    dataset: str
    teacher: str
    student: str

    @property
    def flags(self) -> list[str]:
        return ["--dataset", self.dataset, "--teacher", self.teacher, "--student", self.student]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Untrained models of the built-in task, and enough problems for one step of its recipes."""
    model = ModelSettings(hidden_size=16, num_layers=1, intermediate_size=32, num_heads=2)
    training = SupervisedSettings(batch_size=4, max_steps=2, schedule_steps=2, learning_rate=1e-3, warmup_steps=1)
    settings = ArithmeticSettings(
        data=DataSettings(num_train=40, num_validation=4, num_test=4),
        teacher_model=model,
        teacher_training=training,
        student_model=model,
        student_training=training,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SG_OPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        names = ("builtin/arithmetic", "builtin/arithmetic-teacher", "builtin/arithmetic-student")
        return Task(*(resolve(name, settings) for name in names))


def run(name: str, flags: list[str], folder: Path) -> str:
    environment = os.environ | {
        "PYTHONPATH": python_path(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, str(FOLDER / f"{name}.py"), *flags]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def check_output(name: str, output: str) -> dict:
    lines = [line for line in output.splitlines() if line]
    assert sum(line.startswith("ratio ") for line in lines) == 1
    assert [line for line in lines if line.startswith("{")] == lines[-1:]
    result = json.loads(lines[-1])
    assert list(result)[:2] == ["benchmark", "ratios"]
    assert result["benchmark"] == name
    assert len(lines) == 3 + len(result["ratios"]), "title, headings, one line per ratio, JSON"
    assert result["ratios"]
    assert all(value is None or value > 0 for value in result["ratios"].values())
    assert set(result["targets"]) <= set(result["ratios"])
    return result


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_benchmark_of_random_models(name: str, tmp_path: Path) -> None:
    result = check_output(name, run(name, ["--threads", "1", *RANDOM_MODELS[name]], tmp_path))
    if name != "gpu_step":
        assert None not in result["ratios"].values()


def test_memory_by_length(tmp_path: Path) -> None:
    flags = ["--threads", "1", *SHAPE, "--by", "length", "--lengths", "16", "32"]
    result = check_output("memory", run("memory", flags, tmp_path))
    assert list(result["ratios"]) == ["32 / 16 tokens"]


def test_memory_of_a_base_that_is_reference_and_teacher(tmp_path: Path) -> None:
    """All weights of the run are those of one model and its adapters; gradients are the adapters' alone."""
    flags = ["--threads", "1", *SHAPE, "--by", "settings", "--rows", "8", "--lengths", "16"]
    only = ["--only", "LoRA, the base as reference and teacher"]
    used = json.loads(run("memory", [*flags, *only], tmp_path).splitlines()[-1])
    # Two tables of 512 x 64, attention with one head of 64 and norms, an MLP of 192: 4 bytes each, without adapters.
    base = 4 * (2 * 512 * 64 + 4 * 64 * 64 + 3 * 64 * 192 + 5 * 64)
    assert used["models"] == pytest.approx(base / 2**20 + used["gradients"], rel=1e-3)
    assert 0 < used["gradients"] < 0.2 * used["models"]


@pytest.mark.parametrize("name", BUILT_IN_TASK)
def test_benchmark_of_the_built_in_task(name: str, task: Task, tmp_path: Path) -> None:
    result = check_output(name, run(name, ["--threads", "1", *BUILT_IN_TASK[name], *task.flags], tmp_path))
    if name == "end_to_end":
        assert {run["steps"] for runs in result["runs"].values() for run in runs} == {2}, "nothing was learnt"
        assert set(result["ratios"].values()) == {None}


def test_benchmark_of_a_served_teacher(task: Task, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task.teacher)

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    model = AutoModelForCausalLM.from_pretrained(task.teacher)
    with model_server(model, model=task.teacher, tokenize=tokenize) as server:
        flags = ["--threads", "1", "--steps", "1", "--repeats", "1", "--url", server.url, *task.flags]
        result = check_output("server_teacher", run("server_teacher", flags, tmp_path))
    assert len(result["ratios"]) == 3
    assert len(server.completions) > 100, "it was really asked"
    times = result["server"]
    assert times["reference"] > 0
    assert times["step"] == pytest.approx(sum(value for name, value in times.items() if name != "step"))


def test_benchmark_without_a_server_says_so(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nothing measured"):
        run("server_teacher", [], tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    assert "no GPU: nothing measured" in run("gpu_step", [], tmp_path)


def test_make_runs_every_benchmark() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert scripts == {*RANDOM_MODELS, *BUILT_IN_TASK, "server_teacher"}
    (names,) = re.findall(r"^BENCHMARKS := (.+)$", read("Makefile"), flags=re.MULTILINE)
    assert sorted([*names.split(), "server_teacher"]) == sorted(scripts), "that one needs a server"


def test_useful_flops_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from gpu_step import forward_flops
    from harness import Shape, build_model
    from torch.utils.flop_counter import FlopCounterMode

    shape = Shape(64, 2, 300, heads=4, key_value_heads=2, head_dim=32, intermediate_size=160, tied=True)
    prompt, completion = 7, 12
    model = build_model(shape, 0)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(prompt + completion)[None], logits_to_keep=completion, use_cache=False)
    # Eager attention also multiplies what the causal mask throws away: all 19 * 19 pairs instead of 19 * 20 / 2, each
    # 4 FLOPs per channel (q.k and weights.v) on 4 heads * 32 channels in 2 layers.
    masked = (19 * 19 - 19 * 20 // 2) * 4 * 4 * 32 * 2
    assert forward_flops(shape, prompt, completion) == counter.get_total_flops() - masked


def test_layout_without_padding_has_as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    from harness import completion_lengths, make_rollouts, without_padding

    rollouts = make_rollouts(completion_lengths("long-tailed", 32, 384), 512)
    limit = without_padding(rollouts, 512)
    assert rollouts.padding > 0.6
    assert limit.padding == 0
    assert len(set(limit.prompt_tokens)) == 1
    for have, want in ((limit.tokens, rollouts.tokens), (sum(limit.prompt_tokens), sum(rollouts.prompt_tokens))):
        assert abs(have - want) <= 16, "half a token of rounding in each of 32 rows"
