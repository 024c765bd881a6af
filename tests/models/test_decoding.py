"""The decoding loop: draws with exact probabilities, prefills a prompt once and never runs an ended row."""

import math
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import GenerationConfig

from sg_opd_trl.models import generate as decoding
from sg_opd_trl.models.batch import pad_rows
from sg_opd_trl.models.generate import decode_live_rows, draw_tokens

END = 1
SHORT, LONG, OTHER = [3, 7], [4, 9, 10, 11, 12, 4], [5, 5, 8]


def decoded(model: Any, prompts: list[list[int]], *, on_ended: Any = None, **changes: Any) -> list[list[int]]:
    """Completions, up to and including the end token."""
    settings = {"do_sample": True, "top_k": 0, "eos_token_id": [END], "pad_token_id": 0}
    ids, mask = pad_rows(prompts, 0, left=True)
    config = GenerationConfig(**(settings | changes))
    loop = partial(decode_live_rows, on_ended=on_ended)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, custom_generate=loop)
    rows = output[:, ids.size(1) :].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


def excess(counts: Tensor, expected: Tensor) -> float:
    """Chi-square statistic in standard deviations above its mean; cells that expect fewer than 5 are one cell."""
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum().view(1)]).double()
    wanted = torch.cat([expected[~rare], expected[rare].sum().view(1)]).double()
    freedom = len(wanted) - 1
    statistic = ((observed - wanted).square() / wanted.clamp(min=1e-9)).sum()
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("vocabulary", [5, 128, 300])
def test_tokens_are_drawn_with_their_probabilities(vocabulary: int) -> None:
    torch.manual_seed(0)
    probabilities = (2 * torch.randn(vocabulary)).softmax(0)
    probabilities[[0, 3, vocabulary - 1]] = 0
    probabilities /= probabilities.sum()
    counts = draw_tokens(probabilities.expand(40_000, -1)).bincount(minlength=vocabulary)
    assert not counts[[0, 3, vocabulary - 1]].any()
    assert abs(excess(counts, 40_000 * probabilities)) < 5
    assert excess(counts, 40_000 * (0.9 * probabilities + 0.1 / vocabulary)) > 5, "the statistic must tell them apart"


def test_a_certain_token_is_always_drawn_and_rows_are_their_own() -> None:
    certain = torch.tensor([0, 127, 128, 299, 150])
    drawn = draw_tokens(torch.nn.functional.one_hot(certain, 300).float().repeat(500, 1))
    assert torch.equal(drawn, certain.repeat(500))


@pytest.mark.parametrize(("number", "drawn"), [(0.0, [2, 0]), (0.5, [4, 0]), (1.0, [4, 1])])
def test_the_ends_of_the_unit_interval(number: float, drawn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of 0, or one that rounding lifts to 1, draws no token of probability 0; ties go to the next one."""
    monkeypatch.setattr(torch, "rand_like", lambda total: torch.full_like(total, number))
    probabilities = torch.tensor([[0, 0, 0.5, 0, 0.5, 0], [0.75, 0.25, 0, 0, 0, 0]])
    assert draw_tokens(probabilities).tolist() == drawn


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_probabilities_that_are_not_finite(bad: float) -> None:
    with pytest.raises(RuntimeError, match="probability tensor"):
        draw_tokens(torch.tensor([[0.5, 0.5], [bad, 0.5]]))


def pair_probabilities(model: Any, prompt: list[int], temperature: float, top_k: int) -> dict[tuple[int, ...], float]:
    """Probability of every completion of at most two tokens, in float64, token by token."""

    def following(ids: list[int]) -> list[float]:
        with torch.no_grad():
            logits = (model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature).tolist()
        least = sorted(logits)[-top_k] if top_k else -math.inf
        weights = [math.exp(x) if x >= least else 0.0 for x in logits]
        return [weight / sum(weights) for weight in weights]

    table: dict[tuple[int, ...], float] = {}
    for token, p in enumerate(following(prompt)):
        if token == END:
            table[(token,)] = p
        elif p:
            table |= {(token, second): p * q for second, q in enumerate(following([*prompt, token])) if q}
    return table


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 0), (1.3, 6)])
def test_completions_have_exactly_the_models_distribution(temperature: float, top_k: int) -> None:
    torch.manual_seed(1)
    # A longer neighbour, so that the prompt is padded, and its rows are in two runs.
    prompts = [OTHER] * 6000 + [LONG] + [OTHER] * 6000
    completions = decoded(tiny_model(0), prompts, max_new_tokens=2, temperature=temperature, top_k=top_k)
    counted = Counter(map(tuple, completions[:6000] + completions[6001:]))
    table = pair_probabilities(tiny_model(0).double(), OTHER, temperature, top_k)
    assert abs(sum(table.values()) - 1) < 1e-9
    assert set(counted) <= set(table)
    counts = torch.tensor([counted[pair] for pair in table])
    assert abs(excess(counts, 12_000 * torch.tensor(list(table.values())))) < 5


def test_the_loop_answers_as_that_of_transformers_does() -> None:
    """Padding after the end token included; two end tokens, so that rows end at different places."""
    ids = torch.tensor([[token, 5] for token in range(3, 26)])
    config = GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=[END, 20], pad_token_id=0)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "generation_config": config}
    wanted = tiny_model(2).generate(**arguments)
    assert torch.equal(tiny_model(2).generate(**arguments, custom_generate=decode_live_rows), wanted)
    assert (wanted[:, -1] == 0).any()


def forward_shapes(model: Any) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_a_prompt_is_run_once_and_an_ended_row_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "DROP_SHARE", 1e-9)
    torch.manual_seed(0)
    model = tiny_model(0, std=0.3)
    shapes = forward_shapes(model)
    completions = decoded(model, [SHORT] * 20 + [LONG] * 20, max_new_tokens=40)
    longest = max(map(len, completions))
    # After t tokens, the rows that want more than t are run, one token each; the last token of all is never run.
    wanted = [(sum(len(ids) > t for ids in completions), 1) for t in range(1, longest)]
    assert shapes == [(2, len(LONG)), *wanted]
    assert wanted[-1][0] < 20


def test_ended_rows_leave_in_groups() -> None:
    torch.manual_seed(0)
    model = tiny_model(0, std=0.3)
    shapes = forward_shapes(model)
    completions = decoded(model, [SHORT] * 64, max_new_tokens=40)
    rows = [shape[0] for shape in shapes[1:]]
    assert rows == sorted(rows, reverse=True)
    for t, count in enumerate(rows, start=1):
        live = sum(len(ids) > t for ids in completions)
        assert live <= count
        assert count - live < count * decoding.DROP_SHARE
    assert len(set(rows)) > 4


@pytest.mark.parametrize("share", [1e-9, decoding.DROP_SHARE, 2.0], ids=["at once", "in groups", "never"])
def test_whoever_listens_is_told_of_every_row_as_it_ends(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether ended rows leave the batch or stay; two prompts of different lengths, so that one is padded."""
    monkeypatch.setattr(decoding, "DROP_SHARE", share)
    prompts = [SHORT] * 10 + [LONG] * 10
    told: list[tuple[int, int, list[int]]] = []
    torch.manual_seed(0)
    silent = decoded(tiny_model(0, std=0.3), prompts, max_new_tokens=20)
    torch.manual_seed(0)
    model = tiny_model(0, std=0.3)
    shapes = forward_shapes(model)

    def listen(rows: list[int], completions: list[list[int]]) -> None:
        told.extend((row, len(shapes), ids) for row, ids in zip(rows, completions, strict=True))

    completions = decoded(model, prompts, on_ended=listen, max_new_tokens=20)
    assert completions == silent
    ended = {row: ids for row, ids in enumerate(completions) if ids[-1] == END}
    assert {row: ids for row, _, ids in told} == ended
    assert len(told) == len(ended)
    assert 0 < len(ended) < len(prompts), "some become too long"
    assert all(forwards == len(ids) for _, forwards, ids in told), "at once, not at the end"
