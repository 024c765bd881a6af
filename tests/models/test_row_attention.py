"""Attention of packed rows: which rows meet in a call, and that nothing of a model is changed for good."""

import pytest
import torch
from tiny import tiny_model

from sg_opd_trl.models.forward import IMPLEMENTATION, Places, _attend, _plan, rows_apart, rows_between


def rows_of(*lengths: int) -> list[Places]:
    return rows_between(torch.tensor([0, *lengths]).cumsum(0))


def test_rows_of_like_length_share_a_call() -> None:
    plan = _plan(rows_of(4, 10, 9, 3, 8))
    assert plan.calls == ((3, 10), (1, 4), (1, 3)), "10, 9 and 8; 4; 3 is less than 0.8 of 4"


def test_rows_in_order_and_apart_are_not_copied() -> None:
    plan = _plan(rows_of(10, 6, 3))
    assert plan.into is None
    assert plan.back is None


@pytest.mark.parametrize("lengths", [(1,), (5, 5), (4, 10, 9, 3, 8), (1, 1, 7), (3, 30, 29, 2, 1, 28)])
@pytest.mark.parametrize("window", [None, 4])
def test_against_each_row_alone(lengths: tuple[int, ...], window: int | None) -> None:
    """A loop over rows and queries in float64."""
    torch.manual_seed(0)
    tokens, heads, groups, size = sum(lengths), 4, 2, 8
    query = torch.randn(1, heads, tokens, size, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, heads // groups, tokens, size, dtype=torch.float64) for _ in range(2))
    module = torch.nn.Module()
    module.num_key_value_groups = groups  # type: ignore[assignment]
    module.is_causal = True  # type: ignore[assignment]
    rows = rows_of(*lengths)
    with rows_apart(tiny_model(0), rows):
        result, _ = _attend(module, query, key, value, None, sliding_window=window, scaling=0.3)
    assert result.shape == (1, tokens, heads, size)
    expected = torch.zeros_like(result)
    for row in rows:
        start = int(row[0])
        for position in range(len(row)):
            first = 0 if window is None else max(0, position - window + 1)
            seen = slice(start + first, start + position + 1)
            for head in range(heads):
                scores = key[0, head // groups, seen] @ query[0, head, start + position] * 0.3
                expected[0, start + position, head] = scores.softmax(0) @ value[0, head // groups, seen]
    assert (result - expected).abs().max() < 1e-9
    weights = torch.randn_like(result)
    ours, theirs = (torch.autograd.grad((weights * x).sum(), query, retain_graph=True)[0] for x in (result, expected))
    assert (ours - theirs).abs().max() < 1e-9


def test_the_model_is_as_before_also_after_an_error() -> None:
    model = tiny_model(0)
    with pytest.raises(KeyError), rows_apart(model, rows_of(3)):
        assert model.config._attn_implementation == IMPLEMENTATION
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
