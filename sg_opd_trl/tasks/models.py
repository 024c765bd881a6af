"""Qwen3-architecture models for the built-in task, small enough to train on one core in seconds."""

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from .settings import ModelSettings


def build_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """Build a randomly initialised model on the CPU, drawing from the global CPU generator.

    Args:
        settings: Shape of the model.
        tokenizer: Gives the vocabulary size and the special tokens.

    Returns:
        Qwen3ForCausalLM: float32 weights, tied embeddings, generation ends at the tokenizer's end of turn.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        head_dim=settings.hidden_size // settings.num_heads,
        max_position_embeddings=settings.max_position_embeddings,
        # The usual 0.02 is made for hidden sizes in the thousands.
        initializer_range=0.5 / settings.hidden_size**0.5,
        tie_word_embeddings=True,
        dtype="float32",
        # The generation config takes these over.
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    # The class and not `from_config`: the latter would shard the weights when DeepSpeed ZeRO-3 has been set up.
    with torch.device("cpu"):
        return Qwen3ForCausalLM(config)
