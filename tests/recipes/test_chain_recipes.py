"""The recipes of the task `chains` are those of `arithmetic` on other problems, and one row more."""

from pathlib import Path

import pytest
import yaml

from sg_opd_trl.cli.parsing import build_settings, read_command_line
from sg_opd_trl.tasks import KNOWN_NAMES

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
SHARED = ("opd", "exopd", "gate_only", "pts_only", "sg_opd", "grpo")


def read(task, stem):
    return yaml.safe_load((FOLDER / task / f"{stem}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("stem", SHARED)
def test_same_method_and_settings_as_for_arithmetic(stem):
    chains, arithmetic = read("chains", stem), read("arithmetic", stem)
    # 32 tokens: 4 steps of 5, a space, \boxed{, 8 digits, }, end of turn.
    assert 32 <= chains.pop("max_completion_length") < arithmetic.pop("max_completion_length")
    renamed = {
        key: value.replace("arithmetic", "chains") if isinstance(value, str) else value
        for key, value in arithmetic.items()
    }
    assert chains == renamed
    assert {value for value in chains.values() if str(value).startswith("builtin/")} <= set(KNOWN_NAMES)
    assert chains["dataset_name"] == "builtin/chains"


def test_uniform_extrapolation_is_opd_with_lambda_1_8():
    opd, uniform = read("chains", "opd"), read("chains", "uniform_1_8")
    assert {key: value for key, value in uniform.items() if opd.get(key) != value} == {
        "lambda_base": 1.8,
        "output_dir": "outputs/chains-uniform_1_8",
    }
    assert opd.keys() == uniform.keys()
    words = ["--config", str(FOLDER / "chains" / "uniform_1_8.yaml")]
    training = build_settings(read_command_line(words)).training
    assert (training.lambda_base, training.sign_gated_extrapolation, training.stability_tau) == (1.8, False, None)
