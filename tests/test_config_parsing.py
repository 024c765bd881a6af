"""Each own field of `SGOPDConfig` can be set from outside: flags and YAML."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from transformers import HfArgumentParser
from trl import GRPOConfig, TrlParser

from sg_opd_trl import SGOPDConfig, SGOPDConfigError

INHERITED = {field.name for field in fields(GRPOConfig)}
OWN = [field for field in fields(SGOPDConfig) if field.name not in INHERITED]
COUNTS = ["teacher_num_generations", "teacher_max_completion_length", "max_tokens_per_scoring_batch"]
CPU = ["--output_dir", "unused", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]

SERVER = ["--teacher_model_server_url", "http://localhost:8000"]  # what these two settings are of

# name -> (words on the command line, value)
PARSED: dict[str, tuple[list[str], Any]] = {
    "teacher_model_init_kwargs": (['{"dtype": "float32"}'], {"dtype": "float32"}),
    "reference_model_init_kwargs": (['{"dtype": "float32"}'], {"dtype": "float32"}),
    "teacher_model_server_url": (["http://localhost:8000"], "http://localhost:8000"),
    "teacher_request_timeout": (["30", *SERVER], 30.0),
    "teacher_max_retries": (["2", *SERVER], 2),
    "disagree_cell_lambdas": (["1", "2", "3", "4"], [1.0, 2.0, 3.0, 4.0]),
    "disagree_mode": (["cells"], "cells"),
    "task_reward_coef": (["0", "1"], [0.0, 1.0]),
    "teacher_kl_coef": (["0.5"], [0.5]),
    "coef_schedule": (["cosine"], "cosine"),
    "coef_phase_end_fracs": (["0.4", "0.8"], [0.4, 0.8]),
    "neutral_mode": (["conflict"], "conflict"),
    "distillation_mode": (["topk_logits"], "topk_logits"),
    "distillation_topk": (["16"], 16),
    "asymmetric_forward_kl_scale": (["0.1"], 0.1),
    "stability_norm": (["batch"], "batch"),
    "allow_changed": (["learning_rate"], ["learning_rate"]),
    "gate_signal": (["random"], "random"),
    "wrong_rollout_advantage": (["-0.5"], -0.5),
    "drift_gate_tau": (["2"], 2.0),
    "drift_gate_block": (["newline"], "newline"),
    "drift_gate_mean": (["absolute"], "absolute"),
    "special_token_mask": (["<think>", "<|im_end|>"], ["<think>", "<|im_end|>"]),
    "special_token_mask_scope": (["all"], "all"),
    "teacher_sampling_prompts": (["share"], "share"),
    "teacher_sft_phi": (["dft"], "dft"),
    "teacher_sft_reduction": (["sum"], "sum"),
    "teacher_sampling_phase1_end_frac": (["0.2"], 0.2),
    "teacher_sampling_phase2_end_frac": (["0.5"], 0.5),
    "teacher_sampling_ratio": (["0.25"], 0.25),
    **{name: (["3"], 3) for name in COUNTS},
    "max_skipped_steps": (["5"], 5),
    "verifier_timeout": (["30"], 30.0),
}


def words_and_value(field: Any) -> tuple[list[str], Any]:
    if field.name in PARSED:
        return PARSED[field.name]
    if isinstance(field.default, bool):
        return [str(not field.default).lower()], not field.default
    return (["0.75"], 0.75) if isinstance(field.default, float) else (["some-name"], "some-name")


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
@pytest.mark.parametrize("field", OWN, ids=lambda field: field.name)
def test_every_field_can_be_set_on_the_command_line(parser: Any, field: Any) -> None:
    words, value = words_and_value(field)
    (config,) = parser([SGOPDConfig]).parse_args_into_dataclasses([*CPU, f"--{field.name}", *words])
    assert getattr(config, field.name) == value
    assert value != field.default


def test_yaml_null_is_none(tmp_path: Path) -> None:
    hints = get_type_hints(SGOPDConfig)
    optional = [field.name for field in OWN if type(None) in get_args(hints[field.name])]
    assert "stability_tau" in optional
    recipe = tmp_path / "recipe.yaml"
    basics = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
    recipe.write_text(yaml.safe_dump(basics | dict.fromkeys(optional)), encoding="utf-8")
    (config,) = TrlParser([SGOPDConfig]).parse_args_and_config(["--config", str(recipe)])
    assert {name: getattr(config, name) for name in optional} == dict.fromkeys(optional)


def test_yaml_values_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    basics = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
    recipe.write_text(yaml.safe_dump(basics | {"lambda_high": math.nan}), encoding="utf-8")
    with pytest.raises(SGOPDConfigError, match="lambda_high"):
        TrlParser([SGOPDConfig]).parse_args_and_config(["--config", str(recipe)])
