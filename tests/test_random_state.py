"""Seeds made of several numbers."""

import torch

from sg_opd_trl.random_state import mixed_seed


def test_seeds_differ_by_every_part_and_fit_a_generator() -> None:
    seeds = {mixed_seed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3
    assert mixed_seed(1, 2) != mixed_seed(2, 1)
    assert all(0 <= seed < 2**63 for seed in (*seeds, mixed_seed(-1), mixed_seed(2**70)))
    torch.Generator().manual_seed(max(seeds))


def test_seeds_are_the_same_on_every_machine_and_in_every_version() -> None:
    """A run resumed elsewhere must draw the same teacher prompts and rollouts."""
    assert mixed_seed(1) == 832573481945861485
    assert mixed_seed(0, 2**63, -5) == 8553183840552491972
