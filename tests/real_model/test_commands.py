"""The commands on the model's folder, as a user would name it in a recipe."""

import json
from pathlib import Path

import pytest

from real_model.smollm import NEEDS_MODEL, WORKED_EXAMPLES, rows
from sg_opd_trl.cli import main

pytestmark = NEEDS_MODEL


@pytest.fixture
def recipe(folder: str, tmp_path: Path) -> Path:
    """One step of a few rollouts, for LoRA on the projections; the teacher is the student with worked examples."""
    rows(teacher_system=WORKED_EXAMPLES).to_json(tmp_path / "problems.jsonl")
    settings = {
        "model_name_or_path": folder,
        "teacher_model_name_or_path": folder,
        "dataset_name": str(tmp_path / "problems.jsonl"),
        "reward_funcs": ["math_reward"],
        "output_dir": str(tmp_path / "student"),
        "use_peft": True,
        "lora_r": 4,
        "lora_dropout": 0.0,
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


def test_train_by_recipe_leaves_an_adapter_that_is_evaluated(recipe: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(recipe)]) == 0
    student = tmp_path / "student"
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (student / name).is_file(), name
    (entry,) = [x for x in json.loads((student / "log_history.json").read_text(encoding="utf-8")) if "reward" in x]
    assert entry["teacher/abs_advantage_mean"] > 0.1
    assert entry["grad_norm"] > 0
    result = tmp_path / "result.json"
    words = ["--model", str(student), "--dataset_name", str(tmp_path / "problems.jsonl"), "--dataset_split", "train"]
    sampling = ["--num_samples", "1", "--max_new_tokens", "8", "--temperature", "0", "--output", str(result)]
    assert main(["evaluate", *words, *sampling]) == 0
    found = json.loads(result.read_text(encoding="utf-8"))
    assert (found["num_problems"], found["abstained"]) == (6, 0)
    assert found["avg_at_k"] > 0


def test_check_finds_all_in_order_but_a_teacher_that_is_the_student(recipe: Path, tmp_path: Path) -> None:
    rows().to_json(tmp_path / "alone.jsonl")  # no worked examples
    found, words = tmp_path / "found.json", ["--dataset_name", str(tmp_path / "alone.jsonl"), "--prompts", "1"]
    assert main(["check", "--config", str(recipe), *words, "--json", str(found)]) == 2
    states = {row["name"]: row["state"] for row in json.loads(found.read_text(encoding="utf-8"))["rows"]}
    assert [name for name, state in states.items() if state == "red"] == ["teacher"]
    assert states["gate"] == "yellow"
    for name in ("tokenizer", "chat template", "end token", "context", "log-probs", "verifier", "golds", "memory"):
        assert states[name] == "green", name
    assert not (tmp_path / "student").exists()
