import pytest
from trl import GRPOConfig

from sg_opd_trl.cli.parsing import build_settings, read_command_line
from sg_opd_trl.config import SGOPDConfig
from sg_opd_trl.errors import SGOPDConfigError

CPU = ["--use_cpu", "true"]


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def settings(*words):
    return build_settings(read_command_line([*words, *CPU]))


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(recipe):
    path = recipe("max_steps: 7\nlambda_high: 2.5\nlearning_rate: 2e-4\n")
    run = settings("--config", path, "--max_steps", "9")
    assert (run.training.max_steps, run.training.lambda_high, run.training.learning_rate) == (9, 2.5, 2e-4)
    assert run.training.num_generations == 8


@pytest.mark.parametrize("spelling", [["--config", "{}"], ["--config={}"]])
def test_config_is_found_in_both_spellings(recipe, spelling):
    path = recipe("max_steps: 7")
    assert settings(*[word.format(path) for word in spelling]).training.max_steps == 7


def test_hyphenated_flags_and_equals_signs_work():
    assert settings("--max-steps=4", "--lambda-high=1.5").training.max_steps == 4


def test_two_recipes_are_refused(recipe):
    path = recipe("seed: 1")
    with pytest.raises(SGOPDConfigError, match="given once"):
        read_command_line(["--config", path, f"--config={path}"])


def test_config_without_a_value_is_refused():
    with pytest.raises(SGOPDConfigError, match="--config"):
        read_command_line(["--max_steps", "1", "--config"])


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("max_stepz", "max_steps"),
        ("lamda_high", "lambda_high"),
        ("dataset_nam", "dataset_name"),
        ("num_proceses", "num_processes"),
        ("lora_alfa", "lora_alpha"),
    ],
)
def test_unknown_keys_name_the_nearest_field_and_the_file(recipe, key, nearest):
    path = recipe(f"{key}: 1\n")
    with pytest.raises(SGOPDConfigError) as error:
        read_command_line(["--config", path])
    assert f"`{key}`" in str(error.value)
    assert f"`{nearest}`" in str(error.value)
    assert path in str(error.value)
    for words in ([f"--{key}", "1"], [f"--{key}=1"]):
        with pytest.raises(SGOPDConfigError, match=f"`{key}`.*command line.*`{nearest}`"):
            read_command_line(words)


def test_abbreviations_are_unknown_keys():
    with pytest.raises(SGOPDConfigError, match=r"`max_step`.*`max_steps`"):
        read_command_line(["--max_step", "3"])


def test_stray_words_are_refused():
    with pytest.raises(SGOPDConfigError, match="`recipe"):
        read_command_line(["recipe.yaml"])


def test_method_chooses_the_configuration():
    assert isinstance(settings("--method", "sg_opd").training, SGOPDConfig)
    grpo = settings("--method", "grpo").training
    assert isinstance(grpo, GRPOConfig)
    assert not isinstance(grpo, SGOPDConfig)
    with pytest.raises(SGOPDConfigError, match=r"'gropo'.*`grpo`"):
        settings("--method", "gropo")


def test_with_grpo_the_keys_of_sg_opd_are_refused_in_recipe_and_flags(recipe):
    path = recipe("method: grpo\nlambda_high: 1.8\n")
    with pytest.raises(SGOPDConfigError, match=r"`lambda_high`.*must not be set with `method: grpo`"):
        read_command_line(["--config", path])
    with pytest.raises(SGOPDConfigError, match="must not be set with `method: grpo`"):
        read_command_line(["--method", "grpo", "--teacher_model_name_or_path", "x"])


def test_the_flag_for_the_method_wins_over_the_recipe(recipe):
    path = recipe("method: grpo\nmax_steps: 2\n")
    assert isinstance(settings("--config", path, "--method", "sg_opd").training, SGOPDConfig)


@pytest.mark.parametrize(
    "line",
    [
        "num_generations: [8]",
        "num_generations: 8.5",
        "max_steps: true",
        "learning_rate: [1]",
        "learning_rate: fast",
        "dtype: float31",
        "bf16: 3",
        "reward_funcs: 3",
        "model_init_kwargs: 3",
    ],
)
def test_values_of_the_wrong_type_are_refused_with_key_and_file(recipe, line):
    path = recipe(line)
    with pytest.raises(SGOPDConfigError) as error:
        read_command_line(["--config", path])
    assert f"`{line.split(':')[0]}`" in str(error.value)
    assert path in str(error.value)


def test_values_of_every_kind_arrive(recipe):
    path = recipe(
        "learning_rate: 1e-4\nstability_tau: null\nmodel_init_kwargs: {device_map: null}\nreward_funcs: math_reward\n"
        "lora_target_modules: all-linear\nwarmup_steps: 5\nreport: false\n"
        "chat_template_kwargs: {enable_thinking: false}\n"
        "disagree_cell_lambdas: [1, 2.0, 1, 1]\n"
    )
    run = settings("--config", path)
    assert run.training.learning_rate == 1e-4
    assert run.training.stability_tau is None
    assert run.training.model_init_kwargs == {"device_map": None}
    assert run.script.reward_funcs == ["math_reward"]
    assert run.model.lora_target_modules == "all-linear"
    assert run.script.report is False
    assert run.training.chat_template_kwargs == {"enable_thinking": False}


def test_unknown_keys_of_a_mixture_are_refused(recipe):
    for text in ("nope", "[nope]", "[{path: [1]}]", "[{split: train}]"):
        with pytest.raises(SGOPDConfigError, match=r"`datasets` in .* must be a list of mappings with a `path`"):
            build_settings(read_command_line(["--config", recipe(f"datasets: {text}\n")]))
    path = recipe("datasets:\n  - path: a\n    fractoin: 0.5\n")
    with pytest.raises(SGOPDConfigError, match=r"`fractoin`.*`fraction`"):
        read_command_line(["--config", path])


def test_wrong_flags_and_refused_combinations_are_errors_of_the_package():
    with pytest.raises(SGOPDConfigError, match="invalid int value: 'three'"):
        settings("--max_steps", "three")
    with pytest.raises(SGOPDConfigError, match="lambda_high"):
        settings("--lambda_high", "-1")
    with pytest.raises(SGOPDConfigError, match="num_generations"):
        settings("--method", "grpo", "--num_generations", "3")


def test_accelerate_keys_are_sorted_out_of_recipe_and_flags(recipe):
    path = recipe("num_processes: 4\nmax_steps: 2\naccelerate_config: zero2\n")
    command = read_command_line(["--config", path, "--multi_gpu", "--seed", "2", "--num_machines=1"])
    assert command.launch == {"num_processes": 4, "accelerate_config": "zero2"}
    assert command.launch_flags == ["--multi_gpu", "--num_machines=1"]
    assert command.fields == {"max_steps": 2}
    assert command.flags == ["--seed", "2"]


def test_a_missing_student_is_told(recipe):
    with pytest.raises(SGOPDConfigError, match="`model_name_or_path` must be set"):
        assert settings("--max_steps", "1").student


@pytest.mark.parametrize("name", ["eval_samples", "max_prompt_tokens"])
def test_counts_of_zero_are_refused(name):
    with pytest.raises(SGOPDConfigError, match=f"`{name}` must be at least 1, got 0"):
        settings(f"--{name}", "0")
