"""Tokens by their text, and what leaves a generation batch's loss."""

import logging

import pytest
import torch
from tiny import tiny_tokenizer

from sg_opd_trl import SGOPDConfigError
from sg_opd_trl.token_weights import mask_special_tokens, newline_token_ids, special_token_ids

NEWLINE = "0123456789+=abcdefg\n "


def test_ids_of_strings(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    vocab = tokenizer.get_vocab()
    assert special_token_ids(tokenizer, ["<eos>", "=", "assistant", "="]) == [1, vocab["="], 4]
    assert special_token_ids(tokenizer, ["<unk>"]) == [2]
    assert special_token_ids(tokenizer, []) == []
    assert not caplog.records


def test_a_string_of_several_tokens_gives_each_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    vocab = tokenizer.get_vocab()
    with caplog.at_level(logging.WARNING):
        assert special_token_ids(tokenizer, ["a+a", "+"]) == [vocab["a"], vocab["+"]]
    (record,) = caplog.records
    assert "'a+a'" in record.getMessage() and "3: 'a', '+', 'a'" in record.getMessage()


@pytest.mark.parametrize("string", ["Z", "<think>", "1Z"])
def test_unknown_strings_are_refused(string: str) -> None:
    with pytest.raises(SGOPDConfigError, match=r"`special_token_mask` must hold .* got .* Set the list to"):
        special_token_ids(tiny_tokenizer(), ["=", string])


def test_newline_tokens() -> None:
    tokenizer = tiny_tokenizer(NEWLINE)
    assert newline_token_ids(tokenizer) == [tokenizer.get_vocab()["\n"]]
    with pytest.raises(SGOPDConfigError, match=r"`drift_gate_block='newline'` is not supported .* Set drift_ga"):
        newline_token_ids(tiny_tokenizer())


def test_mask_and_count_over_ranks() -> None:
    rollouts = {
        "completion_ids": torch.tensor([[7, 7, 5, 0], [5, 7, 7, 7]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "num_items_in_batch": torch.tensor(17),
        "prompt_ids": torch.zeros(2, 1),
    }
    masked = mask_special_tokens(rollouts, [7], "first", lambda count: torch.stack([count, torch.tensor(10)]))
    assert masked["tool_mask"].tolist() == [[0, 1, 1, 0], [1, 0, 1, 1]]
    assert masked["num_items_in_batch"].shape == () and masked["num_items_in_batch"] == 5 + 10
    assert masked["completion_mask"] is rollouts["completion_mask"], "attention must stay"
    assert "tool_mask" not in rollouts
    tools = rollouts | {"tool_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 0, 1]])}
    again = mask_special_tokens(tools, [7], "first", lambda count: count)
    assert again["tool_mask"].tolist() == [[0, 0, 1, 0], [1, 0, 0, 1]]
    assert again["num_items_in_batch"] == 3
