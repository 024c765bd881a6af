"""What is written in a recipe or behind a flag, and what the run gets: the right value, or one message."""

import pytest
from trl import GRPOConfig

from sg_opd_trl.cli.parsing import build_settings, read_command_line
from sg_opd_trl.cli.recipes import apply_env, load_recipe
from sg_opd_trl.cli.values import as_field
from sg_opd_trl.errors import SGOPDConfigError

CPU = ["--use_cpu", "true", "--bf16", "false"]


@pytest.fixture
def read(tmp_path):
    """Settings of a recipe's text, and of flags."""

    def settings(text, *flags):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return build_settings(read_command_line(["--config", str(path), *CPU, *flags]))

    return settings


def refused(read, text, *flags):
    with pytest.raises(SGOPDConfigError) as error:
        read(text, *flags)
    return str(error.value)


# --- backslashes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "latex",
    [
        r"\boxed{}",
        r"\frac12",
        r"\alpha",
        r"\vec x",
        r"\epsilon",
        r"\right)",
        r"\Pi",
        r"\text{cm}",
        r"\theta_1",
        r"\times 2",
        r"\neq 0",
        r"\nabla f",
        r"\not=",
        r"\0",
        r"\_",
    ],
)
def test_latex_in_double_quotes_is_refused_with_the_way_out(read, latex):
    message = refused(read, f'instruction: "Put it in {latex}."')
    assert "`instruction` in recipe" in message
    assert "single quotes" in message
    assert f"instruction: 'Put it in {latex}.'" in message


@pytest.mark.parametrize("latex", [r"\sqrt2", r"\(x\)", r"\xi", r"\upsilon"])
def test_escapes_that_yaml_does_not_know_are_told_with_the_way_out(read, latex):
    assert "In single quotes a backslash is a backslash." in refused(read, f'instruction: "Use {latex}."')


@pytest.mark.parametrize("written", [r"'{}'", "{}", "|-\n  {}"])
def test_a_backslash_elsewhere_is_one(read, written):
    text = r"Put it in \boxed{}, \frac12 \text{cm}."
    assert read(f"instruction: {written.format(text)}").script.instruction == text


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r'"one\nTwo"', "one\nTwo"),
        (r'"a\tb"', "a\tb"),
        (r'"\\boxed{}"', r"\boxed{}"),
        (r'"\\times\n\\neq"', "\\times\n\\neq"),
        (r'"\u00e9\"q\""', 'é"q"'),
        (r'"line\nnext\nto"', "line\nnext\nto"),
    ],
)
def test_escapes_that_are_meant_are_read(read, written, text):
    assert read(f"system_prompt: {written}").script.system_prompt == text


def test_nested_texts_are_looked_through_too(read):
    message = refused(read, 'chat_template_kwargs: {notes: ["fine", "in \\boxed{}"]}')
    assert "`chat_template_kwargs.notes[1]`" in message
    message = refused(read, 'chat_template_kwargs: \'{"note": "in \\boxed{}"}\'')
    assert "`chat_template_kwargs`" in message
    assert "control character" in message


def test_a_text_that_goes_on_as_a_comment_is_refused(read):
    message = refused(read, "instruction: Give the answer after ####\n")
    assert "instruction: 'Give the answer after ####'" in message
    assert read("instruction: Give the answer  # a remark\n").script.instruction == "Give the answer"
    assert read("instruction: 'after ####'\n").script.instruction == "after ####"


# --- nothing ---------------------------------------------------------------------------------------------------------
NONE_ALLOWED = [
    *("instruction", "system_prompt", "hub_model_id", "min_difficulty", "stability_tau", "max_prompt_tokens"),
    *("lora_target_modules", "lr_scheduler_kwargs", "teacher_model_name_or_path", "dtype", "bf16", "answer_column"),
]


def value_of(settings, name):
    return settings.named()[name]


@pytest.mark.parametrize("word", ["None", "none", "'null'", "NULL", "null", "~"])
@pytest.mark.parametrize("name", NONE_ALLOWED)
def test_words_for_nothing_are_nothing(read, name, word):
    assert value_of(read(f"{name}: {word}"), name) in (None, False)  # False: transformers' own reading of `bf16: null`


@pytest.mark.parametrize("name", [name for name in NONE_ALLOWED if name != "bf16"])
def test_words_for_nothing_are_nothing_behind_flags(read, name):
    assert value_of(read("seed: 1", f"--{name}", "None"), name) is None


@pytest.mark.parametrize(
    "line", ["max_steps: None", "dataset_train_split: none", "reward_funcs: none", "seed: 'null'"]
)
def test_nothing_where_something_must_be_is_refused(read, line):
    message = refused(read, line)
    assert f"`{line.partition(':')[0]}`" in message
    assert "nothing" in message


@pytest.mark.parametrize(("written", "value"), [("null", []), ("none", []), ("[]", [])])
def test_no_tracker_is_no_tracker(read, written, value):
    assert read(f"report_to: {written}").training.report_to == value


@pytest.mark.parametrize("name", ["scale_rewards", "stability_norm", "teacher_sft_phi"])
def test_none_stays_a_word_where_it_is_one(read, name):
    assert value_of(read(f"{name}: none"), name) == "none"


def test_env_takes_no_word_for_nothing(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    apply_env({"env": {"WANDB_PROJECT": None}}, "r.yaml")
    apply_env({"env": {"WANDB_PROJECT": "None"}}, "r.yaml")
    import os

    assert "WANDB_PROJECT" not in os.environ
    with pytest.raises(SGOPDConfigError, match="single value"):
        apply_env({"env": {"WANDB_PROJECT": ["a"]}}, "r.yaml")


# --- numbers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("lr_scheduler_kwargs: {min_lr: 1e-6}", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ("lr_scheduler_kwargs: {min_lr: '1e-6'}", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ("generation_kwargs: {min_p: 5e-2, top_k: 3}", "generation_kwargs", {"min_p": 0.05, "top_k": 3}),
        ('generation_kwargs: \'{"min_p": "5e-2"}\'', "generation_kwargs", {"min_p": 0.05}),
        ("reward_weights: [1e-1]", "reward_weights", [0.1]),
        ("reward_weights: ['1e-1']", "reward_weights", [0.1]),
        ("disagree_cell_lambdas: [1, '2', 1.5e0, 1E0]", "disagree_cell_lambdas", [1, 2.0, 1.5, 1.0]),
        ("model_init_kwargs: {a: {b: [1e-3, -2E+2, .5e1]}}", "model_init_kwargs", {"a": {"b": [1e-3, -200.0, 5.0]}}),
        ("learning_rate: '1e-4'", "learning_rate", 1e-4),
        ("chat_template_kwargs: {year: '2026'}", "chat_template_kwargs", {"year": "2026"}),
        ("run_name: 2026", "run_name", "2026"),
        ("run_name: '1e5'", "run_name", "1e5"),
    ],
)
def test_numbers_are_numbers_and_texts_are_texts(read, line, name, value):
    found = value_of(read(f"{line}\nsign_gated_extrapolation: true\n"), name)
    assert found == value
    assert str(found).count("'") == str(value).count("'")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("model_revision: 1.10", "quotes"),  # 1.1 by now
        ("teacher_model_revision: 12e4567", "quotes"),
        ("run_name: 2026-11-28", "quotes"),
        ("teacher_model_revision: 0123456", "42798"),
        ("run_name: 12:30", "750"),
        ("instruction: yes", "quotes"),
        ("system_prompt: off", "quotes"),
        ("reward_weights: [fast]", "`reward_weights`"),
        ("lora_r: 1e1", "`lora_r`"),
    ],
)
def test_what_yaml_makes_of_a_text_is_told(read, line, named):
    message = refused(read, line)
    assert named in message
    assert "recipe" in message


# --- switches and lists ----------------------------------------------------------------------------------------------
def test_no_is_a_word_where_the_field_has_it(read):
    settings = read("save_strategy: no\neval_strategy: no\nlogging_strategy: no\ngradient_checkpointing: no\n")
    assert settings.training.save_strategy == "no"
    assert settings.training.eval_strategy == "no"
    assert settings.training.logging_strategy == "no"
    assert settings.training.gradient_checkpointing is False
    assert "`optim`" in refused(read, "optim: no")


@pytest.mark.parametrize("written", ["no", "'no'", "false"])
def test_no_mixed_precision_is_a_key_of_accelerate(tmp_path, written):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"mixed_precision: {written}\nnum_machines: none\n", encoding="utf-8")
    assert read_command_line(["--config", str(path)]).launch == {"mixed_precision": "no", "num_machines": None}


@pytest.mark.parametrize("written", ["q_proj,v_proj", "'q_proj, v_proj'", "[q_proj, v_proj]"])
def test_names_with_commas_are_a_list(read, written):
    assert read(f"lora_target_modules: {written}").model.lora_target_modules == ["q_proj", "v_proj"]


def test_names_with_commas_are_a_list_behind_flags(read):
    settings = read("seed: 1", "--lora_target_modules", "q_proj,v_proj", "--reward_funcs", "math_reward,a.b")
    assert settings.model.lora_target_modules == ["q_proj", "v_proj"]
    assert settings.script.reward_funcs == ["math_reward", "a.b"]
    pattern = r".*\.(q|v)_proj"
    assert read("seed: 1", "--lora_target_modules", pattern).model.lora_target_modules == pattern


def test_broken_json_names_its_setting(read):
    for flags in ([], ["--generation_kwargs", "{'top_p': 1}"]):
        message = refused(read, "seed: 1" if flags else "generation_kwargs: \"{'top_p': 1}\"", *flags)
        assert "generation_kwargs" in message
        assert "JSON" in message


# --- keys ------------------------------------------------------------------------------------------------------------
def test_merge_keys_take_in_another_mapping(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("<<: {seed: 3, max_steps: 5}\nmax_steps: 7\n", encoding="utf-8")
    assert load_recipe(path) == {"seed": 3, "max_steps": 7}
    path.write_text("<<: {seed: 3}\n<<: {seed: 4}\n", encoding="utf-8")
    with pytest.raises(SGOPDConfigError, match="`<<` is set twice"):
        load_recipe(path)
    path.write_text("<<: [{seed: 3}, {seed: 4, max_steps: 2}]\n", encoding="utf-8")
    assert load_recipe(path) == {"seed": 3, "max_steps": 2}


FOREIGN = {
    "dataset_prompt_column": "`question_column`",
    "torch_dtype": "`dtype`",
    "distributed_type": "`accelerate_config`",
    "max_prompt_length": "`max_prompt_tokens`",
    "logging_dir": "TENSORBOARD_LOGGING_DIR",
    "warmup_ratio": "`warmup_steps`",
    "evaluation_strategy": "`eval_strategy`",
    "wandb_project": "env: {WANDB_PROJECT: ...}",
    "cosine_min_value_wrong": "`reward_funcs`",
    "hub_model_revision": "`hub_revision`",
    "max_stepz": "`max_steps`",
}


def test_keys_of_other_recipes_get_right_hints_all_at_once(read):
    message = refused(read, "".join(f"{key}: 1\n" for key in FOREIGN))
    lines = {line.split("`")[1]: line for line in message.splitlines() if line.startswith("Unknown key")}
    assert set(lines) == set(FOREIGN)
    for key, hint in FOREIGN.items():
        assert hint in lines[key].partition(" in recipe ")[2], lines[key]


OPEN_R1 = """\
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
torch_dtype: bfloat16
dataset_name: open-r1/OpenR1-Math-220k
dataset_prompt_column: problem
system_prompt: "You are a helpful assistant.\\n<think>\\n...\\n</think>"
gradient_checkpointing_kwargs:
  use_reentrant: false
learning_rate: 1.0e-06
lr_scheduler_kwargs:
  min_lr_rate: 0.1
max_prompt_length: 512
num_generations: 16
overwrite_output_dir: true
push_to_hub_revision: true
report_to:
- wandb
reward_weights:
- 1.0
save_strategy: "epoch"
vllm_device: auto
warmup_ratio: 0.1
"""


def test_a_whole_recipe_of_open_r1_says_what_to_change_at_once(read):
    message = refused(read, OPEN_R1)
    named = [line.split("`")[1] for line in message.splitlines() if line.startswith("Unknown key")]
    assert named == [
        *("torch_dtype", "dataset_prompt_column", "max_prompt_length"),
        *("push_to_hub_revision", "vllm_device", "warmup_ratio"),
    ]
    assert "Did you mean" not in message


def test_unknown_flags_are_told_all_at_once():
    with pytest.raises(SGOPDConfigError) as error:
        read_command_line(["--torch_dtype", "bfloat16", "--max_stepz=3", "--dataset-prompt-column", "problem"])
    assert [name in str(error.value) for name in ("`dtype`", "`max_steps`", "`question_column`")] == 3 * [True]


def test_wrong_values_are_told_all_at_once(read):
    message = refused(read, "max_steps: [1]\nlearning_rate: fast\ninstruction: yes\n")
    assert [f"`{name}`" in message for name in ("max_steps", "learning_rate", "instruction")] == 3 * [True]


# --- the rule itself -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hint", "value", "found"),
    [
        (float | None, 3, 3),
        (int, 3, 3),
        (bool | None, None, None),
        (str | bool, False, False),
        (dict | str | None, {"a": "None"}, {"a": None}),
        (list[str] | None, ["a", "b"], ["a", "b"]),
        (list[int], ["3"], [3]),
    ],
)
def test_a_value_is_read_by_its_type(hint, value, found):
    assert as_field("name", hint, value) == found


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, True),
        (float, "none"),
        (int, 3.0),
        (str, 3.0),
        (str, True),
        (bool, 3),
        (dict | None, [1]),
        (list[int], [[1]]),
    ],
)
def test_a_value_of_another_type_is_refused(hint, value):
    with pytest.raises(ValueError, match="must"):
        as_field("name", hint, value)


def test_defaults_of_the_library_stay(read):
    settings = read("seed: 7\noutput_dir: somewhere\n").training
    plain = GRPOConfig(output_dir="somewhere", use_cpu=True, bf16=False, report_to="none")
    for name in ("save_strategy", "eval_strategy", "report_to", "scale_rewards", "lr_scheduler_kwargs"):
        assert getattr(settings, name) == getattr(plain, name), name
