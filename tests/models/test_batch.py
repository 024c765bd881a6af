"""Token batches: padding, trimming, grouping under a budget, scoring and scattering back."""

import random
from collections.abc import Callable

import pytest
import torch
from tiny import tiny_model

from sg_opd_trl.models.batch import TokenBatch, longest, pad_rows, plan_batches, score_rows, trim_micro_batch

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15], [16], [17, 18]]
COMPLETIONS = [[20, 1], [21, 22, 23, 24, 25, 6, 7], [5], [6, 7, 8], [9, 10, 11, 1], [12, 13, 14]]
CPU = torch.device("cpu")
ALL = torch.ones(len(PROMPTS), dtype=torch.bool)


def batch_of(prompts: list[list[int]] = PROMPTS, completions: list[list[int]] = COMPLETIONS) -> TokenBatch:
    return TokenBatch.from_lists(prompts, completions, 0, CPU)


# --- padding ---------------------------------------------------------------------------------------------------------
def test_pad_rows_pads_each_side() -> None:
    ids, mask = pad_rows([[1, 2], [3, 4, 5]], 9, left=True)
    assert ids.tolist() == [[9, 1, 2], [3, 4, 5]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    ids, mask = pad_rows([[1, 2], [3, 4, 5], []], 9, left=False)
    assert ids.tolist() == [[1, 2, 9], [3, 4, 5], [9, 9, 9]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


@pytest.mark.parametrize(("rows", "shape"), [([], (0, 1)), ([[]], (1, 1)), ([[], []], (2, 1))])
def test_pad_rows_is_at_least_one_wide(rows: list[list[int]], shape: tuple[int, int]) -> None:
    for left in (True, False):
        ids, mask = pad_rows(rows, 9, left=left)
        assert ids.shape == mask.shape == shape
        assert not mask.any()
        assert (ids == 9).all()


def test_longest() -> None:
    assert longest(torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]])) == 3
    assert longest(torch.tensor([[0, 1, 1], [0, 0, 1]])) == 2
    assert longest(torch.zeros(2, 4)) == 1
    assert longest(torch.zeros(0, 4)) == 1


def test_select_trims_to_its_own_rows() -> None:
    part = batch_of().select(torch.tensor([3, 1]))
    assert part.prompt_ids.tolist() == [[14, 15], [0, 8]]
    assert part.prompt_mask.tolist() == [[1, 1], [0, 1]]
    assert part.completion_ids.tolist() == [[6, 7, 8, 0, 0, 0, 0], [21, 22, 23, 24, 25, 6, 7]]
    assert part.completion_mask.sum(1).tolist() == [3, 7]
    assert len(part) == 2
    ids, mask = part.joined()
    assert ids[1].tolist() == [0, 8, 21, 22, 23, 24, 25, 6, 7]
    assert mask[0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_select_of_a_masked_row_keeps_one_column() -> None:
    batch = batch_of()
    batch.completion_mask[2] = 0
    part = batch.select(torch.tensor([2]))
    assert part.completion_ids.shape == part.completion_mask.shape == (1, 1)
    assert not part.completion_mask.any()
    assert part.prompt_ids.tolist() == [PROMPTS[2]]


def test_no_rows_make_a_batch_too() -> None:
    batch = batch_of([], [])
    assert len(batch) == 0
    assert [tuple(x.shape) for x in batch.joined()] == [(0, 2), (0, 2)]


# --- grouping --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("max_tokens", [1, 3, 7, 8, 16, 20, 50, 10**6])
def test_plan_batches_respects_the_budget(max_tokens: int) -> None:
    draw = random.Random(max_tokens)
    lengths = [draw.randrange(0, 9) for _ in range(40)]
    groups = list(plan_batches(lengths, max_tokens))
    assert sorted(i for group in groups for i in group) == list(range(40))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= max_tokens
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(flat, reverse=True)
    for group in groups[:-1]:
        assert (len(group) + 1) * max(1, lengths[group[0]]) > max_tokens, "the next row fits in this group"


def test_plan_batches_by_hand() -> None:
    # longest first: 5 (2 rows of it in 10 tokens), 3 (3 rows in 10)
    assert list(plan_batches([3, 5, 2, 5, 3], 10)) == [[1, 3], [0, 4, 2]]
    assert list(plan_batches([7, 1], 3)) == [[0], [1]]
    assert list(plan_batches([], 3)) == []
    assert list(plan_batches([0, 0], 1)) == [[0], [1]]


# --- scoring ---------------------------------------------------------------------------------------------------------
def readable_score(input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int) -> torch.Tensor:
    """-(token + 100 * sum of all tokens up to it), so that every score names its row and position."""
    seen = (input_ids * attention_mask).cumsum(1)
    return -(input_ids + 100 * seen).float()[:, -width:]


def expected_scores(rows: list[bool]) -> list[list[float]]:
    result = [[0.0] * 7 for _ in PROMPTS]
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        for t, token in enumerate(completion):
            if rows[i]:
                result[i][t] = -float(token + 100 * sum(prompt + completion[: t + 1]))
    return result


@pytest.mark.parametrize("budget", [1, 5, 8, 11, 16, 24, 33, 10**6])
def test_scores_return_to_their_rows(budget: int) -> None:
    scores = score_rows(readable_score, batch_of(), ALL, budget)
    assert scores.dtype == torch.float32
    assert scores.tolist() == expected_scores([True] * 6)


@pytest.mark.parametrize("budget", [1, 11, 10**6])
def test_rows_that_nobody_asked_for_are_never_run(budget: int) -> None:
    ran: list[int] = []

    def score(input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int) -> torch.Tensor:
        ran.extend(int(ids[mask == 1][0]) for ids, mask in zip(input_ids, attention_mask, strict=True))
        return readable_score(input_ids, attention_mask, width)

    rows = torch.tensor([False, True, False, True, True, False])
    scores = score_rows(score, batch_of(), rows, budget)
    assert scores.tolist() == expected_scores(rows.tolist())
    assert sorted(ran) == [8, 14, 16]
    assert score_rows(score, batch_of(), ~ALL, budget).tolist() == expected_scores([False] * 6)
    assert len(ran) == 3


def test_no_forward_holds_a_column_of_padding_or_more_than_the_budget() -> None:
    def score(input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int) -> torch.Tensor:
        assert attention_mask.sum(0).all()
        lengths = attention_mask.sum(1)
        assert len(lengths) == 1 or len(lengths) * lengths.max() <= 16
        return readable_score(input_ids, attention_mask, width)

    score_rows(score, batch_of(), ALL, 16)


def test_padding_scores_zero_whatever_the_model_says() -> None:
    scores = score_rows(lambda ids, mask, width: torch.full((len(ids), width), torch.nan), batch_of(), ALL, 1000)
    assert torch.equal(scores.isnan(), batch_of().completion_mask == 1)
    assert (scores[batch_of().completion_mask == 0] == 0).all()


@pytest.mark.parametrize(("agreed", "extra"), [(4, 1), (3, 0), (9, 6)])
def test_missing_forwards_run_on_one_token_and_are_dropped(agreed: int, extra: int) -> None:
    calls: list[tuple[tuple[int, ...], int]] = []
    asked: list[int] = []

    def score(input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int) -> torch.Tensor:
        calls.append((tuple(input_ids.shape), width))
        return readable_score(input_ids, attention_mask, width)

    def agree(own: int) -> int:
        assert calls == [], "a rank that is still asked would answer another's forward with this collective"
        asked.append(own)
        return agreed

    # lengths 5, 8, 6, 5, 5, 5 within 16 tokens: (8, 6), (5, 5, 5), (5)
    scores = score_rows(score, batch_of(), ALL, 16, agree)
    assert asked == [3]
    assert len(calls) == 3 + extra
    assert calls[3:] == [((1, 2), 1)] * extra
    assert scores.tolist() == expected_scores([True] * 6)


def test_a_rank_without_rows_runs_only_dummies() -> None:
    calls: list[int] = []

    def score(input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int) -> torch.Tensor:
        calls.append(input_ids.numel())
        return readable_score(input_ids, attention_mask, width)

    scores = score_rows(score, batch_of(), ~ALL, 16, lambda own: own + 2)
    assert calls == [2, 2]
    assert not scores.any()


@pytest.fixture(scope="module")
def model_score() -> Callable:
    model = tiny_model(0).eval()

    @torch.no_grad()
    def score(input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int) -> torch.Tensor:
        logits = model(input_ids, attention_mask=attention_mask).logits[:, -width - 1 : -1]
        return logits.log_softmax(-1).gather(-1, input_ids[:, -width:].unsqueeze(-1)).squeeze(-1)

    return score


@pytest.mark.parametrize("budget", range(1, 60, 6))
def test_a_model_scores_the_same_under_every_budget(model_score: Callable, budget: int) -> None:
    batch = batch_of()
    padded = model_score(*batch.joined(), 7) * batch.completion_mask
    scores = score_rows(model_score, batch, ALL, budget)
    assert (scores - padded).abs().max() < 1e-5
    assert scores.min() < -1


# --- micro-batches ---------------------------------------------------------------------------------------------------
def micro_batch() -> dict:
    """TRL's entries of two rows, padded as if a longer row (prompt 4, completion 5) were in another micro-batch."""
    return {
        "prompt_ids": torch.tensor([[0, 0, 5, 6], [0, 0, 0, 7]]),
        "prompt_mask": torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]]),
        "completion_ids": torch.tensor([[8, 9, 1, 0, 0], [8, 1, 0, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "old_per_token_logps": torch.arange(10.0).view(2, 5),
        "advantages": torch.tensor([1.0, -1.0]),
        "importance_sampling_ratio": torch.ones(2, 1),
        "num_items_in_batch": torch.tensor(17),
        "names": ["a", "b"],
    }


def test_trimming_drops_columns_of_padding_only() -> None:
    inputs = micro_batch()
    trimmed = trim_micro_batch(inputs)
    assert trimmed["prompt_ids"].tolist() == [[5, 6], [0, 7]]
    assert trimmed["prompt_mask"].tolist() == [[1, 1], [0, 1]]
    assert trimmed["completion_ids"].tolist() == [[8, 9, 1], [8, 1, 0]]
    assert trimmed["completion_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert trimmed["tool_mask"].tolist() == [[1, 0, 1], [1, 1, 1]]
    assert trimmed["old_per_token_logps"].tolist() == [[0, 1, 2], [5, 6, 7]]
    for name in ("advantages", "importance_sampling_ratio", "num_items_in_batch", "names"):
        assert trimmed[name] is inputs[name]
    assert inputs["completion_ids"].size(1) == 5


def test_trimming_prompts_as_wide_as_completions_keeps_them_apart() -> None:
    inputs = micro_batch()
    for name in ("prompt_ids", "prompt_mask"):
        inputs[name] = torch.cat([torch.zeros(2, 1, dtype=torch.long), inputs[name]], dim=1)
    assert trim_micro_batch(inputs)["prompt_ids"].tolist() == [[5, 6], [0, 7]]


def test_trimming_rows_without_a_counted_token_keeps_one_column() -> None:
    inputs = micro_batch()
    inputs["completion_mask"] = torch.zeros(2, 5, dtype=torch.long)
    trimmed = trim_micro_batch(inputs)
    assert trimmed["completion_ids"].tolist() == [[8], [8]]
    assert trimmed["old_per_token_logps"].tolist() == [[0.0], [5.0]]
    assert trimmed["importance_sampling_ratio"] is inputs["importance_sampling_ratio"]


def test_widths_stay_multiples() -> None:
    """`pad_to_multiple_of` 4: five prompt tokens take eight columns, three completion tokens four."""
    batch = TokenBatch.from_lists([[5] * 5, [5]], [[6] * 3, [6] * 7], 0, torch.device("cpu"), 4)
    assert (batch.prompt_ids.size(1), batch.completion_ids.size(1)) == (8, 8)
    part = batch.select(torch.tensor([0]))
    assert (part.prompt_ids.size(1), part.completion_ids.size(1)) == (8, 4)
    assert part.prompt_mask.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]
    inputs = {name: getattr(batch, name)[:1] for name in ("prompt_ids", "prompt_mask", "completion_ids")}
    inputs["completion_mask"] = batch.completion_mask[:1]
    trimmed = trim_micro_batch(inputs, 4)
    assert trimmed["prompt_ids"].shape == (1, 8)
    assert trimmed["completion_ids"].shape == (1, 4)
