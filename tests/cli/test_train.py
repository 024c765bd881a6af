import copy
import json

import pytest
import torch
from datasets import Dataset
from tiny import changed_weights, copied_weights, parity_verifier
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback
from trl import GRPOTrainer

from sg_opd_trl.cli import main
from sg_opd_trl.cli.parsing import build_settings, read_command_line
from sg_opd_trl.cli.rewards import load_reward_funcs
from sg_opd_trl.cli.train import all_settings, build_trainer, resolve_names
from sg_opd_trl.errors import DataError, SGOPDConfigError
from sg_opd_trl.reporting.progress import CompactProgressCallback
from sg_opd_trl.trainer import SGOPDTrainer
from sg_opd_trl.verifiers import exact_match_reward, math_reward


def settings(recipe, *flags):
    return build_settings(read_command_line(["--config", str(recipe), *flags]))


def test_a_recipe_becomes_a_saved_student_with_logs_and_report(tiny, tiny_recipe, tmp_path):
    assert main(["train", "--config", str(tiny_recipe)]) == 0
    folder = tmp_path / "student"
    before = AutoModelForCausalLM.from_pretrained(tiny.student).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    history = json.loads((folder / "log_history.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in history if "gate/neutral" in entry] == [1, 2]
    assert "lambda_high" not in (folder / "report.html").read_text(encoding="utf-8")


def test_grpo_runs_trls_trainer_and_the_report_can_be_left_out(tiny_recipe, tmp_path):
    text = tiny_recipe.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("teacher_model")]
    tiny_recipe.write_text("\n".join(["method: grpo", *lines]), encoding="utf-8")
    assert main(["train", "--config", str(tiny_recipe), "--report", "false", "--max_steps", "1"]) == 0
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert not (tmp_path / "student" / "report.html").exists()
    history = json.loads((tmp_path / "student" / "log_history.json").read_text(encoding="utf-8"))
    assert not any(key.startswith("gate/") for entry in history for key in entry)


def four_rows():
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": "1+1="}]] * 4, "solution": ["2"] * 4})


def built(recipe, *flags):
    return build_trainer(settings(recipe, *flags), [math_reward], four_rows(), None)


def test_the_method_chooses_the_trainer_and_the_bar_replaces_transformers_own(tiny_recipe):
    trainer = built(tiny_recipe, "--disable_tqdm", "false")
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert isinstance(trainer, SGOPDTrainer)
    assert CompactProgressCallback in kinds
    assert ProgressCallback not in kinds


def test_without_tqdm_there_is_no_bar(tiny_recipe):
    kinds = [type(callback) for callback in built(tiny_recipe).callback_handler.callbacks]
    assert CompactProgressCallback not in kinds


def test_grpo_trains_exactly_as_trls_class(tiny, tiny_recipe, tmp_path):
    lines = tiny_recipe.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith("teacher_model")]
    tiny_recipe.write_text("\n".join(["method: grpo", *kept]), encoding="utf-8")
    run, rows = settings(tiny_recipe), four_rows()
    ours = build_trainer(run, [parity_verifier], rows, None)
    start = copied_weights(ours.model)
    ours.train()
    args = copy.copy(ours.args)
    args.output_dir = str(tmp_path / "theirs")
    theirs = GRPOTrainer(str(tiny.student), [parity_verifier], args, train_dataset=rows)
    theirs.train()
    assert changed_weights(ours.model, start) != []
    assert changed_weights(ours.model, copied_weights(theirs.model)) == []


def test_lora_is_taken_from_the_recipe(tiny_recipe):
    pytest.importorskip("peft")
    trainer = built(tiny_recipe, "--use_peft", "true", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj")
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_dtype_of_the_recipe_reaches_the_student(tiny_recipe):
    assert built(tiny_recipe, "--dtype", "bfloat16").model.dtype == torch.bfloat16


def test_builtin_names_are_resolved_everywhere(tiny_recipe, monkeypatch):
    monkeypatch.setattr("sg_opd_trl.tasks.resolve", lambda name: name.replace("builtin/", "/cache/"))
    run = settings(
        tiny_recipe,
        *("--model_name_or_path", "builtin/s", "--teacher_model_name_or_path", "builtin/t"),
        *("--reference_model_name_or_path", "builtin/r", "--dataset_name", "builtin/d"),
    )
    resolve_names(run)
    assert (run.model.model_name_or_path, run.script.dataset_name) == ("/cache/s", "/cache/d")
    assert run.training.teacher_model_name_or_path == "/cache/t"
    assert run.training.reference_model_name_or_path == "/cache/r"


def test_reports_get_plain_settings_without_tokens(tiny_recipe):
    values = all_settings(settings(tiny_recipe, "--hub_token", "secret", "--lambda_high", "2"))
    assert values["lambda_high"] == 2.0
    assert "secret" not in json.dumps(values, default=str)
    assert "method" not in values  # at its default


def test_a_missing_data_set_and_split_are_errors_of_the_package(tiny_recipe, capsys):
    assert main(["train", "--config", str(tiny_recipe), "--dataset_name", "/absent/folder"]) == 2
    assert "`dataset_name` must be" in capsys.readouterr().err
    assert main(["train", "--config", str(tiny_recipe), "--dataset_train_split", "trian"]) == 2
    assert "Did you mean `train`?" in capsys.readouterr().err


def test_reward_functions_by_name_and_by_path(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text("def zero(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    functions = load_reward_funcs(["math_reward", "exact_match_reward", "own_rewards.zero"])
    assert functions[:2] == [math_reward, exact_match_reward]
    assert functions[2](["a", "b"]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("maths_reward", "`math_reward`"),
        ("absent_module.reward", "absent_module"),
        ("sg_opd_trl.verifiers.absent", "absent"),
        ("sg_opd_trl.cli.rewards.BUILTIN", "tuple"),
    ],
)
def test_reward_functions_that_do_not_exist_are_refused(name, said):
    with pytest.raises(SGOPDConfigError, match=said):
        load_reward_funcs([name])


def test_evaluation_rows_are_limited_and_prompts_filtered(tiny, tiny_recipe):
    from sg_opd_trl.cli.loading import load_training_data

    run = settings(
        tiny_recipe,
        *("--eval_strategy", "steps", "--eval_steps", "1", "--eval_samples", "3", "--per_device_eval_batch_size", "2"),
    )
    train, test = load_training_data(run, [math_reward], None)
    assert (len(train), len(test)) == (12, 3)
    tokenizer = AutoTokenizer.from_pretrained(tiny.student)
    run.script.max_prompt_tokens = 1
    with pytest.raises(DataError, match="`max_prompt_tokens` must leave rows"):
        load_training_data(run, [math_reward], tokenizer)


def test_data_sets_are_loaded_from_files_folders_and_saved_data_sets(tiny, tmp_path):
    from datasets import Dataset, DatasetDict

    from sg_opd_trl.cli.loading import load_splits

    rows = Dataset.from_dict({"prompt": ["a", "b"], "solution": ["1", "2"]})
    rows.to_json(tmp_path / "rows.jsonl")
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": rows, "dev": rows}).save_to_disk(str(tmp_path / "two"))
    assert load_splits(str(tmp_path / "rows.jsonl"))["train"].to_list() == rows.to_list()
    assert load_splits(str(tmp_path / "one"))["train"].to_list() == rows.to_list()
    assert set(load_splits(str(tmp_path / "two"))) == {"train", "dev"}
    assert set(load_splits(tiny.data)) == {"train", "test", "tune"}
    streamed = load_splits(str(tmp_path / "rows.jsonl"), streaming=True)["train"]
    assert list(streamed) == rows.to_list()
    with pytest.raises(DataError, match="`dataset_name`"):
        load_splits(str(tmp_path / "absent"))


@pytest.mark.slow
def test_two_processes_train_and_one_of_them_writes(tiny_recipe, tmp_path):
    assert main(["train", "--config", str(tiny_recipe), "--accelerate_config", "cpu2"]) == 0
    history = json.loads((tmp_path / "student" / "log_history.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in history if "gate/neutral" in entry] == [1, 2]
    # A single process would have been refused: cpu2 asks for two.
    assert (tmp_path / "student" / "model.safetensors").is_file()
