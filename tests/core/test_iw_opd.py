"""`prefix_importance_weight` against the loss of TRL 1.16's `experimental.iw_opd`."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from sg_opd_trl.core import prefix_importance_weight, reverse_kl_advantage

GAMMA = 0.5


@pytest.mark.filterwarnings("ignore::UserWarning")  # that the trainer is experimental
def test_gradient_and_weights_are_those_of_trl() -> None:
    from trl.experimental.iw_opd import IWOPDTrainer

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 11, (5, 7), generator=generator)
    lengths = torch.tensor([7, 3, 1, 5, 0])
    mask = torch.arange(7) < lengths[:, None]
    teacher, rollout = (-3 * torch.rand(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    metrics: dict = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        temperature=1.0,
        iw_opd_gamma=GAMMA,
        iw_opd_epsilon=1e-8,
        model=SimpleNamespace(training=True),
        _metrics=metrics,
    )
    labels = tokens.masked_fill(~mask, -100)
    theirs = IWOPDTrainer._compute_iw_opd_loss(trainer, logits, tokens, labels, teacher, rollout, mask.sum())
    (their_gradient,) = torch.autograd.grad(theirs, logits)

    a2 = reverse_kl_advantage(rollout, teacher)
    weights = prefix_importance_weight(a2, mask, GAMMA)
    logps = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    ours = -(weights * a2 * logps * mask).sum() / mask.sum()
    (our_gradient,) = torch.autograd.grad(ours, logits)

    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-12, atol=1e-15)
    counted = weights[mask]
    for name, value in {"min": counted.min(), "mean": counted.mean(), "max": counted.max()}.items():
        assert metrics["train"][f"iw_opd/{name}_weight"] == [pytest.approx(value.item(), abs=1e-12)]
    assert counted.max() - counted.min() > 0.2
