"""The student's rows and the anchor's rows in one forward, against a forward of each alone."""

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.trainer import JointForward

CPU = torch.device("cpu")
STUDENT = TokenBatch.from_lists([[5, 6, 7], [8]], [[9, 10, 1], [11, 12, 13, 14]], 0, CPU)
ANCHORS = {
    "shorter": TokenBatch.from_lists([[15]], [[16, 1]], 0, CPU),
    "longer": TokenBatch.from_lists([[15, 16, 17, 18, 19], [20]], [[21, 22, 23, 24, 25, 1], [5, 6]], 0, CPU),
    "longer_prompt": TokenBatch.from_lists([[15, 16, 17, 18, 19]], [[21, 1]], 0, CPU),
    "longer_completion": TokenBatch.from_lists([[15]], [[21, 22, 23, 24, 25, 1]], 0, CPU),
    "same_widths": TokenBatch.from_lists([[15, 16, 17]] * 3, [[5, 6, 7, 1], [8], [9, 10]], 0, CPU),
}


class Policy:
    """Log-probs, entropies and a stand-in for the auxiliary loss; 0 at padding, as TRL's forward gives."""

    def __init__(self) -> None:
        self.model = tiny_model(0)
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        self.shapes.append(tuple(input_ids.shape))
        logits = self.model(input_ids, attention_mask=attention_mask).logits[:, -width - 1 : -1]
        every, mask = logits.log_softmax(-1), attention_mask[:, -width:]
        logps = every.gather(-1, input_ids[:, -width:].unsqueeze(-1)).squeeze(-1)
        return logps * mask, -(every.exp() * every).sum(-1) * mask, torch.tensor(float(len(input_ids)))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy()


def alone(policy: Policy, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    logps, entropies, _ = policy(*batch.joined(), batch.completion_ids.size(1))
    return logps, entropies


@pytest.mark.parametrize("name", ANCHORS)
def test_each_set_of_rows_gets_what_it_gets_alone(policy: Policy, name: str) -> None:
    anchor, given = ANCHORS[name], []
    forward = JointForward(anchor, lambda logps: given.append(logps) or logps)
    policy.shapes.clear()
    logps, entropies, auxiliary = forward(policy, *STUDENT.joined(), 4)
    prompt, width = max(3, anchor.prompt_ids.size(1)), max(4, anchor.completion_ids.size(1))
    assert policy.shapes == [(2 + len(anchor), prompt + width)], "one forward, no wider than needed"
    assert given[0] is logps
    assert auxiliary == 2 + len(anchor)
    expected_logps, expected_entropies = alone(policy, STUDENT)
    assert logps.shape == entropies.shape == (2, 4)
    assert (logps - expected_logps).abs().max() < 1e-5
    assert (entropies - expected_entropies).abs().max() < 1e-5
    expected_anchor, _ = alone(policy, anchor)
    assert forward.anchor_logps.shape == anchor.completion_ids.shape
    assert (forward.anchor_logps - expected_anchor).abs().max() < 1e-5
    assert expected_anchor.min() < -1


def test_gradients_reach_both_and_stay_apart(policy: Policy) -> None:
    anchor = ANCHORS["longer"]
    forward = JointForward(anchor, lambda logps: logps)
    logps, _, _ = forward(policy, *STUDENT.joined(), 4)
    head = policy.model.lm_head.weight
    joint_student, joint_anchor = (
        torch.autograd.grad(part.sum(), head, retain_graph=True)[0] for part in (logps, forward.anchor_logps)
    )
    expected_student, expected_anchor = (
        torch.autograd.grad(alone(policy, batch)[0].sum(), head)[0] for batch in (STUDENT, anchor)
    )
    assert (joint_student - expected_student).norm() < 1e-5 * expected_student.norm()
    assert (joint_anchor - expected_anchor).norm() < 1e-5 * expected_anchor.norm()


def test_without_an_anchor_the_forward_is_untouched(policy: Policy) -> None:
    given: list[Tensor] = []
    seen: list[tuple] = []

    def run(*arguments: object) -> tuple[Tensor, None, None]:
        seen.append(arguments)
        return logps, None, None

    logps, (ids, mask) = torch.zeros(2, 4), STUDENT.joined()
    forward = JointForward(None, lambda logps: given.append(logps) or logps)
    assert forward(run, ids, mask, 4) == (logps, None, None)
    assert seen == [(ids, mask, 4)]
    assert given == [logps]
    assert forward.anchor_logps is None


def test_entropies_and_auxiliary_loss_may_be_absent(policy: Policy) -> None:
    forward = JointForward(ANCHORS["longer"], lambda logps: logps)
    logps, entropies, auxiliary = forward(
        lambda ids, mask, width: (policy(ids, mask, width)[0], None, None), *STUDENT.joined(), 4
    )
    assert entropies is auxiliary is None
    assert logps.shape == (2, 4)


def test_the_signals_are_merged_after_the_forward_and_before_its_result_is_read(policy: Policy) -> None:
    order: list[str] = []

    def run(ids: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        order.append("forward")
        return policy(ids, mask, width)

    def merge(logps: Tensor) -> Tensor:
        order.append("merge")
        assert logps.requires_grad
        assert logps.shape == (2, 4)
        return 2 * logps.detach()

    logps, _, _ = JointForward(ANCHORS["longer"], merge)(run, *STUDENT.joined(), 4)
    assert order == ["forward", "merge"]
    assert (logps - 2 * alone(policy, STUDENT)[0]).abs().max() < 1e-5, "TRL goes on with what the callback returns"


def test_a_student_row_without_tokens_stays_finite(policy: Policy) -> None:
    batch = TokenBatch.from_lists([[5, 6], [7]], [[8], []], 0, CPU)
    forward = JointForward(ANCHORS["longer"], lambda logps: logps)
    logps, _, _ = forward(policy, *batch.joined(), 1)
    assert torch.isfinite(logps).all()
    assert torch.isfinite(forward.anchor_logps).all()
    assert logps[1].tolist() == [0.0]
