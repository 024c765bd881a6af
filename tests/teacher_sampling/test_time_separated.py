"""TimeSep: the anchor alone in stage 1, the student's loss alone in stage 2."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    GradientRecorder,
    StepRecorder,
    inject_rollouts,
    inject_teacher_rollouts,
    logged,
    relative_difference,
    tiny_config,
    tiny_trainer,
)

from sg_opd_trl.errors import NonFiniteError, SGOPDConfigError

SMALL = {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 3,
    "max_grad_norm": 1e9,
    "weight_decay": 0.0,
}
# Stage 1 is step 1 of 4, SG-OPD's anchor has a weight above 0 in steps 1 and 2.
SEPARATED = SMALL | {
    "teacher_sampling_time_separated": True,
    "teacher_sampling_phase1_end_frac": 0.25,
    "teacher_sampling_phase2_end_frac": 0.75,
    "max_steps": 4,
}


def all_right(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [1.0] * len(completion_ids)


def written(prompt: list[int]) -> list[int]:
    return [6 + len(prompt) % 3, 8, 1]


def run(folder: Path, settings: dict, **arguments: Any) -> tuple[Any, StepRecorder, list[list[int]], list[list[int]]]:
    """A run, its gradients and weights, and the prompts that student and teacher wrote for."""
    recorder, student, teacher = StepRecorder(), [], []
    trainer = tiny_trainer(folder, settings=settings, callbacks=[recorder], **arguments)

    def write(prompt: list[int], row: int) -> list[int]:
        student.append(prompt)
        return [5 + row % 4, 7, 1]

    def teach(prompt: list[int]) -> list[int]:
        teacher.append(prompt)
        return written(prompt)

    inject_rollouts(trainer, write)
    inject_teacher_rollouts(trainer, teach)
    trainer.train()
    return trainer, recorder, student, teacher


def anchor_gradient(weights: dict, prompts: list[list[int]], alpha: float) -> dict:
    """Gradient of alpha times the token mean of CHORD-weighted cross-entropies, row by row, without padding."""
    from tiny import tiny_model

    model = tiny_model(0)
    model.load_state_dict(weights, strict=False)
    model.eval()
    total = sum(len(written(prompt)) for prompt in prompts)
    loss = torch.zeros(())
    for prompt in prompts:
        completion = written(prompt)
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1)[range(len(completion)), completion]
        raw = logps.detach().exp() * (1 - logps.detach().exp())
        loss = loss - (logps * raw / raw.mean()).sum() / total
    (alpha * loss).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stage_one_is_the_anchors_gradient_alone(tmp_path: Path, accumulation: int) -> None:
    settings = SEPARATED | {"gradient_accumulation_steps": accumulation, "teacher_sampling_ratio": 0.5}
    if accumulation == 2:
        settings |= {"per_device_train_batch_size": 2}
    trainer, recorder, _, teacher = run(tmp_path, settings, reward_funcs=all_right)
    # 2 student prompts at rho 0.5: 2 teacher prompts a step, in steps 1 and 2 of SG-OPD, all 4 in stage 1.
    assert len(teacher) == 4
    expected = anchor_gradient(recorder.weights[0], teacher, alpha=0.2)
    assert relative_difference(recorder.steps[0], expected) < 1e-5
    assert logged(trainer, "anchor/rollouts") == [4.0]
    assert logged(trainer, "anchor/alpha") == pytest.approx([0.2, 0.0, 0.0, 0.0])


def test_the_student_writes_and_the_teacher_scores_in_stage_two_only(tmp_path: Path) -> None:
    calls: list[int] = []

    class Counting(type(tiny_trainer(tmp_path))):  # type: ignore[misc]
        def score_with_teacher(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(self.state.global_step + 1)
            return super().score_with_teacher(*args, **kwargs)

        def score_with_reference(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(self.state.global_step + 1)
            return super().score_with_reference(*args, **kwargs)

    trainer, _, student, _ = run(tmp_path, SEPARATED, trainer_class=Counting)
    assert len(student) == 3 * 4
    assert set(calls) == {2, 3, 4}
    assert len(logged(trainer, "teacher/kl_k1")) == 3
    assert len(logged(trainer, "anchor/loss")) == 1


def test_stage_two_is_the_students_loss_on_the_prompts_that_sg_opd_would_see(tmp_path: Path) -> None:
    """Stage 2 from the same weights is a run without teacher sampling, whose first step saw the first prompts."""
    _, recorder, student, _ = run(tmp_path / "a", SEPARATED | {"shuffle_dataset": True})
    plain = SEPARATED | {"shuffle_dataset": True, "teacher_sampling_enable": False}
    plain |= {"teacher_sampling_time_separated": False}
    _, _, everything, _ = run(tmp_path / "b", plain)
    assert student == everything[4:]

    class Reset(GradientRecorder):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                for name, parameter in kwargs["model"].named_parameters():
                    parameter.copy_(recorder.weights[state.global_step][name])

    reset = Reset()
    trainer = tiny_trainer(tmp_path / "c", settings=plain, callbacks=[reset])
    inject_rollouts(trainer, lambda prompt, row: [5 + row % 4, 7, 1])
    trainer.train()
    for step in (1, 2, 3):
        assert relative_difference(recorder.steps[step], reset.steps[step]) < 1e-5
    assert relative_difference(recorder.steps[0], reset.steps[0]) > 0.1


def test_as_many_teacher_rollouts_as_the_phased_run(tmp_path: Path) -> None:
    settings = SEPARATED | {"max_steps": 7, "teacher_sampling_phase1_end_frac": 0.43, "teacher_sampling_ratio": 0.3}
    _, _, _, separated = run(tmp_path / "a", settings)
    _, _, _, phased = run(tmp_path / "b", settings | {"teacher_sampling_time_separated": False})
    # P1 = 3, P2 = 5, alpha above 0 in steps 1 to 4, one prompt a step: 0-1, 1-2, 2-4 of the same stream
    assert separated == phased
    assert len(separated) == 4


def test_a_step_without_a_verified_rollout_changes_nothing(tmp_path: Path) -> None:
    def all_wrong(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [0.0] * len(completion_ids)

    _, recorder, _, teacher = run(tmp_path, SEPARATED, reward_funcs=all_wrong)
    assert teacher
    assert all(not value.any() for value in recorder.steps[0].values())
    assert recorder.steps[0].keys() == recorder.steps[1].keys()


def test_an_anchor_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=SEPARATED, reward_funcs=all_right)
    inject_teacher_rollouts(trainer, written)
    with torch.no_grad():
        trainer.model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="step 1"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_evaluation_and_logged_completions_work_in_stage_one(tmp_path: Path) -> None:
    from tiny import tiny_data

    settings = SEPARATED | {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    settings |= {"max_steps": 2, "teacher_sampling_phase1_end_frac": 0.5, "log_completions": True}
    trainer, _, _, _ = run(tmp_path, settings, eval_dataset=tiny_data(4))
    assert len(logged(trainer, "eval_reward")) == 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("teacher_sampling_enable", False),
        ("teacher_sampling_prompts", "share"),
        ("teacher_sampling_phase1_end_frac", 0.0),
        ("teacher_sft_alpha_start", 0.0),
    ],
)
def test_what_leaves_stage_one_without_a_meaning_is_refused(tmp_path: Path, setting: str, value: Any) -> None:
    with pytest.raises(SGOPDConfigError, match=rf"`teacher_sampling_time_separated=True`.*{setting}"):
        tiny_config(tmp_path, teacher_sampling_time_separated=True, **{setting: value})
