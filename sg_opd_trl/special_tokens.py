"""Tokens singled out by their text: those that a special-token mask leaves out, and those that end a line."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from . import core
from .errors import SGOPDConfigError

logger = logging.getLogger(__name__)


def special_token_ids(tokenizer: Any, strings: Sequence[str]) -> list[int]:
    """Ids of all tokens of some strings, as arXiv:2603.25562 counts them: a string of several tokens gives each.

    Args:
        tokenizer: the student's.
        strings: `special_token_mask`.

    Returns:
        Ids in order, each once.

    Raises:
        SGOPDConfigError: a string that the tokenizer has no token for.
    """
    ids: list[int] = []
    for string in strings:
        parts = tokenizer.encode(string, add_special_tokens=False)
        if not parts or (tokenizer.unk_token_id in parts and string != tokenizer.unk_token):
            raise SGOPDConfigError(
                f"`special_token_mask` must hold strings that the student's tokenizer knows, got {string!r}. It has "
                "no token for it, so that nothing or every unknown token would be masked. Set the list to strings "
                "of the student's chat template."
            )
        if len(parts) > 1:
            logger.warning(
                "%r of `special_token_mask` is no token of its own but %d: %s. Each of them is masked wherever it "
                "occurs.",
                string,
                len(parts),
                ", ".join(map(repr, tokenizer.convert_ids_to_tokens(parts))),
            )
        ids += parts
    return list(dict.fromkeys(ids))


def newline_token_ids(tokenizer: Any) -> list[int]:
    """Ids of all tokens with a newline in their text.

    Raises:
        SGOPDConfigError: the tokenizer has none.
    """
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    ids = [token for token, text in enumerate(texts) if "\n" in text]
    if not ids:
        raise SGOPDConfigError(
            "`drift_gate_block='newline'` is not supported with this tokenizer: no token of it has a newline, so that "
            "every rollout would be one block. Set drift_gate_block to a number of tokens, e.g. 64."
        )
    return ids


def mask_special_tokens(rollouts: dict, special_ids: Sequence[int], scope: str, gather: Callable) -> dict:
    """Take special tokens out of a generation batch's loss.

    TRL multiplies `completion_mask` by `tool_mask` in its loss and reads `tool_mask` nowhere else by then; attention
    follows `completion_mask` alone. With loss_type "dapo" the loss is divided by `num_items_in_batch`.

    Args:
        rollouts: TRL's, `(B, T)` entries.
        special_ids: token ids.
        scope: `first` or `all`.
        gather: over ranks.

    Returns:
        The rollouts with `tool_mask` and `num_items_in_batch` as they are without these tokens.
    """
    counted = rollouts["completion_mask"]
    if "tool_mask" in rollouts:
        counted = counted * rollouts["tool_mask"]
    kept = core.without_special_tokens(rollouts["completion_ids"], counted, special_ids, scope)
    return rollouts | {"tool_mask": kept, "num_items_in_batch": gather(kept.sum()).sum()}
