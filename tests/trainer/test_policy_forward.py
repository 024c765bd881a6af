"""The student's rows and the anchor's rows in one forward, against a forward of each alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_trainer
from torch import Tensor

from sg_opd_trl.models.batch import TokenBatch, joined_rows

CPU = torch.device("cpu")
STUDENT = TokenBatch.from_lists([[5, 6, 7], [8]], [[9, 10, 1], [11, 12, 13, 14]], 0, CPU)
ANCHORS = {
    "shorter": TokenBatch.from_lists([[15]], [[16, 1]], 0, CPU),
    "longer": TokenBatch.from_lists([[15, 16, 17, 18, 19], [20]], [[21, 22, 23, 24, 25, 1], [5, 6]], 0, CPU),
    "longer_prompt": TokenBatch.from_lists([[15, 16, 17, 18, 19]], [[21, 1]], 0, CPU),
    "longer_completion": TokenBatch.from_lists([[15]], [[21, 22, 23, 24, 25, 1]], 0, CPU),
    "same_widths": TokenBatch.from_lists([[15, 16, 17]] * 3, [[5, 6, 7, 1], [8], [9, 10]], 0, CPU),
}


def plain_logps(model: Any, input_ids: Tensor, attention_mask: Tensor, width: int) -> Tensor:
    """Log-probs of the last `width` tokens from the model's logits; 0 at padding."""
    logits = model(input_ids, attention_mask=attention_mask).logits[:, -width - 1 : -1]
    logps = logits.log_softmax(-1).gather(-1, input_ids[:, -width:].unsqueeze(-1)).squeeze(-1)
    return logps * attention_mask[:, -width:]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(0)


@pytest.mark.parametrize("name", ANCHORS)
def test_each_set_of_rows_gets_what_it_gets_alone(model: Any, name: str) -> None:
    anchor = ANCHORS[name]
    ids, mask, width = joined_rows(STUDENT, anchor)
    prompt, longest = max(3, anchor.prompt_ids.size(1)), max(4, anchor.completion_ids.size(1))
    assert (ids.shape, mask.shape, width) == ((2 + len(anchor), prompt + longest),) * 2 + (longest,), "no wider"
    logps = plain_logps(model, ids, mask, width)
    for part, batch in ((logps[:2, :4], STUDENT), (logps[2:, : anchor.completion_ids.size(1)], anchor)):
        expected = plain_logps(model, *batch.joined(), batch.completion_ids.size(1))
        assert expected.min() < -1
        assert (part - expected).abs().max() < 1e-5


def test_without_an_anchor_the_rows_are_untouched() -> None:
    ids, mask, width = joined_rows(STUDENT)
    assert width == 4
    assert all(torch.equal(own, joined) for own, joined in zip(STUDENT.joined(), (ids, mask), strict=True))


def test_a_row_without_tokens_stays_finite(model: Any) -> None:
    batch = TokenBatch.from_lists([[5, 6], [7]], [[8], []], 0, CPU)
    ids, mask, width = joined_rows(batch, ANCHORS["longer"])
    logps = plain_logps(model, ids, mask, width)
    assert torch.isfinite(logps).all()
    assert logps[1, :1].tolist() == [0.0]


@pytest.mark.parametrize("mode", ["sampled_token", "topk_logits"])
@pytest.mark.parametrize("name", [None, *ANCHORS])
def test_one_forward_gives_both_and_what_the_loss_reads_next(tmp_path: Path, name: str | None, mode: str) -> None:
    """The trainer's own forward: log-probs and gradients of both sets of rows are those of plain forwards."""
    settings = {"distillation_mode": mode, "teacher_sampling_enable": False, "lambda_high": 1.0}
    trainer = tiny_trainer(tmp_path, settings=settings | ({"distillation_topk": 4} if mode == "topk_logits" else {}))
    model, anchor, forwards = trainer.model, None if name is None else ANCHORS[name], []
    handle = model.register_forward_hook(lambda module, args, output: forwards.append(output))
    batch = {
        "prompt_ids": STUDENT.prompt_ids, "prompt_mask": STUDENT.prompt_mask,
        "completion_ids": STUDENT.completion_ids, "completion_mask": STUDENT.completion_mask,
        "verdicts": torch.tensor([1.0, 0.0]), "verifier_advantages": torch.tensor([0.7, -0.7]),
        "teacher_logps": torch.full((2, 4), -2.0), "anchor": anchor,
        "teacher_support_ids": torch.arange(8).reshape(2, 1, 4).expand(2, 4, 4),
        "teacher_support_logps": torch.full((2, 4, 4), -1.5),
    }  # fmt: skip
    logps, entropies, _ = trainer.policy_forward(model, batch)
    handle.remove()
    assert len(forwards) == 1
    assert logps.shape == entropies.shape == batch["advantages"].shape == (2, 4)
    expected = plain_logps(model, *STUDENT.joined(), 4)
    assert (logps - expected).abs().max() < 1e-5
    assert logps.requires_grad == (mode == "sampled_token"), "the gradient of a matched token is in its advantage"
    assert batch["advantages"].requires_grad == (mode == "topk_logits")
    if anchor is not None:
        head = model.lm_head.weight
        found = batch["anchor_logps"]
        expected = plain_logps(model, *anchor.joined(), anchor.completion_ids.size(1))
        assert found.shape == anchor.completion_ids.shape
        assert (found - expected).abs().max() < 1e-5
        found, expected = (torch.autograd.grad(x.sum(), head, retain_graph=True)[0] for x in (found, expected))
        assert (found - expected).norm() < 1e-5 * expected.norm()
