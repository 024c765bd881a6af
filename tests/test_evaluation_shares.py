"""Ranks share the rows of an evaluation: batches of one size, every row once where that can be."""

import itertools

import pytest

from sg_opd_trl import evaluation_shares
from sg_opd_trl.evaluation_shares import EvenShares


def shares(prompts: int, *, batch_size: int, group_size: int, ranks: int) -> list[list[list[int]]]:
    rows = [prompt for prompt in range(prompts) for _ in range(group_size)]
    settings = {"batch_size": batch_size, "group_size": group_size, "ranks": ranks}
    dealt = [EvenShares(rows, rank=rank, **settings) for rank in range(ranks)]
    assert {len(own) for own in dealt} == {len(list(own)) for own in dealt}
    return [list(own) for own in dealt]


def test_the_last_batch_is_shared_and_its_group_lies_on_both_ranks() -> None:
    # 3 prompts of 4 rows, 4 rows a rank: a global batch of 8, and 4 rows left, 2 for each.
    first, second = shares(3, batch_size=4, group_size=4, ranks=2)
    assert first == [[0, 0, 0, 0], [2, 2]]
    assert second == [[1, 1, 1, 1], [2, 2]]


@pytest.mark.parametrize("prompts", range(1, 12))
@pytest.mark.parametrize(
    ("batch_size", "group_size", "ranks"), [(4, 4, 2), (2, 8, 4), (6, 4, 2), (8, 2, 1), (3, 3, 3)]
)
def test_every_row_is_read_once_and_ranks_have_as_many(
    prompts: int, batch_size: int, group_size: int, ranks: int
) -> None:
    dealt = shares(prompts, batch_size=batch_size, group_size=group_size, ranks=ranks)
    together = [list(itertools.chain(*batches)) for batches in zip(*dealt, strict=True)]
    assert list(itertools.chain(*together)) == [prompt for prompt in range(prompts) for _ in range(group_size)]
    assert all(len({len(own) for own in batches}) == 1 for batches in zip(*dealt, strict=True))
    assert all(len(batch) % group_size == 0 for batch in together)


def test_rows_that_cannot_be_shared_are_filled_up_and_told(caplog: pytest.LogCaptureFixture) -> None:
    evaluation_shares._warn_of_filling_up.cache_clear()
    # 4 rows for 8 ranks: 4 are missing, one prompt; 1 prompt more and there would be none.
    dealt = shares(1, batch_size=2, group_size=4, ranks=8)
    assert dealt == [[[0]]] * 8
    assert [record.getMessage() for record in caplog.records] == [
        "The evaluation set has 1 prompts, whose rows 8 processes cannot share evenly: the first 1 are counted twice. "
        "Use more or fewer prompts, or other `num_generations_eval`."
    ]
