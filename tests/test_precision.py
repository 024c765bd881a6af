"""Where nobody has set `bf16`, and where it is asked for: on machines with and without bfloat16."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import PATIENCE, ROOT, python_path
from tiny import tiny_model, tiny_trainer
from transformers import training_args
from transformers.utils import import_utils
from trl import GRPOConfig

from sg_opd_trl import SGOPDConfig, SGOPDConfigError, precision
from sg_opd_trl.cli.methods import METHODS

METHOD_NAMES = sorted(METHODS)
IS_OFF = "`bf16` is not set and is off"


def make(method: str, **settings: Any) -> Any:
    teacher = {} if method == "grpo" else {"teacher_model_name_or_path": "teacher"}
    return METHODS[method].config_class("unused", report_to="none", **teacher, **settings)


def machine(monkeypatch: pytest.MonkeyPatch, *, gpu: bool, cpu: bool) -> None:
    """What the machine tells: transformers asks by a name of its own."""
    monkeypatch.setattr(import_utils, "is_torch_bf16_gpu_available", lambda: gpu)
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: gpu)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: cpu)


# GPU with bf16, CPU with bf16, use_cpu -> bf16 where nobody has set it
OPEN = [
    (True, False, False, True),
    (True, True, False, True),
    (False, False, False, False),
    (False, True, False, False),  # transformers refuses it, unless it is told to use the CPU
    (False, True, True, True),
    (True, True, True, True),
    (False, False, True, False),
    (True, False, True, False),
]


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize(("gpu", "cpu", "use_cpu", "expected"), OPEN)
def test_where_nobody_has_set_it_the_machine_decides_and_off_is_told_once(
    method: str, gpu: bool, cpu: bool, use_cpu: bool, expected: bool, monkeypatch: Any, caplog: Any
) -> None:
    machine(monkeypatch, gpu=gpu, cpu=cpu)
    config = make(method, use_cpu=use_cpu)
    assert config.bf16 is expected
    assert config.mixed_precision == ("bf16" if expected else "no")
    assert caplog.text.count(IS_OFF) == (0 if expected else 1)


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("name", ["bf16", "bf16_full_eval"])
def test_who_asks_for_it_in_vain_is_refused_by_name(method: str, name: str, monkeypatch: Any) -> None:
    machine(monkeypatch, gpu=False, cpu=False)
    with pytest.raises(SGOPDConfigError) as caught:
        make(method, **{"bf16": False} | {name: True})
    message = str(caught.value)
    assert f"`{name}` must be false on this machine, got True. It has no GPU" in message
    assert f"Set {name}=False for float32, or use_cpu=True" in message
    assert make(method, use_cpu=True, **{"bf16": False} | {name: True})


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_float16_on_a_cpu_is_refused_by_name(method: str, monkeypatch: Any) -> None:
    """accelerate takes it, and trains in float32 without a scaler."""
    with pytest.raises(SGOPDConfigError, match="`fp16` must not be float16 on a CPU, got True"):
        make(method, use_cpu=True, fp16=True, bf16=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(SGOPDConfigError, match="`mixed_precision` must not be float16 on a CPU, got 'fp16'"):
        make(method, use_cpu=True, bf16=False)


@pytest.mark.parametrize("settings", [{"bf16": False}, {"fp16": True}])
def test_what_is_set_is_left_alone_without_a_word(settings: dict, monkeypatch: Any, caplog: Any) -> None:
    machine(monkeypatch, gpu=False, cpu=False)
    monkeypatch.setattr(precision, "has_float16", lambda config: True)
    config = SGOPDConfig("unused", report_to="none", **settings)
    assert (config.bf16, config.fp16) == (False, settings.get("fp16", False))
    assert IS_OFF not in caplog.text


def test_a_recipe_that_asks_for_it_is_refused_and_one_that_is_silent_runs(tmp_path: Path, monkeypatch: Any) -> None:
    from sg_opd_trl.cli.parsing import build_settings, read_command_line

    machine(monkeypatch, gpu=False, cpu=False)
    lines = "model_name_or_path: s\nteacher_model_name_or_path: t\ndataset_name: d\noutput_dir: out\ndtype: bfloat16\n"
    (tmp_path / "silent.yaml").write_text(lines, encoding="utf-8")
    assert build_settings(read_command_line(["--config", str(tmp_path / "silent.yaml")])).training.bf16 is False
    (tmp_path / "asks.yaml").write_text(f"{lines}bf16: true\n", encoding="utf-8")
    with pytest.raises(SGOPDConfigError, match="`bf16` must be false on this machine"):
        build_settings(read_command_line(["--config", str(tmp_path / "asks.yaml")]))


def test_the_libraries_decide_as_the_package_believes(monkeypatch: Any) -> None:
    """TRL switches it on where it is open, and transformers asks for a GPU unless it is told to use the CPU."""
    machine(monkeypatch, gpu=False, cpu=False)
    with pytest.raises(ValueError, match="doesn't support bf16"):
        GRPOConfig("unused", report_to="none")
    assert GRPOConfig("unused", report_to="none", use_cpu=True).bf16 is True
    machine(monkeypatch, gpu=True, cpu=False)
    assert GRPOConfig("unused", report_to="none").bf16 is True
    # Of torch, private: a bool, on every build that has oneDNN.
    assert isinstance(precision.cpu_has_bf16(), bool)
    assert not torch.backends.mkldnn.is_available() or isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["0", "1"])
def test_the_switch_of_the_tests_reaches_other_processes(switch: str, tmp_path: Path) -> None:
    """As `make test BF16=...` has it; the folder is in PYTHONPATH of all tests."""
    code = "import json; from sg_opd_trl import SGOPDConfig, precision; told = [precision.cpu_has_bf16()]; "
    code += "print(json.dumps(told + [SGOPDConfig('u', use_cpu=use_cpu).bf16 for use_cpu in (False, True)]))"
    environment = os.environ | {"SG_OPD_TEST_BF16": switch, "PYTHONPATH": python_path(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [switch == "1"] * 3
    assert done.stderr.count(IS_OFF) == (2 if switch == "0" else 0)


def test_another_value_of_the_switch_is_refused(tmp_path: Path) -> None:
    environment = os.environ | {"SG_OPD_TEST_BF16": "yes"}
    script = ROOT / "tests" / "bf16_switch" / "sitecustomize.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "must be 0 or 1, got 'yes'" in done.stderr


def test_updates_that_bfloat16_loses() -> None:
    """AdamW itself is the oracle: which weights did not move in a first step, whose updates are the learning rate."""
    torch.manual_seed(0)
    for rate in (1e-5, 1e-3):
        layer = torch.nn.Linear(64, 64).to(torch.bfloat16)
        expected = precision.lost_updates(layer, rate)
        before = [weight.detach().clone() for weight in layer.parameters()]
        (layer(torch.randn(8, 64, dtype=torch.bfloat16)) * torch.randn(8, 64)).sum().backward()
        torch.optim.AdamW(layer.parameters(), lr=rate, weight_decay=0.0).step()
        still = sum(int((one == other).sum()) for one, other in zip(before, layer.parameters(), strict=True))
        assert still / sum(weight.numel() for weight in before) == pytest.approx(expected, abs=0.02)
    assert precision.lost_updates(torch.nn.Linear(64, 64), 1e-5) == 0


@pytest.mark.parametrize(
    ("dtype", "rate", "told"),
    [(torch.bfloat16, 1e-5, True), (torch.bfloat16, 1e-2, False), (torch.float32, 1e-5, False)],
)
def test_a_student_that_would_not_move_is_told(
    dtype: torch.dtype, rate: float, told: bool, tmp_path: Path, caplog: Any
) -> None:
    tiny_trainer(tmp_path, settings={"learning_rate": rate}, model=tiny_model(0).to(dtype))
    assert ("do not move by so little in bfloat16" in caplog.text) is told
