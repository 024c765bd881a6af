"""`sg-opd train` with TRL's own trainers: one recipe, one output folder, one account of the costs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sg_opd_trl.cli import main
from sg_opd_trl.cli.parsing import build_settings, read_command_line
from sg_opd_trl.errors import SGOPDConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*trl.experimental.*")

FACTS = {"method", "seed", "steps", "seconds", "state", "identity"} | {
    f"teacher_tokens_{name}" for name in ("scored", "generated", "reused")
}


@pytest.fixture
def recipe_of(tiny_recipe: Path):
    """The tiny recipe with the keys of a method."""
    lines = tiny_recipe.read_text(encoding="utf-8").splitlines()

    def write(method: str, *more: str) -> Path:
        dropped = {
            "sg_opd": (),
            "grpo": ("teacher_model",),
            "sft": (),
            "seqkd": ("num_generations",),
            "gkd": ("max_completion_length",),
        }[method]
        kept = [line for line in lines if not line.startswith(dropped or ("#",))]
        # The tiny teacher is untrained: nothing that it writes is right.
        own = {"sft": ["teacher_sampling_filter_correct: false"], "gkd": ["max_new_tokens: 8"]}
        own["grpo"] = ["weight_decay: 0.1"]  # no group of so few rollouts has a variance
        own["seqkd"] = own["sft"]
        path = tiny_recipe.with_name(f"{method}.yaml")
        path.write_text("\n".join([f"method: {method}", *kept, *own.get(method, []), *more]), encoding="utf-8")
        return path

    return write


def facts(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", ["sg_opd", "grpo", "sft", "seqkd", "gkd"])
def test_every_method_leaves_the_same_files(method, recipe_of, tiny, tmp_path):
    assert main(["train", "--config", str(recipe_of(method))]) == 0
    folder = tmp_path / "student"
    before = AutoModelForCausalLM.from_pretrained(tiny.student).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert {"README.md", "log_history.json", "report.html", "run.json"} <= {path.name for path in folder.iterdir()}
    history = json.loads((folder / "log_history.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in history if "grad_norm" in entry] == [1, 2]
    run = facts(folder)
    assert run.keys() == FACTS
    assert (run["method"], run["seed"], run["steps"]) == (method, 42, 2)
    assert run["seconds"] > 0
    assert (run["teacher_tokens_scored"] > 0) == (method in ("sg_opd", "gkd"))
    # With two steps phase 1 is over before the first.
    assert (run["teacher_tokens_generated"] > 0) == (method in ("sft", "seqkd"))


def test_the_student_of_a_baseline_is_evaluated_like_any_other(recipe_of, tiny, tmp_path):
    assert main(["train", "--config", str(recipe_of("gkd")), "--max_steps", "1"]) == 0
    output = tmp_path / "result.json"
    words = ["--model", str(tmp_path / "student"), "--dataset_name", tiny.data, "--output", str(output)]
    assert main(["evaluate", *words, "--num_samples", "1", "--max_new_tokens", "4"]) == 0
    assert json.loads(output.read_text(encoding="utf-8"))["num_problems"] == 6


def test_a_second_run_reuses_the_teachers_rollouts(recipe_of, tmp_path):
    path = str(recipe_of("sft"))
    assert main(["train", "--config", path]) == 0
    first = facts(tmp_path / "student")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    assert main(["train", "--config", path, "--overwrite_output_dir", "true"]) == 0
    second = facts(tmp_path / "student")
    assert (second["teacher_tokens_generated"], first["teacher_tokens_reused"]) == (0, 0)
    assert second["teacher_tokens_reused"] == first["teacher_tokens_generated"] > 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sg_opd", "grpo", "sft", "seqkd", "gkd"])
def test_a_resumed_run_ends_as_an_uninterrupted_one_and_adds_up_its_costs(method, recipe_of, tmp_path):
    words = ["train", "--config", str(recipe_of(method)), "--save_strategy", "steps", "--save_steps", "1"]
    whole = ["--max_steps", "2", "--output_dir", str(tmp_path / "whole")]
    assert main([*words, *whole]) == 0
    # What a kill after the first step leaves behind: its checkpoint, and rollouts where there are any.
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    (tmp_path / "whole" / "checkpoint-1").rename(resumed / "checkpoint-1")
    half = json.loads((resumed / "checkpoint-1" / "run.json").read_text(encoding="utf-8"))
    for file in (tmp_path / "whole").glob("*.jsonl"):
        (resumed / file.name).write_bytes(file.read_bytes())
    assert main([*words, "--max_steps", "2", "--output_dir", str(resumed), "--resume_from_checkpoint", "true"]) == 0
    left, right = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("whole", "resumed"))
    assert all(torch.equal(left[name], right[name]) for name in left)
    expected, found = facts(tmp_path / "whole"), facts(resumed)
    assert half["steps"] == 1
    assert (tmp_path / "whole" / "checkpoint-2" / "manifest.json").read_text(encoding="utf-8").count('"run.json"') == 1
    assert found.pop("seconds") > half["seconds"]
    expected.pop("seconds")
    assert found == expected


def test_keys_of_other_methods_are_refused_with_the_nearest(recipe_of):
    for method, line, nearest in (
        ("sft", "lambda_high: 2", "lambda_high"),
        ("sft", "max_new_tokens: 3", "num_generations|max_"),
        ("seqkd", "num_generations: 2", "num_generations"),
        ("gkd", "max_completion_length: 3", "max_"),
        ("gkd", "lmda: 1", "lmbda"),
    ):
        with pytest.raises(SGOPDConfigError, match=nearest):
            read_command_line(["--config", str(recipe_of(method, line))])


def test_methods_have_their_own_configuration(recipe_of):
    from trl import SFTConfig
    from trl.experimental.gkd import GKDConfig

    for method, kind in (("sft", SFTConfig), ("seqkd", SFTConfig), ("gkd", GKDConfig)):
        run = build_settings(read_command_line(["--config", str(recipe_of(method))]))
        assert isinstance(run.training, kind)
        assert run.training.max_completion_length == 8


def test_reports_of_a_baseline_show_what_was_set(recipe_of):
    from sg_opd_trl.cli.train import all_settings

    values = all_settings(build_settings(read_command_line(["--config", str(recipe_of("sft"))])))
    assert values["method"] == "sft"
    assert values["teacher_sampling_filter_correct"] is False
    assert not {"packing", "dataset_text_field", "truncation_mode", "rollout_batch_size"} & values.keys()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "gkd"])
def test_two_processes_write_the_same_rollouts_and_one_account(method, recipe_of, tmp_path):
    path = str(recipe_of(method))
    small = ["--per_device_train_batch_size", "2", "--accelerate_config", "cpu2"]
    assert main(["train", "--config", path, *small, "--output_dir", str(tmp_path / "two")]) == 0
    two = facts(tmp_path / "two")
    assert two["steps"] == 2
    if method == "sft":
        assert main(["train", "--config", path, "--output_dir", str(tmp_path / "one")]) == 0
        assert two["teacher_tokens_generated"] == facts(tmp_path / "one")["teacher_tokens_generated"]
        one, other = ((tmp_path / n / "teacher_rollouts.jsonl").read_text(encoding="utf-8") for n in ("one", "two"))
        assert one == other
        left, right = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("one", "two"))
        assert all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)
    else:
        assert two["teacher_tokens_scored"] > 8


@pytest.mark.slow
def test_stage_one_of_timesep_is_the_same_on_two_processes(recipe_of, tmp_path):
    """One teacher rollout in each step: the second process has none, and takes part all the same."""
    separated = [
        *("--teacher_sampling_time_separated", "true", "--teacher_sampling_filter_correct", "false"),
        *("--teacher_sampling_phase1_end_frac", "1.0", "--teacher_sampling_phase2_end_frac", "1.0"),
    ]
    words = ["train", "--config", str(recipe_of("sg_opd")), *separated]
    assert main([*words, "--output_dir", str(tmp_path / "one")]) == 0
    two = ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2"]
    assert main([*words, *two, "--accelerate_config", "cpu2"]) == 0
    assert facts(tmp_path / "one")["teacher_tokens_generated"] == facts(tmp_path / "two")["teacher_tokens_generated"]
    assert facts(tmp_path / "two")["teacher_tokens_scored"] == 0
    left, right = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("one", "two"))
    assert all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)


@pytest.mark.parametrize("method", ["sg_opd", "grpo", "sft", "gkd"])
def test_an_adapter_as_student(method, recipe_of, tiny, tmp_path, capsys):
    """What a LoRA run saves is trained on by sg_opd; TRL's own trainers load full models alone."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    adapter = tmp_path / "adapter"
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.student), config).save_pretrained(adapter)
    AutoTokenizer.from_pretrained(tiny.student).save_pretrained(adapter)
    status = main(["train", "--config", str(recipe_of(method)), "--model_name_or_path", str(adapter)])
    if method == "sg_opd":
        assert status == 0
        assert (tmp_path / "student" / "adapter_model.safetensors").is_file()
    else:
        assert status == 2
        said = f"`model_name_or_path` must be a full model with `method: {method}`, got the adapter"
        assert said in " ".join(capsys.readouterr().err.split())
