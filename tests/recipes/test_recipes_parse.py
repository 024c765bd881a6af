import re

import pytest
from recipe_files import (
    ACCELERATE,
    BUILTIN,
    FILES,
    FOLDER,
    ROOT,
    SCALES,
    STUDIES,
    TRAIN,
    header,
    index,
    load,
    name,
    of_scale,
    parse,
)
from repository import check_none

from sg_opd_trl.cli.launching import launch_words
from sg_opd_trl.cli.parsing import own_names, read_command_line
from sg_opd_trl.cli.recipes import ENV_WHITELIST, load_recipe
from sg_opd_trl.config import unused_settings
from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.study.spec import read_study

METHOD_KEYS = {
    *("method", "output_dir", "sign_gated_extrapolation", "lambda_base", "lambda_high", "stability_tau"),
    *("disagree_mode", "disagree_interp_beta", "disagree_cell_lambdas", "gate_signal", "wrong_rollout_advantage"),
    *("teacher_model_name_or_path", "teacher_model_init_kwargs", "teacher_sampling_enable", "teacher_sampling_ratio"),
    *("reference_model_name_or_path", "reference_model_init_kwargs", "teacher_sampling_time_separated"),
    *("teacher_sampling_phase1_end_frac", "teacher_sampling_phase2_end_frac", "teacher_sampling_filter_correct"),
    *("teacher_max_completion_length", "distillation_mode", "distillation_topk", "asymmetric_threshold"),
    *("iw_opd_gamma", "drift_gate_tau", "drift_gate_block", "num_iterations"),
    *("special_token_mask", "special_token_mask_scope", "top_p", "temperature"),
    *("loss_type", "delta", "weight_decay"),  # for TRL's own trainers, whose defaults differ
    *("lmbda", "beta", "max_new_tokens", "rollout_batch_size"),
}
# Values that all methods of a scale have, by name of the field; what a method's trainer lacks is passed over.
SHARED_FIELDS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "seed", "weight_decay"),
    *("max_completion_length", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim", "shuffle_dataset", "num_generations", "temperature"),
    *("bf16", "gradient_checkpointing", "chat_template_kwargs", "use_vllm"),
)
VLLM_FIELDS = ("vllm_max_model_length", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max")
# Keys in which a folder may differ from the others, because of its data or because of where its engines run.
OWN_KEYS = {
    "multi_teacher": {"dataset_name"},
    "servers": {
        *("vllm_mode", "vllm_server_base_url", "vllm_gpu_memory_utilization", "vllm_max_model_length"),
        *("teacher_model_server_url", "gate_dead_zone"),
    },
}


def test_all_recipes_are_found():
    assert len(ACCELERATE) >= 4
    assert {path.stem for path in of_scale("arithmetic")} >= {
        *("opd", "exopd", "gate_only", "pts_only", "sg_opd", "timesep", "random_gate", "fixed_negative"),
        *("grpo", "sft", "seqkd", "gkd", "topk_logits", "full_logits", "asymmetric", "iw_opd", "drift_gate"),
    }
    assert {path.stem for path in of_scale("chains")} >= {
        *("opd", "exopd", "uniform_1_8", "gate_only", "pts_only", "sg_opd", "random_gate", "fixed_negative"),
        *("grpo", "sft", "seqkd", "gkd"),
    }
    assert FOLDER / "Qwen3-1.7B" / "sg_opd" / "config_deepmath.yaml" in TRAIN
    assert sorted(TRAIN) == sorted(path for scale in SCALES for path in of_scale(scale))


def test_train_recipes_parse_strictly():
    offences = []
    for path in TRAIN:
        try:
            settings = parse(path)
        except SGOPDConfigError as error:
            offences.append(f"{name(path)}: {error}")
            continue
        if not (settings.student and settings.training.push_to_hub is False and settings.training.max_steps > 0):
            offences.append(f"{name(path)}: no student, no steps, or pushed to the hub")
    check_none(offences)


def test_a_misspelt_key_fails_with_the_right_one(tmp_path):
    for path in TRAIN:
        copy = tmp_path / name(path) / "copy.yaml"
        copy.parent.mkdir(parents=True)
        copy.write_text(path.read_text(encoding="utf-8").replace("max_steps:", "max_stepz:"), encoding="utf-8")
        with pytest.raises(SGOPDConfigError, match=r"`max_stepz`.*copy\.yaml.*`max_steps`"):
            parse(copy)


def test_headers_say_what_how_and_where():
    starts = ("# Paper: ", "# Launch: sg-opd train --config ", "# Hardware: ", "# Run time: ")
    offences = []
    for path in TRAIN:
        head = header(path)
        offences += [f"{name(path)}: no line {start!r}" for start in starts if f"\n{start}" not in head]
        # Every command of the header runs this file and no other.
        commands = set(re.findall(r"--config[ =](\S+)", head))
        if commands != {f"recipes/{name(path)}"}:
            offences.append(f"{name(path)}: runs {sorted(commands)}")
        if re.search(r"\b(TODO|RUNTIME)\b", head):
            offences.append(f"{name(path)}: an unfinished header")
    check_none(offences)


def test_every_overridden_default_has_its_reason():
    offences = []
    for path in BUILTIN:
        before, section = path.read_text(encoding="utf-8").split("# Overrides of defaults")
        lines = section.split("\n\n")[0].splitlines()[1:]
        if len(lines) < 8:
            offences.append(f"{name(path)}: {len(lines)} overridden defaults")
        first = before.count("\n") + 2
        for number, line in enumerate(lines, start=first):
            if not re.search(r"  # \S.{9,}", line):
                offences.append(f"{name(path)}:{number}: {line}")
    check_none(offences)


@pytest.mark.parametrize("scale", SCALES)
def test_recipes_of_a_scale_differ_only_in_their_method(scale):
    recipes = {path: load(path) for path in of_scale(scale)}
    shared = {path: without(recipe, METHOD_KEYS) for path, recipe in recipes.items()}
    everything = max((own for path, own in shared.items() if path.parent.name not in OWN_KEYS), key=len)
    assert len(everything) > 15
    for path, own in shared.items():
        allowed = OWN_KEYS.get(path.parent.name, set())
        known = own_names(recipes[path]["method"])
        expected = {key: value for key, value in everything.items() if key in known}
        assert without(own, allowed) == without(expected, allowed), name(path)
        assert own.keys() - allowed == expected.keys() - allowed, name(path)


def without(settings, keys):
    return {key: value for key, value in settings.items() if key not in keys}


@pytest.mark.parametrize("scale", SCALES)
def test_all_methods_of_a_scale_train_on_equal_terms(scale):
    paths = of_scale(scale)
    base = parse(next(path for path in paths if "sg_opd" in (path.stem, path.parent.name))).training
    for path in paths:
        training = parse(path).training
        with_vllm = VLLM_FIELDS if getattr(training, "use_vllm", False) else ()
        own = OWN_KEYS.get(path.parent.name, set())
        for field in (field for field in (*SHARED_FIELDS, *with_vllm) if field not in own):
            assert getattr(training, field, getattr(base, field)) == getattr(base, field), (name(path), field)
        assert getattr(training, "top_p", 1.0) == (0.9 if "topk_logits" in name(path) else 1.0)
        assert getattr(training, "num_iterations", 1) == (2 if "drift_gate" in name(path) else 1)


def test_no_setting_is_without_effect():
    own = [path for path in TRAIN if load(path)["method"] == "sg_opd"]
    assert len(own) > 40
    offences = []
    for path in own:
        offences += [
            f"{name(path)}: {key}" for key in sorted(set(keys_without_effect(load(path), parse(path).training)))
        ]
    check_none(offences)


def keys_without_effect(recipe, training):
    """Keys that stand in a recipe, or are missing from it, against what its other settings say."""
    gated = training.sign_gated_extrapolation
    yield from unused_settings(training)  # what a run would be warned about
    if not training.teacher_sampling_enable:
        yield from (key for key in recipe if key.startswith("teacher_sampling_") and key != "teacher_sampling_enable")
    odd = {
        "teacher_max_completion_length": not training.teacher_sampling_enable,
        **dict.fromkeys(("lambda_high", "disagree_mode", "disagree_interp_beta", "gate_signal"), not gated),
    }
    odd["lambda_high"] |= training.disagree_mode == "cells"
    odd["disagree_interp_beta"] |= training.disagree_mode not in ("interp", "interp_lambda")
    odd["distillation_topk"] = training.distillation_mode not in ("topk_logits", "asymmetric")
    odd["reference_model_name_or_path"] = not training.needs_reference
    yield from (key for key in odd if odd[key] and key in recipe)
    if ("disagree_cell_lambdas" in recipe) != (gated and training.disagree_mode == "cells"):
        yield "disagree_cell_lambdas"


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


def test_the_recipe_with_servers_is_the_papers_elsewhere():
    path = FOLDER / "Qwen3-1.7B" / "servers" / "config_deepmath.yaml"
    here = load(FOLDER / "Qwen3-1.7B" / "sg_opd" / "config_deepmath.yaml")
    own = OWN_KEYS["servers"] | {"output_dir"}
    assert without(load(path), own) == without(here, own)
    training = parse(path).training
    assert (training.vllm_mode, training.vllm_server_base_url) == ("server", "http://gpu-2:8000")
    assert training.teacher_model_server_url == "http://gpu-2:8001"
    assert f"--max_model_len {here['vllm_max_model_length']} --port 8000" in header(path)


@pytest.mark.parametrize("path", ACCELERATE, ids=name)
def test_accelerate_configurations_load(path, tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes > 1
    assert config.distributed_type.value in {"MULTI_GPU", "FSDP", "DEEPSPEED"}
    words = launch_words(read_command_line(["--accelerate_config", path.stem]))
    assert words == ["--config_file", str(path)]


@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_studies_are_valid_and_name_recipes_that_are_there(path):
    study = read_study(load_recipe(path), path)
    assert all(run.recipe.resolve() in TRAIN for run in study.runs.values())
    assert study.output_dir.resolve().is_relative_to(ROOT / "outputs")
    head = header(path)
    for start in (f"# Launch: sg-opd study recipes/{name(path)}", "# Hardware: ", "# Run time: "):
        assert f"\n{start}" in head


def test_the_index_lists_every_recipe():
    listed = index()
    assert [name(path) for path in FILES if name(path) not in listed] == []


def test_the_index_lists_what_env_may_set():
    listed = index()
    assert [variable for variable in sorted(ENV_WHITELIST) if f"`{variable}`" not in listed] == []
