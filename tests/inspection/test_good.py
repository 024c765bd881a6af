"""Set-ups that are as they should be: every row is green, but for what is said here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models.architectures import SIZES
from peft import LoraConfig, get_peft_model
from teachers.model_server import model_server
from tiny import tiny_data, tiny_model, tiny_tokenizer, tiny_trainer
from transformers import AutoConfig, AutoModelForCausalLM

from inspection import own_verifiers

MODES = {
    "as it is": {},
    "LoRA": {"use_peft": "true", "lora_r": 2, "lora_target_modules": "q_proj,v_proj"},
    "top-K": {"distillation_mode": "topk_logits", "distillation_topk": 4},
    "whole distributions": {"distillation_mode": "full_logits"},
    "forward KL": {"distillation_mode": "asymmetric", "sign_gated_extrapolation": "false", "lambda_base": 1},
    "OPD": {"sign_gated_extrapolation": "false", "lambda_base": 1, "teacher_sampling_enable": "false"},
    "separated in time": {"teacher_sampling_time_separated": "true"},
    "wrong rollouts without the teacher": {"wrong_rollout_advantage": -1},
    "KL penalty": {"beta": 0.1},
    "streamed": {"dataset_streaming": "true", "teacher_sampling_prompts": "share"},
    "two updates of a batch": {"num_iterations": 2},
}


def doubtful(report: Any) -> list[str]:
    return [str(row) for row in report.rows if row.state != "green"]


@pytest.mark.parametrize("mode", MODES)
def test_modes_pass(look, mode):
    assert doubtful(look(**MODES[mode])) == []


def model_of(kind: str, seed: int, folder: Path) -> str:
    torch.manual_seed(seed)
    settings = SIZES | {"max_position_embeddings": 128, "initializer_range": 0.09}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "olmo2"])
def test_other_architectures_pass(look, kind, tmp_path):
    models = [model_of(kind, seed, tmp_path / str(seed)) for seed in (0, 1)]
    report = look(model_name_or_path=models[0], teacher_model_name_or_path=models[1])
    assert doubtful(report) == []


def test_an_adapter_on_the_students_weights_passes(look, pair, tmp_path):
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(pair / "student")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    report = look(
        teacher_model_name_or_path=tmp_path / "adapter", use_peft="true", lora_r=2, lora_target_modules="q_proj,v_proj"
    )
    assert doubtful(report) == []


def test_several_teachers_pass(look, pair, tmp_path):
    rows = tiny_data(24).add_column("teacher_id", ["one", "two"] * 12)
    rows.to_json(tmp_path / "rows.jsonl")
    teachers = json.dumps({"one": str(pair / "teacher"), "two": str(pair / "student")})
    report = look(teacher_model_name_or_path=teachers, dataset_name=tmp_path / "rows.jsonl")
    assert doubtful(report) == []
    assert "Student, teacher one and teacher two have the same 26 ids" in report.of("tokenizer").found


@pytest.fixture
def server() -> Iterator[Any]:
    with model_server(tiny_model(1)) as running:
        yield running


def test_a_server_passes_but_that_its_tokenizer_is_known_from_itself_alone(look, server):
    report = look(
        teacher_model_name_or_path=None,
        teacher_model_server_url=server.url,
        max_completion_length=24,
        num_generations=4,
    )
    assert [row.name for row in report.rows if row.state != "green"] == ["tokenizer"]
    assert "differ by 0 nats on average when asked twice" in report.of("teacher server").found


def test_prompts_that_are_texts_pass(look, tmp_path):
    tiny_data(24, chat=False).to_json(tmp_path / "rows.jsonl")
    assert doubtful(look(dataset_name=tmp_path / "rows.jsonl")) == []


def test_a_notebook_gets_the_same_rows(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        settings={"max_completion_length": 64, "num_generations": 8},
        reward_funcs=own_verifiers.first_digit,
        eval_dataset=Dataset.from_list(tiny_data(4).to_list()),
    )
    report = trainer.check(prompts=2)
    assert [row.name for row in report.rows if row.state == "red"] == []
    assert [row.found for row in report.rows if row.name == "golds"][1].startswith("All of the first 4 golds of `eval")
    assert "<table>" in report._repr_html_()
