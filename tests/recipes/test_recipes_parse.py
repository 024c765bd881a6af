import re
from pathlib import Path

import pytest
import yaml

from sg_opd_trl.cli.launching import launch_words
from sg_opd_trl.cli.parsing import build_settings, read_command_line
from sg_opd_trl.cli.recipes import ENV_WHITELIST
from sg_opd_trl.errors import SGOPDConfigError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml")) + sorted(FOLDER.rglob("*.yml"))
ACCELERATE = [path for path in FILES if path.parent.name == "accelerate_configs"]
TRAIN = [path for path in FILES if path not in ACCELERATE]
ARITHMETIC = [path for path in TRAIN if path.parent.name == "arithmetic"]
METHOD_KEYS = {
    *("method", "output_dir", "sign_gated_extrapolation", "lambda_base", "lambda_high", "stability_tau"),
    *("disagree_mode", "disagree_interp_beta", "teacher_model_name_or_path", "teacher_sampling_enable"),
    *("teacher_sampling_ratio", "teacher_sampling_phase1_end_frac", "teacher_sampling_phase2_end_frac"),
    *("loss_type", "delta", "weight_decay"),  # for GRPO, whose own defaults differ
}


def name(path):
    return str(path.relative_to(FOLDER))


def parse(path, *flags):
    """With `use_cpu`, because bfloat16 recipes are refused where there is no GPU."""
    return build_settings(read_command_line(["--config", str(path), "--use_cpu", "true", *flags]))


def test_all_recipes_are_found():
    assert len(ACCELERATE) >= 4
    assert {path.stem for path in ARITHMETIC} == {"opd", "exopd", "gate_only", "pts_only", "sg_opd", "grpo"}
    assert FOLDER / "Qwen3-1.7B" / "sg_opd" / "config_deepmath.yaml" in TRAIN


@pytest.mark.parametrize("path", TRAIN, ids=name)
def test_train_recipes_parse_strictly(path):
    settings = parse(path)
    assert settings.student
    assert settings.training.push_to_hub is False
    assert settings.training.max_steps > 0


@pytest.mark.parametrize("path", TRAIN, ids=name)
def test_a_misspelt_key_fails_with_the_right_one(path, tmp_path):
    copy = tmp_path / "copy.yaml"
    copy.write_text(path.read_text(encoding="utf-8").replace("max_steps:", "max_stepz:"), encoding="utf-8")
    with pytest.raises(SGOPDConfigError, match=r"`max_stepz`.*copy\.yaml.*`max_steps`"):
        parse(copy)


@pytest.mark.parametrize("path", TRAIN, ids=name)
def test_headers_say_what_how_and_where(path):
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    for start in ("# Paper: ", "# Launch: sg-opd train --config ", "# Hardware: ", "# Run time: "):
        assert f"\n{start}" in head
    assert f"--config recipes/{name(path)}" in head


@pytest.mark.parametrize("path", ARITHMETIC, ids=name)
def test_every_overridden_default_has_its_reason(path):
    text = path.read_text(encoding="utf-8")
    section = text.split("# Overrides of defaults")[1].split("\n\n")[0].splitlines()[1:]
    assert len(section) >= 8
    assert [line for line in section if not re.search(r"  # \S.{9,}", line)] == []


def test_arithmetic_recipes_differ_only_in_their_method():
    recipes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in ARITHMETIC]
    shared = [{key: value for key, value in recipe.items() if key not in METHOD_KEYS} for recipe in recipes]
    assert all(recipe == shared[0] for recipe in shared)
    assert len(shared[0]) > 15


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("opd", (False, 1.0, None, False)),
        ("exopd", (False, 1.25, None, False)),
        ("gate_only", (True, 1.0, 5.0, False)),
        ("pts_only", (False, 1.0, None, True)),
        ("sg_opd", (True, 1.0, 5.0, True)),
    ],
)
def test_methods_are_those_of_the_papers_rows(stem, expected):
    training = parse(FOLDER / "arithmetic" / f"{stem}.yaml").training
    assert (
        training.sign_gated_extrapolation,
        training.lambda_base,
        training.stability_tau,
        training.teacher_sampling_enable,
    ) == expected
    if training.sign_gated_extrapolation:
        assert (training.lambda_high, training.disagree_mode, training.disagree_interp_beta) == (1.8, "interp", 1.0)


def test_grpo_shares_the_objectives_constants():
    grpo = parse(FOLDER / "arithmetic" / "grpo.yaml").training
    opd = parse(FOLDER / "arithmetic" / "opd.yaml").training
    for field in ("loss_type", "delta", "epsilon", "weight_decay", "beta", "scale_rewards", "learning_rate"):
        assert getattr(grpo, field) == getattr(opd, field), field
    assert not hasattr(grpo, "lambda_high")


def test_the_paper_recipe_has_the_papers_batch_and_lengths():
    settings = parse(FOLDER / "Qwen3-1.7B" / "sg_opd" / "config_deepmath.yaml")
    training = settings.training
    # 1 trajectory x 128 accumulated x 8 GPUs = 1024 in one optimizer step = 128 prompts x 8
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == 1024
    assert training.num_generations == 8
    assert training.steps_per_generation == training.gradient_accumulation_steps
    assert (training.learning_rate, training.max_steps, training.lr_scheduler_type) == (1e-5, 100, "constant")
    assert training.vllm_max_model_length >= settings.script.max_prompt_tokens + training.max_completion_length + 1
    assert (training.max_completion_length, training.teacher_max_completion_length) == (16384, 14336)
    assert training.chat_template_kwargs == {"enable_thinking": False}
    assert settings.script.min_difficulty == 6


@pytest.mark.parametrize("path", ACCELERATE, ids=name)
def test_accelerate_configurations_load(path, tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes > 1
    assert config.distributed_type.value in {"MULTI_GPU", "FSDP", "DEEPSPEED"}
    words = launch_words(read_command_line(["--accelerate_config", path.stem]))
    assert words == ["--config_file", str(path)]


def test_the_index_lists_every_recipe():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name(path) for path in FILES if name(path) not in index] == []


def test_the_index_lists_what_env_may_set():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [variable for variable in sorted(ENV_WHITELIST) if f"`{variable}`" not in index] == []
