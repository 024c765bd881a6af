import os

import pytest

from sg_opd_trl.cli.recipes import ENV_WHITELIST, apply_env, find_recipe, load_recipe
from sg_opd_trl.errors import SGOPDConfigError


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_a_mapping(tmp_path):
    assert load_recipe(write(tmp_path, "max_steps: 3\nreward_funcs: [a, b]\n")) == {
        "max_steps": 3,
        "reward_funcs": ["a", "b"],
    }


@pytest.mark.parametrize(
    "text",
    [
        "max_steps: 3\nseed: 0\nmax_steps: 4\n",
        "model_init_kwargs:\n  max_steps: 1\n  max_steps: 2\n",
        "{max_steps: 1, max_steps: 1}",
    ],
)
def test_a_key_set_twice_is_refused(tmp_path, text):
    with pytest.raises(SGOPDConfigError, match="`max_steps` is set twice"):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "just words", "", "1: 2", "a: [", "a: !!python/object/apply:os.getcwd []"]
)
def test_anything_else_is_refused_with_the_file(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(SGOPDConfigError) as error:
        load_recipe(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SGOPDConfigError, match=r"absent\.yaml"):
        load_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "trust_remote_code: true",
        "trust_remote_code: 'yes'",
        "model_init_kwargs: {trust_remote_code: true}",
        "teacher_model_init_kwargs: '{\"trust_remote_code\": true}'",
        'teacher_model_init_kwargs: \'{"a": {"trust_remote_code": 1}}\'',
        "datasets: [{path: a, trust_remote_code: true}]",
    ],
)
def test_remote_code_is_never_switched_on_by_a_recipe(tmp_path, text):
    with pytest.raises(SGOPDConfigError, match="--trust_remote_code true"):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize("text", ["trust_remote_code: false", "model_init_kwargs: {trust_remote_code: false}"])
def test_switching_remote_code_off_is_fine(tmp_path, text):
    assert load_recipe(write(tmp_path, text))


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONPATH", "PATH", "HF_ENDPOINT", "HF_TOKEN"])
def test_environment_variables_outside_the_whitelist_are_refused_and_none_is_set(monkeypatch, name):
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    before = dict(os.environ)
    with pytest.raises(SGOPDConfigError, match=name):
        apply_env({"env": {"NCCL_DEBUG": "INFO", name: "x"}}, "r.yaml")
    assert dict(os.environ) == before
    assert name not in ENV_WHITELIST


def test_whitelisted_variables_are_set_and_the_shell_wins(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    recipe = {"env": {"WANDB_PROJECT": "theirs", "NCCL_DEBUG": "INFO"}, "seed": 1}
    apply_env(recipe, "r.yaml")
    assert (os.environ["WANDB_PROJECT"], os.environ["NCCL_DEBUG"]) == ("mine", "INFO")
    assert recipe == {"seed": 1}
    monkeypatch.delenv("NCCL_DEBUG")


def test_env_must_be_a_mapping():
    with pytest.raises(SGOPDConfigError, match="must be a mapping"):
        apply_env({"env": ["A=1"]}, "r.yaml")


def test_without_a_clone_the_recipe_must_be_named(monkeypatch):
    assert find_recipe("arithmetic/sg_opd.yaml").is_file()
    monkeypatch.setattr("sg_opd_trl.cli.recipes.recipes_folder", lambda: None)
    with pytest.raises(SGOPDConfigError, match="--recipe PATH"):
        find_recipe("arithmetic/sg_opd.yaml")
