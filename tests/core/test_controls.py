import math

import pytest
import torch

from sg_opd_trl.core import fixed_on_rows, random_gate, sign_consistency_gate


def inputs(seed: int = 0, rows: int = 6, columns: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8)
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    return gate, mask, torch.rand(rows, columns, generator=generator)


def slow_random_gate(gate: torch.Tensor, mask: torch.Tensor, numbers: torch.Tensor) -> list[list[int]]:
    places = [(i, t) for i in range(gate.shape[0]) for t in range(gate.shape[1]) if mask[i, t] and gate[i, t] != 0]
    wanted = sum(gate[place].item() > 0 for place in places)
    chosen = sorted(places, key=lambda place: numbers[place].item())[:wanted]
    return [
        [0 if (i, t) not in places else 1 if (i, t) in chosen else -1 for t in range(gate.shape[1])]
        for i in range(gate.shape[0])
    ]


def test_random_gate_by_hand() -> None:
    # Non-neutral and counted: (0,0) (0,2) (1,1) (1,2), two of them consensus: the two smallest numbers, .1 and .3.
    gate = torch.tensor([[1, 0, -1, 1], [0, 1, -1, -1]], dtype=torch.int8)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    numbers = torch.tensor([[0.9, 0.0, 0.1, 0.0], [0.0, 0.5, 0.3, 0.2]])
    assert random_gate(gate, mask, numbers).tolist() == [[-1, 0, 1, 0], [0, -1, 1, 0]]


@pytest.mark.parametrize("seed", range(8))
def test_random_gate_against_loop(seed: int) -> None:
    gate, mask, numbers = inputs(seed)
    dealt = random_gate(gate, mask, numbers)
    assert dealt.dtype == torch.int8
    assert dealt.tolist() == slow_random_gate(gate, mask, numbers)
    for value in (-1, 0, 1):
        assert ((dealt == value) & mask).sum() == ((gate == value) & mask).sum(), "another share"
    assert not torch.equal(dealt, torch.where(mask, gate, 0))


def test_padding_row_order_and_repetition() -> None:
    gate, mask, numbers = inputs()
    dealt = random_gate(gate, mask, numbers)
    assert torch.equal(random_gate(gate, mask.int(), numbers), dealt)
    junk = torch.ones(6, 3, dtype=torch.int8)
    wider = random_gate(
        torch.cat([gate, junk], 1), torch.cat([mask, junk == 0], 1), torch.cat([numbers, torch.zeros(6, 3)], 1)
    )
    assert torch.equal(wider[:, :9], dealt) and not wider[:, 9:].any()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(random_gate(gate[order], mask[order], numbers[order]), dealt[order])


def test_a_token_is_consensus_as_often_as_the_share_says_whatever_the_verifier_thinks_of_it() -> None:
    a1, a2 = torch.tensor([1.0, -1.0]), torch.tensor([[1.0, -1.0, 1.0, 1.0], [1.0, -1.0, -1.0, 0.0]])
    gate = sign_consistency_gate(a1, a2)
    assert gate.tolist() == [[1, -1, 1, 1], [-1, 1, 1, 0]]  # 5 of 7
    generator, mask = torch.Generator().manual_seed(1), torch.ones(2, 4)
    draws = torch.stack([random_gate(gate, mask, torch.rand(2, 4, generator=generator)) for _ in range(3000)])
    share = (draws > 0).float().mean(0)
    assert share[1, 3] == 0
    assert torch.allclose(share[gate != 0], torch.tensor(5 / 7), atol=0.04)  # 5 standard deviations


def test_empty_and_one_sided_gates_stay_as_they_are() -> None:
    gate, mask, numbers = inputs()
    for same in (torch.zeros_like(gate), gate.abs(), -gate.abs()):
        assert torch.equal(random_gate(same, mask, numbers), torch.where(mask, same, 0))
    assert not random_gate(gate, torch.zeros_like(mask), numbers).any()


def test_fixed_on_rows() -> None:
    values = torch.tensor([[1.0, 2.0], [math.nan, 3.0], [4.0, 5.0]], requires_grad=True)
    fixed = fixed_on_rows(values, torch.tensor([0, 1, 0]), -0.5)
    assert fixed.tolist() == [[1.0, 2.0], [-0.5, -0.5], [4.0, 5.0]]
    assert not fixed.requires_grad
    assert fixed_on_rows(values.double(), torch.tensor([False] * 3), -1.0).dtype == torch.float64


def test_ties_go_to_the_earlier_token() -> None:
    gate, mask, numbers = inputs()
    in_order = torch.arange(54.0).view(6, 9)
    assert torch.equal(random_gate(gate, mask, torch.zeros_like(numbers)), random_gate(gate, mask, in_order))


def test_refusals() -> None:
    gate, mask, numbers = inputs()
    with pytest.raises(ValueError, match=r"`gate` must have the shape of `numbers` \(6, 9\), got \(6, 8\)"):
        random_gate(gate[:, :8], mask, numbers)
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `numbers`"):
        random_gate(gate, mask[:5], numbers)
    with pytest.raises(TypeError, match=r"`numbers` must have a floating dtype"):
        random_gate(gate, mask, gate)
    with pytest.raises(ValueError, match=r"`rows` must have the shape of `the rows of values` \(6,\), got \(5,\)"):
        fixed_on_rows(numbers, mask[:5, 0], -1.0)
    with pytest.raises(ValueError, match=r"`value` must be finite, got nan"):
        fixed_on_rows(numbers, mask[:, 0], math.nan)
