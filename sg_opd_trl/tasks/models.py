"""The models of the built-in tasks: Qwen3 shapes small enough to train on one core in seconds, and their tokenizer.

The tokenizer has one token per character, 32 tokens in all, and a chat template.
"""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .settings import ModelSettings

PAD_TOKEN = "<|endoftext|>"
UNKNOWN_TOKEN = "<unk>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (PAD_TOKEN, UNKNOWN_TOKEN, TURN_START, TURN_END)
WORDS = ("\\boxed{", "system", "user", "assistant")
CHARACTERS = "0123456789+-*/=,.:?() }\n"
VOCABULARY = (*SPECIAL_TOKENS, *WORDS, *CHARACTERS)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def build_tokenizer(model_max_length: int = 256) -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    Text is cut into the words above and single characters; decoding joins the pieces with nothing in between, so any
    text over the vocabulary survives the round trip. Other characters become the unknown token.

    Args:
        model_max_length: Longest sequence, in tokens, that the models take.

    Returns:
        PreTrainedTokenizerFast: With chat template, end of turn as end of sequence, and padding on the left.
    """
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN_TOKEN)
    )
    # The only two characters of `WORDS` that mean something in an expression.
    pieces = "|".join(word.replace("\\", "\\\\").replace("{", "\\{") for word in WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pieces}|[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # the default would put a space between tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,  # it would take away spaces before punctuation
        padding_side="left",  # for generation
        model_max_length=model_max_length,
    )


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
