"""Bad input at the first batch: an error of our own class before any update, every weight unchanged bit for bit."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    ANCHOR,
    changed_weights,
    copied_weights,
    inject_rollouts,
    inject_teacher_rollouts,
    logged,
    parity_verifier,
    tiny_model,
    tiny_trainer,
)

from sg_opd_trl import NonFiniteError, VerifierError
from sg_opd_trl.errors import NonFiniteTeacherError
from sg_opd_trl.models.forward import ForwardOutput

# What is skipped where that is allowed has tests of its own.
NONE_SKIPPED = {"max_skipped_steps": 0}
OFF = {"teacher_sampling_enable": False} | NONE_SKIPPED
NO_REFERENCE = OFF | {"lambda_high": 1.0}


def check_untouched(trainer: Any, error: type[Exception], *said: str) -> None:
    """Training ends with the error, no step was taken and no weight changed."""
    before = copied_weights(trainer.model)
    with pytest.raises(error) as caught:
        trainer.train()
    assert type(caught.value) in (error, NonFiniteTeacherError)
    missing = [words for words in said if words not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert trainer.state.global_step == 0
    assert changed_weights(trainer.model, before) == []


def verdict(value: Any, index: int = 5) -> Callable[..., list]:
    """A verifier that answers `value` for one rollout and 1 or 0 for the others."""

    def odd_verifier(completion_ids: list[list[int]], **_: Any) -> list:
        verdicts: list = parity_verifier([], completion_ids)
        verdicts[min(index, len(verdicts) - 1)] = value
        return verdicts

    return odd_verifier


def always_right(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [1.0] * len(completion_ids)


def poisoned(model: Any, value: float = math.nan) -> Any:
    """A model with one bad entry in its output layer, as it becomes; one that is so from the start is refused."""
    with torch.no_grad():
        model.lm_head.weight[7, 0] = value
    return model


def test_the_checks_below_can_see_an_update(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=OFF)
    before = copied_weights(trainer.model)
    trainer.train()
    assert len(changed_weights(trainer.model, before)) == len(before)


@pytest.mark.parametrize("settings", [OFF, ANCHOR])
def test_an_id_that_the_teacher_lacks_is_left_out_and_counted(tmp_path: Path, settings: dict) -> None:
    settings = settings | {"max_steps": 1}
    trainer = tiny_trainer(tmp_path, settings=settings, model=tiny_model(0, vocab_size=30))
    inject_rollouts(trainer, lambda prompt, row: [6, 7, 28, 8] if row == 5 else [6, 7])
    trainer.train()
    assert logged(trainer, "teacher/unusable_tokens") == [2.0], "28, and what follows it"


def test_an_id_that_the_reference_lacks_is_left_out_and_counted(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path,
        settings=OFF | {"max_steps": 1},
        model=tiny_model(0, vocab_size=30),
        teacher_model=tiny_model(1, vocab_size=30),
        reference_model=tiny_model(2),
    )
    inject_rollouts(trainer, lambda prompt, row: [6 + row % 2, 7, 28])
    trainer.train()
    assert logged(trainer, "teacher/unusable_tokens") == [8.0], "one of each rollout"


@pytest.mark.parametrize("value", [0.5, -1.0, 2, math.inf, -math.inf])
def test_a_verdict_that_is_neither_right_nor_wrong(tmp_path: Path, value: float) -> None:
    trainer = tiny_trainer(tmp_path, settings=OFF, reward_funcs=verdict(value))
    check_untouched(
        trainer, VerifierError, "`odd_verifier`", f"got {value:g}", "1 (right), 0 (wrong) or None", "Return 1.0, 0.0"
    )


def test_a_verdict_on_a_teacher_rollout_that_is_neither(tmp_path: Path) -> None:
    def odd_verifier(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [0.5] if len(completion_ids) == 1 else parity_verifier([], completion_ids)

    trainer = tiny_trainer(tmp_path, settings=ANCHOR, reward_funcs=odd_verifier)
    check_untouched(trainer, VerifierError, "`odd_verifier`", "got 0.5")


def test_the_wrong_number_of_verdicts_on_teacher_rollouts(tmp_path: Path) -> None:
    def short_verifier(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [] if len(completion_ids) == 1 else parity_verifier([], completion_ids)

    trainer = tiny_trainer(tmp_path, settings=ANCHOR, reward_funcs=short_verifier)
    check_untouched(trainer, VerifierError, "`short_verifier`", "one verdict per completion, got 0 for 1")


@pytest.mark.parametrize("value", [True, False, 1, 0, None, math.nan, 1.0])
def test_accepted_verdicts(tmp_path: Path, value: Any) -> None:
    trainer = tiny_trainer(tmp_path, settings=OFF | {"max_steps": 1}, reward_funcs=verdict(value))
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("mode", ["sampled_token", "topk_logits", "asymmetric", "full_logits"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_teacher_with_a_bad_weight(tmp_path: Path, value: float, mode: str) -> None:
    settings = OFF | {"distillation_mode": mode, "distillation_topk": 4}
    trainer = tiny_trainer(tmp_path, settings=settings)
    poisoned(trainer.teacher.model, value)
    check_untouched(
        trainer, NonFiniteError, "The teacher gave", "not finite", "in row 0", "Check the teacher's weights"
    )


def test_a_teacher_with_a_bad_weight_that_writes_rollouts(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=ANCHOR)
    poisoned(trainer.teacher.model)
    check_untouched(trainer, NonFiniteError, "teacher", "not finite", "Check the teacher's weights")


@pytest.mark.parametrize("mode", ["sampled_token", "topk_logits"])
def test_a_reference_with_a_bad_weight(tmp_path: Path, mode: str) -> None:
    settings = OFF | {"distillation_mode": mode, "distillation_topk": 4}
    trainer = tiny_trainer(tmp_path, settings=settings, reference_model=tiny_model(2))
    poisoned(trainer.reference.model)
    check_untouched(trainer, NonFiniteError, "The reference gave", "Check the reference's weights")


@pytest.mark.parametrize("scores", [0.5, -math.inf, math.nan])
def test_a_teacher_score_that_is_no_log_prob(tmp_path: Path, scores: float, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path, settings=OFF)

    def score(input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int) -> ForwardOutput:
        logps = torch.full((input_ids.size(0), completion_length), -1.0)
        logps[2, 0] = scores
        return ForwardOutput(logps, None, None, None)

    monkeypatch.setattr(trainer.teacher, "_forward", score)
    check_untouched(
        trainer, NonFiniteError, "The teacher gave 1 log-probs", f"the first {scores}", "completion token 0"
    )


def test_a_student_with_a_bad_weight(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=NO_REFERENCE)
    poisoned(trainer.model)
    inject_rollouts(trainer, lambda prompt, row: [6 + row % 2, 8, 1])
    before = copied_weights(trainer.model)
    with pytest.raises(NonFiniteError, match=r"of step 1 are not finite\. Nothing was updated.*student's weights"):
        trainer.train()
    names = changed_weights(trainer.model, before)
    assert names == ["lm_head.weight"], "NaN is not equal to itself; nothing else may differ"
    assert torch.equal(trainer.model.lm_head.weight.nan_to_num(9.0), before["lm_head.weight"].nan_to_num(9.0))


def test_advantages_that_are_not_finite(tmp_path: Path) -> None:
    from sg_opd_trl import SGOPDTrainer

    class Overflowing(SGOPDTrainer):
        def compute_token_weights(self, *args: Any) -> torch.Tensor:
            return super().compute_token_weights(*args) * math.inf

    trainer = tiny_trainer(tmp_path, settings=NONE_SKIPPED, trainer_class=Overflowing)
    check_untouched(trainer, NonFiniteError, "advantages", "of step 1")


def test_an_anchor_that_is_not_finite(tmp_path: Path) -> None:
    from sg_opd_trl import SGOPDTrainer

    class Overflowing(SGOPDTrainer):
        def anchor_loss(self, *args: Any) -> torch.Tensor:
            return super().anchor_loss(*args) * math.nan

    trainer = tiny_trainer(
        tmp_path, settings=ANCHOR | NONE_SKIPPED, trainer_class=Overflowing, reward_funcs=always_right
    )
    inject_teacher_rollouts(trainer, lambda prompt: [6, 1])
    check_untouched(trainer, NonFiniteError, "losses of step 1")


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(tmp_path: Path, value: float, max_grad_norm: float) -> None:
    """With `max_grad_norm` 0 nothing is clipped, and the norm must be guarded all the same."""
    trainer = tiny_trainer(tmp_path, settings=OFF | {"max_grad_norm": max_grad_norm})
    trainer.model.model.embed_tokens.weight.register_hook(lambda gradient: gradient * value)
    check_untouched(trainer, NonFiniteError, "gradient norm of step 1 is", "as they were before", "`learning_rate`")


def test_a_late_failure_leaves_the_weights_of_the_step_before(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=OFF | {"max_steps": 3})
    states: list[dict] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        states.append(copied_weights(trainer.model))
        return gradient * (math.nan if trainer.state.global_step == 1 else 1.0)

    trainer.model.lm_head.weight.register_hook(spoil)
    with pytest.raises(NonFiniteError, match="of step 2"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert changed_weights(trainer.model, states[-1]) == []
    assert changed_weights(trainer.model, states[0]) != []
