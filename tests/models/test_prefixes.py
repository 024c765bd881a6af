"""Prompts that begin alike: what rows share, the order that keeps them together, and models that compute it once."""

import random
from typing import Any

import pytest
import torch
from test_packing_models import ARCHITECTURES, build, gradient, padded_log_probs, rows_alone
from tiny import relative_difference, tiny_model
from torch import Tensor, nn
from varlen_attention import count_tokens, use_kernel

from sg_opd_trl.models.batch import TokenBatch, score_rows, sort_windows
from sg_opd_trl.models.forward import (
    HeadRequest,
    Layouts,
    can_share,
    pack,
    prefixes_to_share,
    restrict_layouts,
)
from sg_opd_trl.models.prefixes import plan_by_prompt, rows_by_prompt, shared_prefixes
from sg_opd_trl.trl_seam import add_fused_head, add_head_output, compact_head, fused_forward

CPU = torch.device("cpu")
LONG, OTHER = [5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 13, 14]
# Two prompts that begin alike, one that begins another one, one of a single token, one that has nothing in common.
PROMPTS = [LONG, OTHER, LONG, [5, 6, 7], LONG, [5], [20, 21, 22], OTHER]
COMPLETIONS = [[20, 1], [21, 22, 23, 24, 25, 6, 7], [20, 3], [6, 7, 8], [], [12, 13, 14], [9], [15, 16, 17, 18]]
TOKENS = sum(map(len, PROMPTS)) + sum(map(len, COMPLETIONS))
# Sorted: [5], [5 6 7], LONG x 3, OTHER x 2, [20 21 22]; each shares with the one before it, without its last token.
SAVED = 0 + 1 + 3 + 7 + 7 + 4 + 5 + 0
BATCH = TokenBatch.from_lists(PROMPTS, COMPLETIONS, 0, CPU)
WIDTH = BATCH.completion_ids.size(1)
ALL = torch.ones(len(BATCH), dtype=torch.bool)


# --- what is shared --------------------------------------------------------------------------------------------------
def test_shared_prefixes_by_hand() -> None:
    found = shared_prefixes(PROMPTS)
    assert found.order == [5, 3, 0, 2, 4, 1, 7, 6]
    assert found.lengths == [3, 4, 7, 1, 7, 0, 0, 5]
    assert sum(found.lengths) == SAVED
    assert shared_prefixes([[], [], [5]]).lengths == [0, 0, 0]
    assert shared_prefixes([]) == ([], [])


def test_nothing_more_could_be_shared() -> None:
    """A loop over all pairs: no earlier row has more in common with a row than its neighbour."""
    chosen = random.Random(0)
    for _ in range(200):
        prompts = [[chosen.randint(0, 2) for _ in range(chosen.randint(0, 6))] for _ in range(chosen.randint(1, 7))]
        order, lengths = shared_prefixes(prompts)
        assert sorted(order) == list(range(len(prompts)))
        for place, row in enumerate(order):
            common = [0]
            for earlier in order[:place]:
                common += [n for n in range(len(prompts[row])) if prompts[row][:n] == prompts[earlier][:n]]
            assert lengths[row] == max(common)


def test_packed_rows_that_share_their_beginnings_by_hand() -> None:
    batch = TokenBatch.from_lists([[5, 6, 7], [8], [5, 6, 7]], [[11, 1], [12], [13, 14]], 0, CPU)
    packed = pack(*batch.joined(), 2, shared_prefixes(batch.prompts()))
    inputs = packed.model_inputs
    # The last token of the prompt stays with each row: it predicts 11 in the first one, 13 in the last.
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 11, 1, 8, 12, 7, 13, 14]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    assert inputs["shift_labels"].tolist() == [[-100, -100, 11, 1, -100, 12, -100, 13, 14, -100]]
    assert inputs.keys() == {"input_ids", "position_ids", "shift_labels"}
    assert [row.tolist() for row in packed.rows or ()] == [[0, 1, 2, 3, 4], [5, 6], [0, 1, 7, 8, 9]]
    assert packed.unpack(torch.arange(10.0).unsqueeze(0)).tolist() == [[2.0, 3.0], [5.0, 0.0], [7.0, 8.0]]


def test_every_packed_token_has_one_past() -> None:
    """Random rows: what stands at a row's positions is the row, and rows that meet in a token agree up to there."""
    chosen = random.Random(1)
    for _ in range(100):
        count = chosen.randint(1, 6)
        prompts = [[chosen.randint(3, 4) for _ in range(chosen.randint(0, 5))] for _ in range(count)]
        completions = [[chosen.randint(3, 4) for _ in range(chosen.randint(1, 4))] for _ in range(count)]
        batch = TokenBatch.from_lists(prompts, completions, 0, CPU)
        packed = pack(*batch.joined(), batch.completion_ids.size(1), shared_prefixes(prompts))
        ids, positions = (packed.model_inputs[name][0] for name in ("input_ids", "position_ids"))
        pasts: dict[int, list[int]] = {}
        for row, prompt, completion in zip(packed.rows or (), prompts, completions, strict=True):
            assert ids[row].tolist() == prompt + completion
            assert positions[row].tolist() == list(range(len(prompt + completion)))
            for place, packed_at in enumerate(row.tolist()):
                past = (prompt + completion)[:place]
                assert pasts.setdefault(packed_at, past) == past
        assert len(pasts) == len(ids)


# --- models ----------------------------------------------------------------------------------------------------------
NAMES = [name for name in ARCHITECTURES if name != "gemma2"]  # SDPA has no caps


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_prompt_gives_every_row_what_it_gets_alone(name: str) -> None:
    model = build(name)
    expected = rows_alone(model, BATCH)
    padded = padded_log_probs(model, *BATCH.joined(), WIDTH)
    expected_gradient = gradient(model, *padded)
    seen, rounding = count_tokens(model), 3e-5 if name == "nemotron" else 1e-5
    with compact_head(CPU):
        shared = fused_forward(model, *BATCH.joined(), WIDTH)[:2]
    assert seen.shapes == [(1, TOKENS - SAVED)]
    for ours, theirs, alone in zip(shared, padded, expected, strict=True):
        assert (ours - theirs).abs().max() < rounding
        assert (ours - alone).abs().max() < rounding
    assert shared[0].min() < -1
    assert relative_difference(gradient(model, *shared), expected_gradient) < rounding


def test_a_request_reads_the_hidden_states_that_predict_its_tokens() -> None:
    model = tiny_model(0).eval()
    add_fused_head(model, 1.0, False)
    add_head_output(model)
    chosen = BATCH.completion_mask != 0

    def states(hidden_states: Tensor, head: Any, logps: Tensor) -> tuple[Tensor, ...]:
        return hidden_states, logps

    with torch.no_grad():
        shared = fused_forward(model, *BATCH.joined(), WIDTH, HeadRequest(chosen, states))
        restrict_layouts(model, Layouts(packed=False))
        padded = fused_forward(model, *BATCH.joined(), WIDTH, HeadRequest(chosen, states))
    for ours, theirs in zip(shared.answer or (), padded.answer or (), strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_dropout_is_drawn_for_every_row() -> None:
    model = tiny_model(0).train()
    assert can_share(model, CPU)
    model.model.layers[0].self_attn.attention_dropout = 0.1
    assert not can_share(model, CPU)
    assert can_share(model.eval(), CPU)
    model.train().model.layers[0].self_attn.attention_dropout = 0.0
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.1))
    assert not can_share(model, CPU)


def test_what_cannot_share_keeps_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*BATCH.joined(), WIDTH)
    model = tiny_model(0).train()
    assert prefixes_to_share(model, *arguments) == shared_prefixes(PROMPTS)
    model.gradient_checkpointing_enable()
    assert prefixes_to_share(model, *arguments) is None
    with torch.no_grad():
        assert prefixes_to_share(model, *arguments) is not None
    for layouts in (Layouts(shared=False), Layouts(packed=False)):
        restricted = tiny_model(0)
        restrict_layouts(restricted, layouts)
        assert prefixes_to_share(restricted, *arguments) is None
    for kernel in ("eager", "flash_attention_2"):
        other = tiny_model(0)
        other.config._attn_implementation = kernel
        assert prefixes_to_share(other, *arguments) is None


def test_too_little_is_not_shared() -> None:
    """One token of 42: less than a twentieth."""
    batch = TokenBatch.from_lists([[5, 6], [5, 7]], [[8] * 19, [9] * 19], 0, CPU)
    assert shared_prefixes(batch.prompts()).lengths == [0, 1]
    assert prefixes_to_share(tiny_model(0), *batch.joined(), 19) is None
    batch = TokenBatch.from_lists([[5, 6], [5, 7]], [[8] * 8, [9] * 8], 0, CPU)
    assert prefixes_to_share(tiny_model(0), *batch.joined(), 8) is not None, "one of 20"


# --- scoring and ordering --------------------------------------------------------------------------------------------
def test_rows_by_prompt_by_hand() -> None:
    prompts = [[5, 6], [7, 8], [5, 6], [7, 8], [9]]
    assert rows_by_prompt(prompts, [10, 4, 3, 12, 5]) == [[3, 1], [0, 2], [4]]
    assert rows_by_prompt(prompts, [30, 4, 3, 12, 5]) is None, "2 of 54"
    assert rows_by_prompt([[], []], [0, 0]) is None


def test_groups_stay_whole_within_the_budget() -> None:
    prompts = [[5, 6]] * 3 + [[7, 8]] * 2 + [[9, 9]] * 2
    lengths = [10, 9, 8, 6, 5, 30, 4]
    batches = list(plan_by_prompt(prompts, lengths, 27) or ())
    assert batches == [[5], [6], [0, 1, 2], [3, 4]], "30 is more than the budget; 4 and 27 would be 31"
    assert list(plan_by_prompt(prompts, lengths, 40) or ()) == [[5, 6], [0, 1, 2, 3, 4]]
    assert list(plan_by_prompt(prompts, lengths, 1) or ()) == [[row] for row in (5, 6, 0, 1, 2, 3, 4)]


@pytest.mark.parametrize("budget", [1, 12, 40, 10_000])
def test_scores_are_the_same_under_every_budget(budget: int) -> None:
    model = build("qwen3").eval()
    expected = rows_alone(model, BATCH)[0]
    seen = count_tokens(model)

    @torch.no_grad()
    def score(input_ids: Tensor, attention_mask: Tensor, width: int) -> Tensor:
        return fused_forward(model, input_ids, attention_mask, width).logps

    scores = score_rows(score, BATCH, ALL, budget, by_prompt=True)
    assert (scores - expected).abs().max() < 1e-5
    if budget == 10_000:
        assert seen.shapes == [(1, TOKENS - SAVED)]
    if budget == 40:  # LONG with 10 + 10 + 8 tokens, saving 7 twice; OTHER with 13 + 10 and [20 21 22] with 4; ...
        assert sum(height * width for height, width in seen.shapes) <= TOKENS - 2 * 7 - 5


def test_rows_of_a_prompt_stay_together_in_a_window() -> None:
    """Two micro-batches of two rows: by length 9 8 | 7 6, by prompt 9 7 | 8 6."""
    prompts, lengths = torch.tensor([[5, 6, 7], [8, 9, 10]] * 2), [6, 5, 4, 3]
    completions = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    columns = {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_mask": completions}
    slices = [{name: values[start : start + 2] for name, values in columns.items()} for start in (0, 2)]

    def order(*, by_prompt: bool) -> list[list[int]]:
        return [part["completion_mask"].sum(1).tolist() for part in sort_windows(slices, 2, by_prompt=by_prompt)]

    assert order(by_prompt=True) == [[6, 4], [5, 3]]
    assert order(by_prompt=False) == [[6, 5], [4, 3]]


def test_a_kernel_scores_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3")
    calls = use_kernel(monkeypatch, model)
    with torch.no_grad():
        logps = fused_forward(model, *BATCH.joined(), WIDTH).logps
    assert sorted(calls.rows[0]) == sorted(len(p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True))
    assert (logps - rows_alone(model, BATCH)[0]).abs().max() < 1e-5
