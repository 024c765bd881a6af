"""What `models.internals` leans on in transformers, name by name: one that moved must fail here and not in a run."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_model
from transformers import (
    AttentionInterface,
    Cache,
    DynamicCache,
    FalconH1ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3ForCausalLM,
    StableLmForCausalLM,
    StaticCache,
    cache_utils,
    modeling_utils,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.generation import GenerationMixin, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation import utils as generation_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sg_opd_trl.models import internals

PACKAGE = Path(__file__).resolve().parents[2] / "sg_opd_trl"
ALLOWED = {PACKAGE / "models" / "internals.py", PACKAGE / "trl_seam.py"}


# --- attention -------------------------------------------------------------------------------------------------------
def test_the_attention_that_a_model_runs_is_a_name_in_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read and written between forwards, and looked up anew in every one."""
    model, called = tiny_model(0), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("watched_by_a_test", watched)
    assert internals.attention_implementation(model.config) == "sdpa"
    with internals.attention_switched(model.config, "watched_by_a_test"):
        assert internals.attention_implementation(model.config) == "watched_by_a_test"
        model(torch.tensor([[5, 6, 7]]))
    assert len(called) == model.config.num_hidden_layers
    model(torch.tensor([[5, 6, 7]]))
    assert len(called) == model.config.num_hidden_layers
    assert internals.attention_implementation(model.config) == "sdpa"


def test_an_attention_that_was_not_chosen() -> None:
    assert internals.attention_implementation(PreTrainedConfig()) is None


def test_attention_of_another_name_gets_no_mask_and_keeps_what_the_forward_was_given() -> None:
    """So that packed rows find their bounds, and no mask of `(N, N)` numbers is built."""
    model, seen = tiny_model(0), []

    def watched(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        seen.append((mask, options))
        return sdpa_attention_forward(module, query, key, value, mask, **(options | {"is_causal": True}))

    AttentionInterface.register("watched_by_a_test", watched)
    with internals.attention_switched(model.config, "watched_by_a_test"):
        model(torch.tensor([[5, 6, 7]]), cu_seq_lens_q=torch.tensor([0, 3]))
    assert all(mask is None and "cu_seq_lens_q" in options for mask, options in seen)
    assert seen


def test_architectures_say_whether_their_attention_is_looked_up_and_whether_they_are_recurrent() -> None:
    names = {"_supports_attention_backend", "_is_stateful"}
    assert names <= vars(PreTrainedModel).keys()
    assert Qwen3ForCausalLM._supports_attention_backend
    assert not StableLmForCausalLM._supports_attention_backend
    assert FalconH1ForCausalLM._is_stateful
    assert not Qwen3ForCausalLM._is_stateful


# --- key-value cache -------------------------------------------------------------------------------------------------
def states(rows: int, tokens: int, first: float) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.arange(first, first + rows * tokens * 6).view(rows, 1, tokens, 6)
    return keys, -keys


def test_a_layer_with_room_is_a_dynamic_layer() -> None:
    """The same keys, values, lengths and masks after every call that the decoding loop makes."""
    ours, theirs = internals.RoomyLayer(), DynamicLayer()
    assert not ours.is_initialized
    for step, (tokens, kept) in enumerate([(3, [0, 0, 1]), (1, [0, 1, 2]), (40, [2, 0]), (1, [1])]):
        rows = 2 if step == 0 else len(ours.keys)
        pairs = [layer.update(*states(rows, tokens, 1000.0 * step)) for layer in (ours, theirs)]
        for found, expected in zip(*pairs, strict=True):
            assert torch.equal(found, expected)
        for layer in (ours, theirs):
            layer.batch_select_indices(torch.tensor(kept))
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    own = {"__init__", "update", "batch_select_indices"}
    assert own == {name for name, value in vars(internals.RoomyLayer).items() if inspect.isfunction(value)}


def test_the_methods_of_a_dynamic_layer_that_touch_its_tensors() -> None:
    """One more, and `RoomyLayer` may have to replace it; those that the decoding loop never calls may stay."""
    touching = {
        name
        for kind in (cache_utils.CacheLayerMixin, DynamicLayer)
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and re.search(r"self\.(keys|values)\b", inspect.getsource(value))
    }
    replaced, reading = {"update", "batch_select_indices"}, {"get_seq_length"}
    setting_up = {"__init__", "lazy_initialization"}
    never_called = {"offload", "prefetch", "reset", "reorder_cache", "crop", "batch_repeat_interleave"}
    assert touching == replaced | reading | setting_up | never_called


def test_caches_whose_rows_may_leave() -> None:
    model = tiny_model(0)
    assert internals.can_select_rows(DynamicCache(config=model.config))
    offloaded = DynamicCache(config=model.config)
    # Its own argument opens a stream of the device, which a build for CUDA without a driver does not have.
    offloaded.offloading = True
    assert not internals.can_select_rows(offloaded)
    assert not internals.can_select_rows(StaticCache(config=model.config, max_cache_len=8))
    assert not internals.can_select_rows(None)
    sliding = DynamicCache(config=model.config)
    sliding.layers = [DynamicSlidingWindowLayer(4), DynamicLayer()]
    assert internals.can_select_rows(sliding)
    internals.give_room(sliding)
    assert [type(layer) for layer in sliding.layers] == [DynamicSlidingWindowLayer, internals.RoomyLayer]
    sliding.layers.append(StaticLayer(8))
    assert not internals.can_select_rows(sliding)


def test_selecting_rows_reaches_every_layer() -> None:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*states(2, 3, 0.0), layer)
    internals.select_rows(cache, torch.tensor([1]))
    assert [layer.keys.flatten()[0].item() for layer in cache.layers] == [18.0, 18.0]
    assert "batch_select_indices" in vars(Cache)


# --- decoding --------------------------------------------------------------------------------------------------------
def test_the_repetition_penalty_alone_knows_its_rows() -> None:
    penalty = RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=torch.tensor([1, 2, 3]))
    internals.select_rows_of_processors(LogitsProcessorList([penalty]), torch.tensor([2, 0]))
    assert penalty.prompt_ignore_length.tolist() == [3, 1]
    for given in (None, 2):
        same = RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=given)
        internals.select_rows_of_processors(LogitsProcessorList([same]), torch.tensor([0]))
        assert same.prompt_ignore_length == given


def test_generate_switches_experts_to_another_kernel_by_these_names() -> None:
    source = inspect.getsource(generation_utils)
    assert 'self.device.type != "cpu" and "grouped_mm" in' in source
    assert tiny_model(0).get_experts_implementation().keys() == {""}
    assert not internals.switches_kernel_to_decode(tiny_model(0))


def test_generate_hands_its_preparations_to_a_loop_of_the_callers() -> None:
    parameters = inspect.signature(GenerationMixin.generate).parameters
    assert {"custom_generate", "synced_gpus", "generation_config"} <= parameters.keys()
    prepared = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    assert {"next_sequence_length", "is_first_iteration"} <= prepared.keys()


def test_generate_hands_the_cache_over_by_the_name_that_is_looked_for() -> None:
    """Transformers 5.24 renamed it; by the other name our loop would find no cache and leave all to `generate`."""
    seen: dict = {}

    def loop(model: object, input_ids: torch.Tensor, **inputs: object) -> torch.Tensor:
        seen.update(inputs)
        return input_ids

    model, name = tiny_model(0), internals.cache_argument()
    model.generate(input_ids=torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False, custom_generate=loop)
    assert isinstance(seen[name], DynamicCache)
    assert name in inspect.signature(type(model).forward).parameters


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_both_names_of_the_cache_are_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict = {}
    exec(f"def prepare_inputs_for_generation(self, input_ids, {name}=None): pass", namespace)
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", namespace["prepare_inputs_for_generation"])
    assert internals.cache_argument() == name


@torch.no_grad()
def test_what_is_prepared_has_the_cache_that_was_given_or_all_tokens() -> None:
    """From the latter the decoding loop tells that a model dropped its cache, and begins a new one."""
    rope = {"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    settings = tiny_model(0).config.to_dict() | {"rope_parameters": rope, "original_max_position_embeddings": 4}
    sizes = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    kept = sizes | {"vocab_size", "rope_parameters", "original_max_position_embeddings", "pad_token_id"}
    phi3 = Phi3ForCausalLM(Phi3Config(**{name: settings[name] for name in kept}))
    for model, width, drops in ((tiny_model(0), 5, False), (phi3, 4, False), (phi3, 5, True), (phi3, 6, True)):
        name, ids, cache = (
            internals.cache_argument(),
            torch.arange(3, 3 + width)[None],
            internals.new_cache(model.config),
        )
        model(ids[:, : min(width - 1, 4)], **{name: cache})
        prepared = model.prepare_inputs_for_generation(
            ids, next_sequence_length=1, attention_mask=torch.ones_like(ids), **{name: cache}
        )
        assert (prepared.get(name) is cache, prepared["input_ids"].size(1)) == ((False, width) if drops else (True, 1))


#: Causal language models that prepare the inputs of a forward in their own way: what our decoding loop makes of it.
PREPARES_ITS_INPUTS = {
    "drops its cache where RoPE changes, which the loop follows": {
        "Phi3ForCausalLM",
        "PhimoeForCausalLM",
        "Phi4MultimodalForCausalLM",
    },
    "has states that are no key-value cache, so that `generate` writes": {
        "BambaForCausalLM",
        "FalconH1ForCausalLM",
        "FalconMambaForCausalLM",
        "Mamba2ForCausalLM",
        "MambaForCausalLM",
        "NemotronHForCausalLM",
        "ZambaForCausalLM",
        "Zamba2ForCausalLM",
    },
    "has no cache by that name, so that `generate` writes": {
        "OpenAIGPTLMHeadModel",
        "ReformerModelWithLMHead",
        "XLMWithLMHeadModel",
        "XLNetLMHeadModel",
    },
    "gives its inputs other forms, and keeps the cache": {
        "CTRLLMHeadModel",
        "CpmAntForCausalLM",
        "RoCBertForCausalLM",
    },
    "takes images along once": {
        "Gemma3ForConditionalGeneration",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForConditionalGeneration",
    },
    "writes sound": {"MusicgenForCausalLM", "MusicgenMelodyForCausalLM"},
}


def test_the_models_that_prepare_their_inputs_are_known() -> None:
    """A new one: look at what it does, and compare the decoding loop with `generate` of it, token by token."""
    classes = [
        block
        for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
        for block in re.split(r"^class ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if "def prepare_inputs_for_generation(" in block
    ]
    own = {str(re.match(r"\w+", block)[0]) for block in classes}
    assert own & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) == set().union(*PREPARES_ITS_INPUTS.values())


# --- nobody else does ------------------------------------------------------------------------------------------------
def private_names() -> set[str]:
    """Everything private of transformers' models, configurations, caches and `generate`."""
    kinds = (PreTrainedModel, PreTrainedConfig, Cache, DynamicCache, DynamicLayer, GenerationMixin)
    sources = [inspect.getsource(module) for module in (modeling_utils, cache_utils)]
    sources.append(inspect.getsource(inspect.getmodule(PreTrainedConfig) or PreTrainedConfig))
    assigned = {name for source in sources for name in re.findall(r"\b(?:self|cls)\.(_[a-z]\w*)", source)}
    return {name for name in assigned.union(*map(dir, kinds)) if re.match(r"_[a-z]", name)}


def private_names_touched(path: Path) -> set[str]:
    """Attributes of other objects that a file reads or writes; those of `self` and of named tuples are its own."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"})
    }


def test_the_names_are_those_of_transformers() -> None:
    """The check below looks for something that there is."""
    used = {"_attn_implementation", "_supports_attention_backend", "_is_stateful"}
    assert used <= private_names()
    assert used <= private_names_touched(PACKAGE / "models" / "internals.py")


def test_no_other_file_touches_private_names_of_transformers() -> None:
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in ALLOWED and (names := private_names_touched(path) & private_names())
    }
    assert found == {}
