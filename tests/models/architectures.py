"""Tiny models of every causal language model of transformers, made from nothing but its configuration class.

Sizes follow from what a field is called, so that an architecture that is new needs no line here; `_EXCEPTIONS` has
those whose fields depend on one another in other ways, and `NOT_BUILT` those that are no language models of their own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SIZES = {
    "vocab_size": 26, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1, "tie_word_embeddings": False, "initializer_range": 0.15,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# --- every architecture ----------------------------------------------------------------------------------------------
#: Model types, in transformers' order.
ARCHITECTURES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 64
#: Positions that every model has: room for `ROWS` of the survey.
CONTEXT = 64
#: Every sliding window and chunk of attention.
WINDOW = 8
#: Where the rules leave more, something was not shrunk.
_LARGEST = 4_000_000

_NAMES_OF_VALUES: tuple[tuple[int, str], ...] = (
    (0, """pad_token_id decoder_start_token_id num_kv_shared_layers num_nextn_predict_layers first_k_dense_replace"""),
    (1, """eos_token_id n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups num_dense_layers
        num_mem_blocks attn_layer_offset expert_layer_offset moe_layer_start_index H_cycles L_cycles
        num_layers_per_stack max_window_layers"""),
    (2, """bos_token_id num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts moe_top_k
        num_key_value_heads num_kv_heads kv_heads num_query_groups swa_num_key_value_heads attn_layer_period
        expert_layer_period no_rope_layer_interval n_layers_per_attn_res_block sliding_window_pattern
        _sliding_window_pattern adapter_rank linear_num_key_heads o_groups num_hidden_layers n_layer n_layers
        num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers num_blocks"""),
    (4, """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads
        num_decoder_attention_heads num_encoder_attention_heads num_experts n_routed_experts num_local_experts
        moe_num_experts zero_expert_num index_topk linear_num_value_heads linear_num_heads
        swa_num_attention_heads rotary_dim"""),
    (8, """head_dim attention_head_size d_head v_head_dim qk_nope_head_dim qk_rope_head_dim linear_key_head_dim
        linear_value_head_dim linear_head_dim index_head_dim swa_head_dim mamba_head_dim mamba_headdim mamba_d_head
        chunk_size mamba_chunk_size mamba_num_heads mamba_n_heads mamba_d_state state_size ssm_state_size mamba_dt_rank
        time_step_rank laurel_rank hidden_size_per_layer_input pronunciation_embed_dim shape_embed_dim"""),
    # Of so many heads one always scores a key above 0: sparse attention would choose among ties at random.
    (16, """index_n_heads q_lora_rank kv_lora_rank o_lora_rank qk_head_dim
        pronunciation_vocab_size shape_vocab_size"""),
    (32, """hidden_size d_model n_embd embedding_size output_embedding_size input_embedding_size word_embed_proj_dim
        attention_hidden_size lru_width emb_dim"""),
    (48, """intermediate_size n_inner decoder_ffn_dim encoder_ffn_dim ffn_dim d_inner dff moe_intermediate_size
        shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size ffn_hidden_size
        expert_ffn_hidden_size shared_experts_intermediate_size intermediate_size_mlp dense_intermediate_size"""),
    (CONTEXT, """max_position_embeddings n_positions max_seq_len n_ctx max_target_positions max_source_positions
        context_length original_max_position_embeddings model_max_length rel_extent"""),
    (VOCABULARY, """vocab_size vocab_size_per_layer_input unpadded_vocab_size mamba_d_ssm"""),
)  # fmt: skip
_RULES: dict[str, Any] = {name: value for value, names in _NAMES_OF_VALUES for name in names.split()} | {
    # What a model reads and writes text with, and what it is trained with.
    "is_decoder": True,
    "use_sliding_window": True,
    "tie_word_embeddings": False,
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "local_attention",
         "attention_chunk_size", "keep_window_size", "lsh_attn_chunk_length", "local_attn_chunk_length", "block_size"),
        WINDOW,
    ),
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "per_layer_config": {
            1: {
                "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                "head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
            }
        },
        "head_dim": 16,
    },
    "gemma3n_text": {"intermediate_size": [48, 48]},
    "gemma4_text": {"global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"]},
    "xlstm": {"hidden_size": 64, "num_heads": 1, "chunk_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid"],
    },
    "zamba2": {
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "n_mamba_heads": 8,
        "layers_block_type": ["linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

_OF_MORE_THAN_TEXT = "a model of images or sound; its text model has an entry of its own, or none"
#: Model types that are not built, and why.
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(
        ("dots3_note", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2", "moss_transcribe_diarize",
         "phi4_multimodal", "qwen4_exp"),
        _OF_MORE_THAN_TEXT,
    ),
    **dict.fromkeys(("moshi", "musicgen", "musicgen_melody"), "reads several codebooks of sound, no text"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts with the cache of another model"),
    "blt": "reads bytes in patches that models of its own cut",
}  # fmt: skip


def tiny_architecture(model_type: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of this type in float32 whose predictions are far from uniform, in evaluation mode.

    Args:
        model_type: one of `ARCHITECTURES`.
        seed: of its weights.
        changes: fields of its configuration.
    """
    config = _shrunk(CONFIG_MAPPING[model_type], _EXCEPTIONS.get(model_type, {}) | changes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{model_type} has {size} parameters: a field that makes it large is in no rule")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).float()
    _roughen(model)
    return model.eval()


def _shrunk(kind: Any, changes: Mapping[str, Any]) -> PreTrainedConfig:
    default = kind()
    values = default.to_dict()
    settings = {
        name: value
        for name in values
        if (value := _small(name, values[name])) is not None and not _is_computed(kind, name)
    }
    if "kv_lora_rank" in values:
        # Latent attention shares one compressed state between all heads.
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= _layers(kind, values, settings)
    parts = {name: dict(changes.get(name, {})) for name in kind.sub_configs}
    settings |= {name: _shrunk(kind.sub_configs[name], parts[name]).to_dict() for name in parts}
    return kind(**settings | {name: value for name, value in changes.items() if name not in parts})


def _small(name: str, value: Any) -> Any:
    """What a field is set to; None leaves it."""
    if isinstance(value, list | dict):
        return None
    # Dropout, and noise of routers.
    if ("drop" in name or "jitter" in name or name.endswith("pdrop")) and isinstance(value, float):
        return 0.0
    return _RULES.get(name)


def _is_computed(kind: Any, name: str) -> bool:
    return isinstance(getattr(kind, kind.attribute_map.get(name, name), None), property)


def _layers(kind: Any, values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """As many layers as it takes to have each kind of layer once."""
    if "max_window_layers" in values:
        # The kinds follow from the sizes.
        return {}
    kinds = {
        name: list(dict.fromkeys(values[name]))
        for name in _PER_LAYER
        if isinstance(values.get(name), list | tuple) and values[name] and not _is_computed(kind, name)
    }
    if not kinds:
        return {}
    number = max(2, *map(len, kinds.values()))
    lists = {name: (each * number)[:number] for name, each in kinds.items()}
    return lists | {name: number for name in _LAYERS if name in settings}


@torch.no_grad()
def _roughen(model: nn.Module) -> None:
    """Weights so large that attention, positions and experts show in the log-probs; nothing is 0 or 1 any more."""
    for parameter in model.parameters():
        spread = parameter.std().item() if parameter.numel() > 1 else 0.0
        if parameter.dim() < 2 or spread == 0:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif spread < 0.2 and abs(parameter.mean().item()) < spread:
            # Not those that begin as a range of time scales.
            parameter.mul_(0.3 / spread)
