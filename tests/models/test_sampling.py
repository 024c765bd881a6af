"""What may shape a completion: refused by name, or the same for everyone who writes one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import GenerationConfig

from sg_opd_trl import SGOPDConfigError
from sg_opd_trl.models.generate import generate_completions
from sg_opd_trl.models.sampling import (
    SHAPING,
    SUPPORTED,
    check_generation_kwargs,
    end_tokens,
    own_settings,
    without_own_settings,
)

ALONE = {"use_vllm": False, "local_teacher_writes": True}
VLLM = {"use_vllm": True, "local_teacher_writes": False}


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"stop_strings": ["7"]}, ["'stop_strings'", "token ids alone", "Set eos_token_id"]),
        ({"num_return_sequences": 2}, ["got num_return_sequences=2", "Set `num_generations`"]),
        ({"num_beams": 4}, ["got num_beams=4", "does not sample"]),
        ({"do_sample": False}, ["got do_sample=False", "all the same"]),
        ({"temperature": 0.5}, ["got temperature=0.5", "Set `temperature`"]),
        ({"max_new_tokens": 9}, ["got max_new_tokens=9", "Set `max_completion_length`"]),
        ({"min_length": 9}, ["got min_length=9", "Set min_new_tokens"]),
        ({"output_scores": True}, ["got output_scores=True", "Leave it out"]),
        ({"disable_compile": True}, ["got disable_compile=True", "always on"]),
        ({"no_repeat_ngrams_size": 3}, ["got no_repeat_ngrams_size=3", "Did you mean 'no_repeat_ngram_size'?"]),
        ({"min_tokens": 3}, ["got min_tokens=3", "Did you mean 'min_new_tokens'?"]),
        ({"xyz": 3}, ["got xyz=3", "ignored", "Supported are", "typical_p"]),
        ({"top_p": 0.9, "xyz": 3}, ["got xyz=3"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_somebody_would_ignore_or_fail_on_is_refused(kwargs: dict, said: list[str]) -> None:
    with pytest.raises(SGOPDConfigError) as raised:
        check_generation_kwargs(kwargs, **ALONE)
    assert [part for part in ["`generation_kwargs` must", *said] if part not in str(raised.value)] == []


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"stop": ["7"]}, ["got stop=['7']", "generation_config"]),
        ({"n": 2}, ["got n=2", "num_generations"]),
        ({"seed": 1}, ["got seed=1", "the same"]),
        ({"eos_token_id": [5]}, ["got eos_token_id=[5]"]),
        ({"min_new_tokens": 3}, ["got min_new_tokens=3", "Set min_tokens"]),
        ({"no_repeat_ngram_size": 3}, ["got no_repeat_ngram_size=3", "of vLLM"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_vllm_has_names_of_its_own(kwargs: dict, said: list[str]) -> None:
    with pytest.raises(SGOPDConfigError) as raised:
        check_generation_kwargs(kwargs, **VLLM)
    assert [part for part in said if part not in str(raised.value)] == []


def test_a_local_teacher_must_sample_as_a_student_on_vllm_does() -> None:
    check_generation_kwargs({"min_tokens": 3, "top_p": 0.9}, **VLLM)
    check_generation_kwargs({"top_p": 0.9}, use_vllm=True, local_teacher_writes=True)
    with pytest.raises(SGOPDConfigError, match="got min_tokens=3: vLLM has it, a teacher in this process does not"):
        check_generation_kwargs({"min_tokens": 3}, use_vllm=True, local_teacher_writes=True)


def test_what_is_supported_passes() -> None:
    check_generation_kwargs(None, **ALONE)
    others = {"epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "suppress_tokens": [1], "begin_suppress_tokens": [1]}
    check_generation_kwargs(dict.fromkeys(SUPPORTED, 1) | others, **ALONE)
    check_generation_kwargs(dict.fromkeys(SUPPORTED), **ALONE)
    check_generation_kwargs({"top_k": -1, "presence_penalty": -0.5}, **VLLM)
    check_generation_kwargs({"top_p": 1, "min_p": 0, "top_k": 0, "eos_token_id": [1, 2]}, **ALONE)
    check_generation_kwargs({"num_beams": 1, "num_return_sequences": None, "do_sample": True}, **ALONE)
    assert vars(GenerationConfig()).keys() >= SUPPORTED, "transformers has another name for one"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("top_p", [0, -0.1, 3, "0.9", True, float("nan"), [0.9]]),
        ("top_k", [-1, 2.5, "20", True]),
        ("min_p", [-0.1, 1.1, float("inf")]),
        ("typical_p", [0, 1.5]),
        ("epsilon_cutoff", [-0.1, 1]),
        ("repetition_penalty", [0, -1, "1.1"]),
        ("no_repeat_ngram_size", [-1, 1.5]),
        ("min_new_tokens", [-1, "3"]),
        ("eos_token_id", ["1", -1, [1, "2"], {"1": 2}, 1.0]),
        ("suppress_tokens", [3, [-1], "34", [True]]),
    ],
)
def test_values_that_nothing_can_be_sampled_by_are_refused(name: str, values: list) -> None:
    for value in values:
        with pytest.raises(SGOPDConfigError, match=f"`generation_kwargs` must set '{name}' to .*, got {name}="):
            check_generation_kwargs({name: value}, **ALONE)


def test_end_tokens_are_the_configured_ones_and_the_tokenizers() -> None:
    tokenizer = SimpleNamespace(eos_token_id=1)
    assert end_tokens([20, 1], tokenizer) == [1, 20]
    assert end_tokens(20, tokenizer) == [1, 20]
    assert end_tokens(None, tokenizer) == [1]
    assert end_tokens([20], SimpleNamespace(eos_token_id=None)) == [20]


# --- the model's own settings ----------------------------------------------------------------------------------------
OWN: list[dict[str, Any]] = [
    {"min_new_tokens": 12},
    {"no_repeat_ngram_size": 1},
    {"typical_p": 0.1},
    {"epsilon_cutoff": 0.5},
    {"suppress_tokens": [*range(1, 20)]},
    {"begin_suppress_tokens": [*range(2, 26)]},
    {"bad_words_ids": [[token] for token in range(2, 20)]},
    {"forced_eos_token_id": 7},
    {"exponential_decay_length_penalty": (1, 9.0)},
    {"num_beams": 3},
    {"repetition_penalty": 9.0},
]


@pytest.mark.parametrize("own", OWN, ids=lambda own: next(iter(own)))
def test_a_models_own_settings_shape_nothing(own: dict[str, Any]) -> None:
    run = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "eos_token_id": [1, 5], "pad_token_id": 0}

    def written(model: Any, settings: dict[str, Any]) -> list[list[int]]:
        torch.manual_seed(0)
        return generate_completions(model, [[3, 7], [4, 9, 10]] * 3, GenerationConfig(**settings))

    plain, model = written(tiny_model(0), run), tiny_model(0)
    model.generation_config.update(**own)
    kept = model.generation_config
    assert written(model, run) == plain
    assert model.generation_config is kept
    assert written(model, run | own) != plain, "the case is one that would show"


def test_own_settings_are_those_that_would_be_dropped_without_a_word() -> None:
    model = tiny_model(0)
    assert own_settings(model) == {}
    model.generation_config.update(top_p=0.8, top_k=20, temperature=0.6, do_sample=True, repetition_penalty=1.05)
    model.generation_config.update(typical_p=1.0, no_repeat_ngram_size=0, num_beams=1, max_new_tokens=7)
    assert own_settings(model) == {}, "what every run sets itself, or what says nothing"
    model.generation_config.update(min_new_tokens=3, typical_p=0.9, stop_strings=["7"])
    assert own_settings(model) == {"min_new_tokens": 3, "typical_p": 0.9, "stop_strings": ["7"]}
    assert own_settings(model, {"min_new_tokens": 5}) == {"typical_p": 0.9, "stop_strings": ["7"]}
    every = SimpleNamespace(to_dict=lambda: dict.fromkeys(SHAPING, 9))
    found = own_settings(SimpleNamespace(generation_config=every))
    assert found.keys() == SHAPING - {"top_p", "top_k", "min_p", "repetition_penalty"}


def test_a_wrappers_settings_are_restored_as_they_were() -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model(0)
    base.generation_config.update(min_new_tokens=9)
    kept = base.generation_config
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for own in (None, GenerationConfig(min_new_tokens=4)):
        if own is not None:
            wrapped.generation_config = own  # as TRL's override leaves one behind
        with without_own_settings(wrapped):
            assert wrapped.generation_config.min_new_tokens is base.generation_config.min_new_tokens is None
            base.generation_config = GenerationConfig(min_new_tokens=1)  # PEFT hands settings down at every call
        assert base.generation_config is kept
        assert vars(wrapped).get("generation_config") is own
