"""The command of a teacher's server, and what is refused before it would start."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from sg_opd_trl.cli import main, serve_teacher

KEY = "hunter2-canary"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without an accelerator, vLLM or settings of it."""
    monkeypatch.setattr(serve_teacher, "_has_accelerator", lambda: False)
    monkeypatch.setattr(serve_teacher, "_installed", lambda name: False)
    for name in (*serve_teacher._CPU_VARIABLES, "SG_OPD_TEACHER_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def write(**settings: Any) -> str:
        values = {"model_name_or_path": "s", "teacher_model_name_or_path": str(tmp_path), "dataset_name": "d"}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(values | {"use_cpu": True, "bf16": False} | settings), encoding="utf-8")
        return str(path)

    return write


def printed(capsys: pytest.CaptureFixture, *words: str) -> list[str]:
    assert main(["serve-teacher", "--config", *words, "--print_only"]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(["serve-teacher", "--config", *words]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_the_command_on_a_cpu(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (line,) = printed(capsys, recipe(max_prompt_tokens=100, max_completion_length=50))
    assert line == (
        "VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 "
        f"vllm serve {tmp_path} --host localhost --port 8000 --dtype float32 --max-logprobs -1 "
        "--logprobs-mode processed_logprobs --generation-config vllm --max-model-len 151 --enforce-eager "
        "--gpu-memory-utilization 0.1 --max-num-seqs 8"
    )


def test_the_command_with_an_accelerator(
    recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_teacher, "_has_accelerator", lambda: True)
    monkeypatch.setenv("SG_OPD_TEACHER_API_KEY", KEY)
    path = recipe(
        teacher_model_init_kwargs={"dtype": "bfloat16"},
        teacher_model_revision="v2",
        teacher_model_server_url="http://gpu-1:8001/v1",
    )
    (line,) = printed(capsys, path)
    assert line == (
        f'VLLM_API_KEY="$SG_OPD_TEACHER_API_KEY" vllm serve {tmp_path} --host 0.0.0.0 --port 8001 --dtype bfloat16 '
        "--max-logprobs -1 --logprobs-mode processed_logprobs --generation-config vllm --revision v2"
    )
    assert main(["serve-teacher", "--config", path, "--print_only", "--dtype", "float16", "--", "-tp", "2"]) == 0
    changed = capsys.readouterr().out
    assert "--dtype float16" in changed
    assert changed.rstrip().endswith("--revision v2 -tp 2")


def test_fields_of_the_recipe_as_flags(recipe: Any, capsys: pytest.CaptureFixture) -> None:
    (line,) = printed(capsys, recipe(), "--teacher_model_server_url", "http://127.0.0.1:8010", "--max_model_len", "77")
    assert "--host 127.0.0.1 --port 8010" in line
    assert "--max-model-len 77" in line


def test_several_teachers_and_replicas(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = recipe(
        teacher_model_name_or_path={"math": str(tmp_path), "code": str(tmp_path / "code"), "local": "elsewhere"},
        teacher_model_server_url={"math": ["http://localhost:1", "http://localhost:2"], "code": "http://localhost:3"},
    )
    served = [
        (words[words.index("serve") + 1], words[words.index("--port") + 1])
        for words in map(shlex.split, printed(capsys, path))
    ]
    assert served == [(str(tmp_path), "1"), (str(tmp_path), "2"), (str(tmp_path / "code"), "3")]
    (line,) = printed(capsys, path, "--teacher", "math", "--replica", "2")
    assert "--port 2" in line
    assert "got 3 in the recipe" in refused(capsys, path)
    assert "must be one of the teachers with a server ['code', 'math'], got 'local'" in refused(
        capsys, path, "--teacher", "local"
    )
    assert "must be a number from 1 to 2, got 3" in refused(capsys, path, "--teacher", "math", "--replica", "3")


def test_what_cannot_be_served(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "must name the model that is served, got none" in refused(capsys, recipe(teacher_model_name_or_path=None))
    https = recipe(teacher_model_server_url="https://host")
    assert "must be http for `sg-opd serve-teacher`, got https://host:443" in refused(capsys, https)
    two = recipe(
        teacher_model_name_or_path={"a": str(tmp_path), "b": "other"}, teacher_model_server_url="http://localhost:1"
    )
    assert "got http://localhost:1 for two" in refused(capsys, two)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "must be a full model for `sg-opd serve-teacher`, got the adapter" in refused(capsys, recipe())


@pytest.mark.parametrize("method", ["gkd", "seqkd"])
def test_another_method_is_refused(recipe: Any, capsys: pytest.CaptureFixture, method: str) -> None:
    assert f"`method` must be 'sg_opd', got '{method}'" in refused(capsys, recipe(method=method))


def test_without_vllm_the_command_is_shown(recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = refused(capsys, recipe())
    assert "vLLM must be installed in this environment" in said
    assert f"vllm serve {tmp_path}" in said


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_this_process_becomes_the_server(
    recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(serve_teacher, "_installed", lambda name: name == package)
    monkeypatch.setattr(serve_teacher.shutil, "which", lambda name, path: f"bin/{Path(name).name}")
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setenv("SG_OPD_TEACHER_API_KEY", KEY + "\n")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")
    assert main(["serve-teacher", "--config", recipe()]) == 0
    ((program, words, environment),) = started
    assert environment["VLLM_API_KEY"] == KEY
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "9"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    if package == "vllm":
        assert (program, words[:3]) == ("bin/vllm", ["vllm", "serve", str(tmp_path)])
    else:
        # The command of the package for CPUs does not start without the other package's metadata.
        assert program == f"bin/{Path(sys.executable).name}"
        assert words[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    assert KEY not in capsys.readouterr().out
