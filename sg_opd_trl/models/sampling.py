"""What may shape a completion: the same settings for student, teacher and evaluation, and no others.

A run's own settings are `temperature`, `top_p` and so on; `generation_kwargs` adds to them. What is listed here as
supported is honoured wherever completions are written. Everything else is refused by name before a model is loaded: it
would be ignored, or end in another library's error at the first rollout.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from transformers import GenerationConfig

from ..errors import SGOPDConfigError
from ..setting import Rule

END_TOKENS = "eos_token_id"

#: Fields of `GenerationConfig` that say which token comes next, or whether one does.
SHAPING = frozenset(
    {
        *("top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("repetition_penalty", "no_repeat_ngram_size", "exponential_decay_length_penalty", "min_new_tokens"),
        *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"),
        *("forced_bos_token_id", "forced_eos_token_id", "renormalize_logits", "remove_invalid_values"),
        *("guidance_scale", "watermarking_config"),
    }
)
#: Fields of `GenerationConfig` that change how fast or in how much memory, and no probability.
_COST = frozenset({"use_cache", "cache_implementation", "cache_config", "prefill_chunk_size"})
SUPPORTED = SHAPING | _COST | {END_TOKENS}

_LENGTH = "the longest completion is also what batches and engines are sized by", "Set `max_completion_length`"
_TOKENIZER = "it is the tokenizer's, which pads and reads all batches", "Set it on the tokenizer"
_ONE = "a group is made of equal prompts, one completion each", "Set `num_generations`"
_SEARCH = "a search does not sample from the policy that is trained", "Leave it out"
_MORE = "only token ids are read", "Leave it out"

# Field -> (values that say nothing, why no other one is taken, the way out).
_REFUSED: dict[str, tuple[tuple, str, str]] = {
    "temperature": ((), "log-probs are taken at the run's temperature", "Set `temperature`"),
    "do_sample": ((True,), "greedy rollouts of one prompt are all the same", "Leave it out"),
    "max_new_tokens": ((), *_LENGTH),
    "max_length": ((), *_LENGTH),
    "min_length": (
        (0,),
        "it counts the prompt with its padding, so that a row would depend on its neighbours",
        "Set min_new_tokens",
    ),
    "max_time": ((), "rollouts would depend on the clock", "Set `max_completion_length`"),
    "stop_strings": (
        (),
        "teacher, server and evaluation end completions at token ids alone",
        "Set eos_token_id to the ids that end one",
    ),
    "num_return_sequences": ((1,), *_ONE),
    "num_beams": ((1,), *_SEARCH),
    "num_beam_groups": ((1,), *_SEARCH),
    "penalty_alpha": ((0.0,), *_SEARCH),
    "dola_layers": ((), *_SEARCH),
    "pad_token_id": ((), *_TOKENIZER),
    "bos_token_id": ((), *_TOKENIZER),
    "return_dict_in_generate": ((False,), *_MORE),
    "output_scores": ((False,), *_MORE),
    "output_logits": ((False,), *_MORE),
    "output_attentions": ((False,), *_MORE),
    "output_hidden_states": ((False,), *_MORE),
    "disable_compile": ((), "it is always on: each shape would be compiled anew", "Leave it out"),
}

#: Fields of vLLM's `SamplingParams` that shape a completion.
_VLLM_SUPPORTED = frozenset(
    {
        *("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"),
        *("logit_bias", "allowed_token_ids", "bad_words", "structured_outputs", "extra_args"),
    }
)
_STOP = "teacher and evaluation do not end there", "Give the student's generation_config these end tokens"
_VLLM_REFUSED: dict[str, tuple[tuple, str, str]] = {
    "temperature": _REFUSED["temperature"],
    "max_tokens": ((), *_LENGTH),
    "n": ((1,), *_ONE),
    "best_of": ((1,), *_ONE),
    "seed": ((), "all rollouts of a prompt would be the same", "Set `seed`"),
    "stop": ((), *_STOP),
    "stop_token_ids": ((), *_STOP),
    "eos_token_id": ((), "vLLM ends completions at the student's own end tokens", _STOP[1]),
    "ignore_eos": ((False,), "completions would not end", "Leave it out"),
    "logprobs": ((), *_MORE),
    "prompt_logprobs": ((), *_MORE),
    "min_new_tokens": ((), "vLLM has another name for it", "Set min_tokens"),
}


# What a field may be, where it has bounds; None is always "not set".
_SHARE = Rule(above=0, at_most=1)
_COUNT = Rule(at_least=0)
_RULES: dict[str, tuple[Rule, bool]] = {
    "top_p": (_SHARE, False),
    "top_h": (_SHARE, False),
    "typical_p": (_SHARE, False),
    "min_p": (Rule(at_least=0, at_most=1), False),
    "epsilon_cutoff": (Rule(at_least=0, below=1), False),
    "eta_cutoff": (Rule(at_least=0, below=1), False),
    "repetition_penalty": (Rule(above=0), False),
    "guidance_scale": (Rule(above=0), False),
    "no_repeat_ngram_size": (_COUNT, True),
    "min_new_tokens": (_COUNT, True),
    "min_tokens": (_COUNT, True),
    "presence_penalty": (Rule(at_least=-2, at_most=2), False),
    "frequency_penalty": (Rule(at_least=-2, at_most=2), False),
}
_IDS = frozenset({END_TOKENS, "suppress_tokens", "begin_suppress_tokens", "allowed_token_ids"})


def _value_problem(name: str, value: Any, use_vllm: bool) -> str | None:
    """What a field must be, where its value is something else."""
    if value is None:
        return None
    if name in _IDS:
        ids = [value] if isinstance(value, int) and name == END_TOKENS else value
        fine = isinstance(ids, (list, tuple)) and all(type(token) is int and token >= 0 for token in ids)
        return None if fine else "a list of token ids" + (", or one" if name == END_TOKENS else "")
    rule, whole = _RULES.get(name, (Rule(), False))
    if name == "top_k":
        rule, whole = Rule(at_least=-1 if use_vllm else 0), True  # for no limit vLLM takes -1 too
    return rule.allowed(whole=whole) if rule.problem(name, value, None, whole=whole) else None


def check_generation_kwargs(kwargs: Mapping[str, Any] | None, *, use_vllm: bool, local_teacher_writes: bool) -> None:
    """Refuse what one of those who write completions would ignore or fail on.

    Args:
        kwargs: `generation_kwargs`, for `GenerationConfig` of transformers or `SamplingParams` of vLLM.
        use_vllm: whether the student writes with vLLM.
        local_teacher_writes: whether a teacher in this process samples by the same settings.

    Raises:
        SGOPDConfigError: names the first field, its value, the reason and the way out.
    """
    supported, refused = (_VLLM_SUPPORTED, _VLLM_REFUSED) if use_vllm else (SUPPORTED, _REFUSED)
    for name, value in (kwargs or {}).items():
        given = f"got {name}={value!r}"
        if name in refused:
            neutral, reason, way_out = refused[name]
            if value is None or value in neutral:
                continue
            raise SGOPDConfigError(f"`generation_kwargs` must not set {name!r}, {given}: {reason}. {way_out}.")
        if name not in supported:
            meant = get_close_matches(name, supported, n=1)
            way_out = f"Did you mean {meant[0]!r}?" if meant else f"Supported are {', '.join(sorted(supported))}."
            raise SGOPDConfigError(
                f"`generation_kwargs` must hold sampling settings of {'vLLM' if use_vllm else 'transformers'} that "
                f"student, teacher and evaluation can share, {given}: it would be ignored by one of them. {way_out}"
            )
        wanted = _value_problem(name, value, use_vllm)
        if wanted is not None:
            raise SGOPDConfigError(
                f"`generation_kwargs` must set {name!r} to {wanted}, {given}: nothing could be sampled by "
                "that. Correct it, or leave it out."
            )
        if use_vllm and local_teacher_writes and name not in SUPPORTED:
            raise SGOPDConfigError(
                f"`generation_kwargs` must hold settings that the teacher has too, {given}: vLLM has it, a teacher "
                "in this process does not, and it samples as the student does. Leave it out, or set "
                "teacher_sampling_enable=False."
            )


def end_tokens(configured: int | Sequence[int] | None, tokenizer: Any) -> list[int]:
    """Ids that end a completion: those that a generation config names, and the tokenizer's.

    Both, because they often differ: a chat model's generation config names the end of a turn, while the tokenizer's
    end token is that of a text, or the other way round.
    """
    ids = [configured] if isinstance(configured, int) else list(configured or ())
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *ids) if token is not None))


# Values of `SHAPING` and of searches that are the same as none.
_NEUTRAL: dict[str, tuple] = {
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,),
    "min_new_tokens": (0,),
    "min_length": (0,),
    "guidance_scale": (1.0,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
}
# What every run sets itself.
_ALWAYS_SET = frozenset({"top_p", "top_k", "min_p", "repetition_penalty"})


def own_settings(model: Any, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of the model's own generation config that would shape completions, and that `without_own_settings` drops.

    Args:
        model: with or without a PEFT adapter.
        given: settings that take their place anyway, besides those that every run sets.
    """
    names = SHAPING | {"min_length", "max_time", "stop_strings", "dola_layers"} | _NEUTRAL.keys()
    own = model.generation_config.to_dict()
    found = {name: own.get(name) for name in sorted(names - _ALWAYS_SET - set(given or ()))}
    return {name: value for name, value in found.items() if value and value not in _NEUTRAL.get(name, ())}


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """Have `generate` sample by what it is given: it fills what a call leaves open from the model's own settings.

    The model's own would otherwise shape the student's completions in training (a minimal length, a penalty) and no
    one else's: neither the teacher's, nor vLLM's, nor those of an evaluation.
    """
    # A PEFT wrapper hands its own attribute, where it has one, down to its base.
    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    former = [(owner, vars(owner).get("generation_config")) for owner in owners]
    try:
        for owner, _ in former:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in former:
            if config is None:
                del owner.generation_config
            else:
                owner.generation_config = config
