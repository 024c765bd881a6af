"""Settings of vLLM for the student's rollouts, refused before anything is loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_config, tiny_data, tiny_tokenizer

from sg_opd_trl import SGOPDConfigError
from sg_opd_trl.cli.parsing import build_settings, read_command_line
from sg_opd_trl.preflight import check_prompt_room, check_rollout_engine

COLOCATED = {"use_vllm": True, "vllm_mode": "colocate"}


def test_a_context_without_room_for_a_prompt(tmp_path: Path) -> None:
    with pytest.raises(SGOPDConfigError, match=r"`vllm_max_model_length` must be at least 7, got 6.*Raise it"):
        tiny_config(tmp_path, **COLOCATED, vllm_max_model_length=6)
    # Without vLLM nobody reads it.
    tiny_config(tmp_path, vllm_max_model_length=6)


def test_the_context_of_a_server_is_its_own(tmp_path: Path) -> None:
    tiny_config(tmp_path, use_vllm=True, vllm_mode="server", vllm_max_model_length=6)


@pytest.mark.parametrize("engine", [COLOCATED, {}], ids=["vllm", "without"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"vllm_importance_sampling_mode": "token"},
            r"sampling_mode` must be one of 'token_truncate', .* got 'token'",
        ),
        ({"vllm_importance_sampling_clip_max": 0.5}, r"sampling_clip_max` must be a number in \[1, inf\), got 0.5"),
        ({"vllm_importance_sampling_clip_max": float("nan")}, r"clip_max` must be a number in \[1, inf\), got nan"),
        ({"vllm_importance_sampling_clip_min": -0.1}, r"sampling_clip_min` must be a number in \[0, 1\], got -0.1"),
        ({"vllm_importance_sampling_clip_min": 1.5}, r"must be a number in \[0, 1\], got 1.5.*Set it to None"),
    ],
)
def test_importance_settings_out_of_range(
    tmp_path: Path, engine: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(SGOPDConfigError, match=said):
        tiny_config(tmp_path, **engine, **settings)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_accepted(tmp_path: Path, mode: str) -> None:
    bounds = {"vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": 1.0}
    tiny_config(tmp_path, **COLOCATED, **bounds, vllm_importance_sampling_mode=mode, vllm_max_model_length=7)


def test_prompts_and_completions_fit_exactly_or_not_at_all(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **COLOCATED, vllm_max_model_length=16)
    check_prompt_room(config, 10, "prompts")
    with pytest.raises(SGOPDConfigError, match=r"at least 17, got 16: prompts and `max_completion_length` take"):
        check_prompt_room(config, 11, "prompts")
    check_prompt_room(config, None, "prompts")
    config.vllm_mode = "server"
    check_prompt_room(config, 11, "prompts")


def test_prompts_of_the_data_set(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()

    def tokenize(prompts: list) -> list[list[int]]:
        return [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]

    data = tiny_data()
    longest = max(map(len, tokenize(data["prompt"][:8])))
    trainer = SimpleNamespace(train_dataset=data, tokenize_prompts=tokenize, environment_factories=None)
    trainer.args = tiny_config(tmp_path, **COLOCATED, vllm_max_model_length=longest + 6)
    check_rollout_engine(trainer)
    trainer.args.vllm_max_model_length -= 1
    with pytest.raises(SGOPDConfigError, match=rf"at least {longest + 6}, got {longest + 5}: the longest of"):
        check_rollout_engine(trainer)


def test_a_recipe_whose_longest_prompts_do_not_fit() -> None:
    words = ["--config", "recipes/arithmetic/opd.yaml", "--use_vllm", "true", "--vllm_mode", "colocate"]
    words += ["--max_prompt_tokens", "100", "--vllm_max_model_length"]
    build_settings(read_command_line([*words, "148"]))
    with pytest.raises(SGOPDConfigError, match=r"at least 148, got 147: `max_prompt_tokens` and"):
        build_settings(read_command_line([*words, "147"]))
