"""Careless invocations: each ends with status 2 and one message that names the setting, never in a traceback."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from sg_opd_trl.cli import main
from sg_opd_trl.errors import SGOPDConfigError

OFFLINE_ID = "nobody-here/no-such-model"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def broken(tiny, tmp_path):
    """Makes a model folder that is broken in one way."""

    def make(kind):
        folder = tmp_path / kind
        shutil.copytree(tiny.student, folder)
        weights = folder / "model.safetensors"
        if kind == "no_weights":
            weights.unlink()
        elif kind == "cut_off":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        elif kind == "empty_weights":
            weights.write_bytes(b"")
        elif kind == "bad_config":
            (folder / "config.json").write_text('{"model_type": "lla', encoding="utf-8")
        elif kind == "unknown_type":
            (folder / "config.json").write_text('{"model_type": "no-such-type"}', encoding="utf-8")
        elif kind == "no_tokenizer":
            for path in folder.glob("tokenizer*"):
                path.unlink()
        elif kind == "empty_folder":
            shutil.rmtree(folder)
            folder.mkdir()
        return str(folder)

    return make


@pytest.fixture
def data(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def one_message(capsys, words, *named):
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    message = said[said.index("Error") :]
    assert "Traceback" not in said
    for name in named:
        assert name in message, message
    return message


def lines(*rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


# --- models ----------------------------------------------------------------------------------------------------------
MODELS = ("no_weights", "cut_off", "empty_weights", "bad_config", "unknown_type", "no_tokenizer", "empty_folder")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("setting", ["model_name_or_path", "teacher_model_name_or_path"])
def test_a_broken_model_of_train(tiny_recipe, broken, capsys, setting, kind):
    folder = broken(kind)
    one_message(capsys, ["train", "--config", tiny_recipe, f"--{setting}", folder], f"`{setting}`", folder)


@pytest.mark.parametrize("kind", MODELS)
def test_a_broken_model_of_evaluate(tiny, broken, capsys, kind):
    folder = broken(kind)
    words = ["evaluate", "--model", folder, "--dataset_name", tiny.data, "--num_samples", "1", "--limit", "1"]
    one_message(capsys, [*words, "--max_new_tokens", "2"], "`model`", folder)


@pytest.mark.parametrize("value", ["./nowhere", "/no/such/folder", OFFLINE_ID, "no-such-model"])
@pytest.mark.parametrize(
    "setting", ["model_name_or_path", "teacher_model_name_or_path", "reference_model_name_or_path"]
)
def test_a_model_that_is_not_there(tiny_recipe, capsys, setting, value):
    one_message(capsys, ["train", "--config", tiny_recipe, f"--{setting}", value], f"`{setting}`", value)


@pytest.mark.parametrize(
    ("method", "unknown"),
    [("grpo", ["teacher_"]), ("sft", ["num_generations"]), ("gkd", ["num_generations", "max_comp"])],
)
def test_a_student_of_a_baseline_that_is_not_there(tiny_recipe, capsys, method, unknown):
    kept = [
        line for line in tiny_recipe.read_text(encoding="utf-8").splitlines() if not line.startswith(tuple(unknown))
    ]
    tiny_recipe.write_text("\n".join(kept), encoding="utf-8")
    words = ["train", "--config", tiny_recipe, "--method", method, "--model_name_or_path", "./nowhere"]
    one_message(capsys, words, "`model_name_or_path`", "./nowhere")


def test_what_is_said_of_an_offline_hub_and_of_a_missing_folder(tiny_recipe, capsys):
    words = ["train", "--config", tiny_recipe, "--model_name_or_path"]
    assert "hf download" in one_message(capsys, [*words, OFFLINE_ID])
    assert "no such file or folder" in one_message(capsys, [*words, "./nowhere"])


# --- settings of train -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--learning_rate", "-1"], ["`learning_rate`", "-1"]),
        (["--seed", "-1"], ["`seed`", "-1"]),
        (["--seed", "abc"], ["--seed", "'abc'"]),
        (["--per_device_train_batch_size", "0"], ["`per_device_train_batch_size`", "0"]),
        (["--gradient_accumulation_steps", "0"], ["`gradient_accumulation_steps`", "0"]),
        (["--max_completion_length", "0"], ["`max_completion_length`", "0"]),
        (["--num_train_epochs", "-1"], ["`num_train_epochs`", "-1"]),
        (["--lora_r", "0"], ["`lora_r`", "0"]),
        (["--save_steps", "0"], ["`save_steps`", "0"]),
        (["--eval_strategy", "steps", "--eval_steps", "0"], ["`eval_steps`", "0"]),
        (["--teacher_model_name_or_path", "[]"], ["`teacher_model_name_or_path`", "[]"]),
        (["--generation_kwargs", '{"top_p": 3}'], ["`generation_kwargs`", "top_p=3"]),
        (["--report_to", "wandbb"], ["`report_to`", "'wandbb'", "`wandb`"]),
        (["--report_to", "neptune"], ["`report_to`", "'neptune'", "installed"]),
        (["--push_to_hub", "true", "--hub_model_id", "my run (1)"], ["`hub_model_id`", "my run (1)"]),
        (["--resume_from_checkpoint", "./nowhere"], ["`resume_from_checkpoint`", "./nowhere"]),
        (["--allow_changed", "learning_rat"], ["`allow_changed`", "'learning_rat'", "`learning_rate`"]),
        (["--use_peft", "--lora_target_modules", "no_such_module"], ["`lora_target_modules`", "no_such_module"]),
        (["--optim_args", "nope"], ["`optim_args`", "name=value"]),
        (["--fsdp", "full_shard"], ["`fsdp`", "distributed"]),
        (["--resume_from_checkpoint", "."], ["`resume_from_checkpoint`", "'.'"]),
        (["--reward_weights", "1", "2"], ["`reward_weights`"]),
        (["--model_init_kwargs", '{"no_such": 3}'], ["`model_init_kwargs`", "no_such"]),
        (
            ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"no_such": 3}'],
            ["`lr_scheduler_kwargs`", "no_such"],
        ),
        (["--attn_implementation", "flash_attention_2"], ["`attn_implementation`"]),
        (["--attn_implementation", "no_such_attention"], ["`attn_implementation`"]),
        (["--lr_scheduler_type", "cosin"], ["lr_scheduler_type", "cosin"]),
        (["--optim", "adam"], ["optim", "adam"]),
        (["--dtype", "float31"], ["--dtype", "float31"]),
        (["--save_strategy", "sometimes"], ["save_strategy", "sometimes"]),
        (["--generation_kwargs", "{'top_p': 1}"], ["generation_kwargs", "JSON"]),
        (["--lr_scheduler_kwargs", "{broken"], ["lr_scheduler_kwargs", "JSON"]),
        (["--reward_funcs", "math_rewardd"], ["`reward_funcs`", "`math_reward`"]),
        (["--reward_funcs", "no_such_module.reward"], ["`reward_funcs`", "no_such_module"]),
        (["--method", "sgopd"], ["`method`", "`sg_opd`"]),
        (["--accelerate_config", "zero7"], ["`accelerate_config`", "zero7"]),
        (["--num_processes", "two"], ["num_processes", "two"]),
        (["--mixed_precision", "bf61"], ["mixed_precision", "bf61"]),
        (["--dataset_name", "./nowhere.jsonl"], ["`dataset_name`", "./nowhere.jsonl"]),
        (["--dataset_name", OFFLINE_ID], ["`dataset_name`", OFFLINE_ID]),
        (["--dataset_train_split", "trian"], ["`dataset_train_split`", "`train`"]),
        (["--question_column", "problm"], ["`question_column`", "problm"]),
        (["--answer_column", "gold"], ["`answer_column`", "gold"]),
        (["--max_prompt_tokens", "1"], ["`max_prompt_tokens`", "none of"]),
        (["--config"], ["--config"]),
        (["--config", "other.yaml"], ["--config"]),
        (["--model_revision", "None"], ["--model_revision", "nothing"]),
        (["--min_difficulty", "3"], ["`difficulty_column`"]),
        (["--instruction", "Put it in \boxed{}."], ["instruction", "control character"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_a_careless_flag_of_train(tiny_recipe, capsys, flags, named):
    one_message(capsys, ["train", "--config", tiny_recipe, *flags], *named)


def test_four_bits_without_bitsandbytes(tiny_recipe, capsys, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    one_message(capsys, ["train", "--config", tiny_recipe, "--use_peft", "--load_in_4bit", "true"], "`load_in_4bit`")


def test_recipes_that_cannot_be_read(tmp_path, capsys):
    binary, folder = tmp_path / "binary.yaml", tmp_path / "folder.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    folder.mkdir()
    for path in (tmp_path / "absent.yaml", folder, binary):
        one_message(capsys, ["train", "--config", path], str(path))


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("empty.jsonl", "", "`dataset_name`"),
        ("blank.jsonl", "\n\n", "`dataset_name`"),
        ("broken.jsonl", lines({"prompt": "1+1=", "solution": "2"}) + '{"prompt": "2+', "`dataset_name`"),
        ("broken.parquet", "PAR1", "`dataset_name`"),
        ("empty.csv", "", "`dataset_name`"),
        ("rows.csv", "prompt,solution\n", "dataset"),
        ("blank_rows.jsonl", lines({"prompt": "", "solution": "2"}), "`prompt`"),
        ("dict.jsonl", lines({"prompt": "1+1=", "solution": {"ground_truth": "2"}}), "solution.ground_truth"),
        ("several.jsonl", lines({"prompt": "1+1=", "solution": ["2", "3"]}), "`answer_column`"),
    ],
)  # fmt: skip
def test_data_files_that_cannot_be_used(tiny_recipe, data, capsys, name, text, named):
    path = data(name, text)
    one_message(capsys, ["train", "--config", tiny_recipe, "--dataset_name", path], named)


# --- where results go ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("below", ["", "/student"])
@pytest.mark.parametrize("command", ["train", "demo"])
def test_an_output_folder_that_is_a_file(tiny_recipe, tmp_path, capsys, command, below):
    path = tmp_path / "taken"
    path.write_text("here", encoding="utf-8")
    recipe = ["--recipe" if command == "demo" else "--config", tiny_recipe]
    one_message(capsys, [command, *recipe, "--output_dir", f"{path}{below}"], "`output_dir`", "taken")


def test_an_output_folder_that_may_not_be_written(tiny_recipe, tmp_path, capsys, monkeypatch):
    def refuse(**settings):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr("sg_opd_trl.files.tempfile.TemporaryFile", refuse)
    one_message(capsys, ["train", "--config", tiny_recipe], "`output_dir`", "Permission denied")


@pytest.mark.parametrize("where", ["checkpoint", "end"])
def test_a_disk_that_is_full(tiny_recipe, capsys, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "end":
        monkeypatch.setattr("sg_opd_trl.trainer.SGOPDTrainer.save_model", full)
    else:
        monkeypatch.setattr("sg_opd_trl.trainer.SGOPDTrainer._save_checkpoint", full)
    words = ["train", "--config", tiny_recipe, "--save_strategy", "steps", "--save_steps", "1"]
    assert "full" in one_message(capsys, words, "`output_dir`")


def test_memory_that_is_out(tiny_recipe, capsys, monkeypatch):
    import torch

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("sg_opd_trl.trainer.SGOPDTrainer.training_step", fail)
    words = ["train", "--config", tiny_recipe]
    assert "gradient_accumulation_steps" in one_message(capsys, words, "`per_device_train_batch_size`", "4")


def fail_in(module, error):
    """A function that raises as if it were of another library's module."""
    scope = {"__name__": module, "error": error}
    exec("def fail(*args, **kwargs):\n    raise error", scope)
    return scope["fail"]


@pytest.mark.parametrize(
    ("module", "setting", "flags"),
    [
        ("wandb.sdk.wandb_login", "report_to", []),
        ("huggingface_hub.utils._http", "hub_model_id", ["--hub_model_id", "me/it"]),
        ("vllm.engine", "use_vllm", []),
    ],
)
def test_an_error_of_a_library_that_is_there_for_one_setting(tiny_recipe, capsys, monkeypatch, module, setting, flags):
    error = RuntimeError("No API key configured")
    monkeypatch.setattr("sg_opd_trl.trainer.SGOPDTrainer.train", fail_in(module, error))
    one_message(capsys, ["train", "--config", tiny_recipe, *flags], f"`{setting}`", "No API key configured")


def test_a_fault_of_the_package_keeps_its_traceback(tiny_recipe, monkeypatch):
    # Whatever words it has in it.
    error = RuntimeError("vllm, peft and wandb got bfloat16 where float32 was meant")
    monkeypatch.setattr("sg_opd_trl.trainer.SGOPDTrainer.train", fail_in("sg_opd_trl.trainer", error))
    with pytest.raises(RuntimeError, match="where float32 was meant"):
        main(["train", "--config", str(tiny_recipe)])


def test_files_of_launchers_that_cannot_be_read(tiny_recipe, tmp_path, capsys):
    words = ["train", "--config", tiny_recipe]
    one_message(capsys, [*words, "--deepspeed", "./nowhere.json"], "deepspeed")
    for name, text in (
        ("broken.yaml", "a: ["),
        ("strange.yaml", "no_such_key: 1\ncompute_environment: LOCAL_MACHINE\n"),
    ):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        one_message(capsys, [*words, "--accelerate_config", path], "`accelerate_config`", name)


def test_a_mixture_of_data_that_is_not_there(tiny_recipe, capsys):
    with tiny_recipe.open("a", encoding="utf-8") as file:
        file.write("datasets: [{path: ./nowhere}]\n")
    one_message(capsys, ["train", "--config", tiny_recipe], "`datasets`", "./nowhere")


def test_a_configuration_that_a_data_set_does_not_have(tiny_recipe, capsys):
    one_message(capsys, ["train", "--config", tiny_recipe, "--dataset_config", "nope"], "dataset_config", "nope")


# --- the other commands ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "./nowhere"], ["`model`", "./nowhere"]),
        (["--model", OFFLINE_ID], ["`model`", OFFLINE_ID]),
        (["--dataset_name", "./nowhere"], ["`dataset_name`", "./nowhere"]),
        (["--dataset_split", "tset"], ["`dataset_split`", "`test`"]),
        (["--seed", "-1"], ["`seed`", "-1"]),
        (["--output", "."], ["`output`", "folder"]),
        (["--samples_path", "."], ["`samples_path`", "folder"]),
        (["--chat_template_kwargs", "{broken"], ["chat_template_kwargs", "JSON"]),
        (["--num_samples", "0"], ["`num_samples`"]),
        (["--temperature", "-1"], ["`temperature`"]),
        (["--limit", "0"], ["`limit`"]),
        (["--reward_func", "no_such_module.f"], ["no_such_module"]),
        (["--dtype", "float31"], ["dtype", "float31"]),
        (["--revision", "none"], ["`revision`"]),
        (["--modle", "x"], ["`modle`", "`model`"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_careless_flag_of_evaluate(tiny, capsys, monkeypatch, flags, named):
    def never(*args, **kwargs):
        raise AssertionError("sampled before it was refused")

    monkeypatch.setattr("sg_opd_trl.evaluation.evaluate_model", never)
    words = ["evaluate", "--model", tiny.student, "--dataset_name", tiny.data, *flags]
    one_message(capsys, words, *named)


def test_memory_that_is_out_while_evaluating(tiny, capsys, monkeypatch):
    monkeypatch.setattr("sg_opd_trl.evaluation.evaluate_model", fail_in("torch.nn", MemoryError()))
    one_message(capsys, ["evaluate", "--model", tiny.student, "--dataset_name", tiny.data], "`batch_size`", "64")


def test_careless_teacher_rollouts_serving_and_studies(tiny_recipe, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("here", encoding="utf-8")
    one_message(capsys, ["teacher-rollouts", "--config", tiny_recipe], "`output`")
    one_message(capsys, ["teacher-rollouts", "--config", tiny_recipe, "--output", taken], "`output`", "taken")
    one_message(capsys, ["teacher-rollouts", "--config", "./nowhere.yaml"], "nowhere.yaml")
    one_message(capsys, ["serve-teacher", "--config", "./nowhere.yaml"], "nowhere.yaml")
    words = ["serve-teacher", "--config", tiny_recipe, "--print_only", "--replica", "7"]
    one_message(capsys, words, "`--replica`", "7")
    one_message(capsys, ["study", "./nowhere.yaml"], "nowhere.yaml")
    one_message(capsys, ["demo", "--recipe", "./nowhere.yaml"], "nowhere.yaml")


def test_debug_keeps_the_traceback_of_the_library(tiny_recipe):
    with pytest.raises(SGOPDConfigError, match="model_name_or_path") as error:
        main(["--debug", "train", "--config", str(tiny_recipe), "--model_name_or_path", "./nowhere"])
    assert isinstance(error.value.__cause__, OSError)


def test_a_module_of_rewards_that_fails_on_import(tiny_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("half_written_rewards.py").write_text("def reward(:\n", encoding="utf-8")
    words = ["train", "--config", tiny_recipe, "--reward_funcs", "half_written_rewards.reward"]
    one_message(capsys, words, "`reward_funcs`", "SyntaxError")
