"""The commands on the model's folder, as a user would name it in a recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from real_model.smollm import NEEDS_MODEL, rows
from sg_opd_trl.cli import main

pytestmark = NEEDS_MODEL


@pytest.fixture
def recipe(folder: str, tmp_path: Path) -> Path:
    """One step of a few rollouts, for LoRA on the projections."""
    rows().to_json(tmp_path / "problems.jsonl")
    settings = {
        "model_name_or_path": folder,
        "teacher_model_name_or_path": folder,
        "dataset_name": str(tmp_path / "problems.jsonl"),
        "reward_funcs": ["math_reward"],
        "output_dir": str(tmp_path / "student"),
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"],
        "learning_rate": 1e-4,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "temperature": 0.7,
        "teacher_sampling_enable": False,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in settings.items()), encoding="utf-8")
    return path


def test_train_by_recipe_leaves_an_adapter_that_is_evaluated(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", "--config", str(recipe)]) == 0
    student = tmp_path / "student"
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (student / name).is_file(), name
    (entry,) = [x for x in json.loads((student / "log_history.json").read_text(encoding="utf-8")) if "reward" in x]
    assert entry["gate/consensus"] == entry["gate/conflict"] == 0.0  # the teacher is the student
    words = ["--dataset_name", str(tmp_path / "problems.jsonl"), "--num_samples", "1", "--max_new_tokens", "8"]
    result = tmp_path / "result.json"
    assert main(["evaluate", "--model", str(student), *words, "--temperature", "0", "--output", str(result)]) == 0
    found = json.loads(result.read_text(encoding="utf-8"))
    assert (found["num_problems"], found["abstained"]) == (6, 0)
    assert found["avg_at_k"] > 0


def test_check_says_what_there_is_to_say_of_the_recipe(recipe: Path, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    assert main(["check", "--config", str(recipe), "--prompts", "2", "--json", str(found)]) == 0
    report = json.loads(found.read_text(encoding="utf-8"))
    states = {row["name"]: row["state"] for row in report["rows"]}
    for name in ("tokenizer", "chat template", "end token", "context", "log-probs", "verifier", "golds"):
        assert states[name] == "green", report["rows"]
    assert not (tmp_path / "student").exists()
