"""Tokenizer and chat template of the built-in task: one token per character, 32 tokens in all."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
    pieces = "|".join(word.replace("\\", "\\\\").replace("{", "\\{") for word in WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pieces}|[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=model_max_length,
    )
