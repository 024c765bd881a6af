import math
import statistics

import pytest
import torch

from sg_opd_trl.core import verifier_group_advantages

NAN = math.nan


def slow_advantages(verdicts: list[float], size: int, scale: str, epsilon: float) -> list[float]:
    judged = [v for v in verdicts if not math.isnan(v)]
    result = []
    for start in range(0, len(verdicts), size):
        group = verdicts[start : start + size]
        heard = [v for v in group if not math.isnan(v)]
        for verdict in group:
            if math.isnan(verdict) or len(set(heard)) < 2:
                result.append(0.0)
                continue
            spread = {"group": statistics.stdev(heard), "batch": statistics.stdev(judged), "none": None}[scale]
            centred = verdict - statistics.fmean(heard)
            result.append(centred if spread is None else centred / (spread + epsilon))
    return result


def test_two_right_of_eight() -> None:
    # mean .25, unbiased std sqrt((2 * .5625 + 6 * .0625) / 7) = .46291; .75 / .46301 = 1.6198, -.25 / .46301 = -.5399
    verdicts = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0])
    advantages = verifier_group_advantages(verdicts, 8)
    expected = torch.where(verdicts == 1, 1.6198, -0.5399)
    torch.testing.assert_close(advantages, expected, atol=5e-5, rtol=0)
    finer = verifier_group_advantages(verdicts, 8, epsilon=1e-6)
    torch.testing.assert_close(finer, torch.where(verdicts == 1, 1.6202, -0.5401), atol=5e-5, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("seed", range(5))
def test_against_loop(scale: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    verdicts = torch.randint(0, 2, (24,), generator=generator).double()
    verdicts[torch.rand(24, generator=generator) < 0.25] = NAN
    advantages = verifier_group_advantages(verdicts, 4, scale=scale)
    expected = torch.tensor(slow_advantages(verdicts.tolist(), 4, scale, 1e-4), dtype=torch.float64)
    assert (expected == 0).any() and (expected != 0).any()
    torch.testing.assert_close(advantages, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "group",
    [[0.11] * 3, [1.0] * 3, [0.0] * 3, [NAN, 0.1, 0.1], [NAN, NAN, 1.0], [NAN] * 3],
)
def test_no_variance_is_exactly_zero(scale: str, group: list[float]) -> None:
    # In float32 the mean of three 0.11 is not 0.11.
    verdicts = torch.tensor([*group, 1.0, 0.0, 1.0])
    advantages = verifier_group_advantages(verdicts, 3, scale=scale)
    assert torch.equal(advantages[:3], torch.zeros(3))
    assert (advantages[3:] != 0).all()


def test_abstention_is_neither_right_nor_wrong() -> None:
    # Without the abstaining row: mean .5, std sqrt(2 * .25) = .70711; +-.5 / .70721 = +-.70701
    advantages = verifier_group_advantages(torch.tensor([1.0, NAN, 0.0]), 3)
    torch.testing.assert_close(advantages, torch.tensor([0.70701, 0.0, -0.70701]), atol=1e-5, rtol=0)


def test_groups_permute_and_rows_permute_within() -> None:
    verdicts = torch.tensor([1.0, 0, 0, NAN, 1, 1, 0, NAN, 0])
    order = torch.tensor([8, 6, 7, 1, 2, 0, 5, 3, 4])
    whole = verifier_group_advantages(verdicts, 3)
    torch.testing.assert_close(verifier_group_advantages(verdicts[order], 3), whole[order])


def test_dtype_gradient_and_empty() -> None:
    advantages = verifier_group_advantages(torch.tensor([1.0, 0.0], dtype=torch.bfloat16), 2)
    assert advantages.dtype == torch.float32
    assert not verifier_group_advantages(torch.tensor([1.0, 0.0], requires_grad=True), 2).requires_grad
    assert verifier_group_advantages(torch.zeros(0), 4).shape == (0,)
    assert torch.equal(verifier_group_advantages(torch.tensor([1.0, 0.0]), 1), torch.zeros(2))


def test_refusals() -> None:
    verdicts = torch.tensor([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"`num_generations` must be >= 1 and divide the number of verdicts 3, got 2"):
        verifier_group_advantages(verdicts, 2)
    with pytest.raises(ValueError, match=r"`num_generations` must be >= 1"):
        verifier_group_advantages(verdicts, 0)
    with pytest.raises(ValueError, match=r"`scale` must be one of group, batch, none, got 'sequence'"):
        verifier_group_advantages(verdicts, 3, scale="sequence")
    with pytest.raises(ValueError, match=r"`epsilon` must be >= 0.0 and finite, got nan"):
        verifier_group_advantages(verdicts, 3, epsilon=NAN)
    with pytest.raises(ValueError, match=r"`verdicts` must have 1 dimension"):
        verifier_group_advantages(verdicts[None], 3)
    with pytest.raises(TypeError, match=r"`verdicts` must have a floating dtype, got torch.bool"):
        verifier_group_advantages(verdicts.bool(), 3)
