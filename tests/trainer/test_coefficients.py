"""From the teacher alone to the rewards alone, in one trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    GradientRecorder,
    inject_rollouts,
    logged,
    parity_verifier,
    same_saved_student,
    save_pair,
    tiny_config,
    tiny_data,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
)
from trl import GRPOConfig, GRPOTrainer

from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.inspection import inspect_run

SETTINGS = {"teacher_sampling_enable": False, "max_steps": 1, "max_grad_norm": 0.0, "preflight": False}
OPD = {"sign_gated_extrapolation": False, "stability_tau": None}


def write(prompt: list[int], row: int) -> list[int]:
    """Rollouts of unequal length, of which the verifier finds some right."""
    return [5 + (row * 3 + step) % 17 for step in range(2 + row % 4)] + [1]


def gradient(folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    trainer = tiny_trainer(folder, settings=SETTINGS | settings)
    inject_rollouts(trainer, write)
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.steps[0]


def test_the_gradient_is_the_sum(tmp_path: Path) -> None:
    """Also with the gate, whose weights and routes are the teacher's alone."""
    for name, mode in {"opd": OPD, "gate": {}}.items():
        teacher = gradient(tmp_path / f"{name}0", **mode)
        reward = gradient(tmp_path / f"{name}1", **mode, task_reward_coef=[1.0], teacher_kl_coef=[0.0])
        both = gradient(tmp_path / f"{name}2", **mode, task_reward_coef=[2.0], teacher_kl_coef=[0.3])
        for weight in teacher:
            expected = 2.0 * reward[weight] + 0.3 * teacher[weight]
            assert torch.allclose(both[weight], expected, atol=1e-6, rtol=1e-4), (name, weight)
        assert any(not torch.allclose(both[weight], teacher[weight], atol=1e-4) for weight in teacher)


@pytest.mark.parametrize("mode", ["topk_logits", "full_logits", "asymmetric"])
def test_the_teachers_coefficient_weighs_losses_over_distributions(tmp_path: Path, mode: str) -> None:
    settings = {"distillation_mode": mode} | ({} if mode == "full_logits" else {"distillation_topk": 8})
    whole = gradient(tmp_path / "1", **settings)
    half = gradient(tmp_path / "2", **settings, teacher_kl_coef=[0.5])
    assert all(torch.allclose(half[weight], 0.5 * whole[weight], atol=1e-7, rtol=1e-5) for weight in whole)
    assert any(weight.abs().max() > 1e-3 for weight in whole.values())


def test_the_defaults_leave_every_bit(tmp_path: Path) -> None:
    one, other = gradient(tmp_path / "1"), gradient(tmp_path / "2", task_reward_coef=0, teacher_kl_coef=[1.0, 1.0])
    assert all(torch.equal(one[weight], other[weight]) for weight in one)


def test_rewards_alone_are_trls_grpo_and_the_teacher_is_not_asked(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "max_grad_norm": 1.0}
    mine = tiny_trainer(
        tmp_path / "mine", settings=SETTINGS | settings | {"task_reward_coef": [1.0], "teacher_kl_coef": [0.0]}
    )
    asked: list[Any] = []
    mine.teacher.score = lambda *given, **named: asked.append(given)  # type: ignore[method-assign]
    ours = {name: getattr(mine.args, name) for name in ("loss_type", "beta", "epsilon", "epsilon_high", "temperature")}
    ours |= {name: getattr(mine.args, name) for name in ("scale_rewards", "lr_scheduler_type", "warmup_steps")}
    ours |= {name: getattr(mine.args, name) for name in ("weight_decay", "adam_beta2", "learning_rate", "seed")}
    shape = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6, "use_cpu": True}
    shape |= {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"}
    shape |= {"shuffle_dataset": False, "logging_steps": 1, "disable_tqdm": True, "mask_truncated_completions": False}
    args = GRPOConfig(output_dir=str(tmp_path / "theirs"), **ours, **shape, **settings)
    theirs = GRPOTrainer(
        model=tiny_model(0),
        reward_funcs=parity_verifier,
        args=args,
        train_dataset=tiny_data(),
        processing_class=tiny_tokenizer(),
    )
    for trainer in (mine, theirs):
        inject_rollouts(trainer, write)
        trainer.train()
    assert not asked
    assert logged(mine, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-6)
    assert logged(mine, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), abs=1e-5)
    assert min(logged(mine, "grad_norm")) > 0
    for (name, one), other in zip(mine.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


def switched(folder: Path, arguments: dict | None = None, **settings: Any) -> Any:
    both = {"task_reward_coef": [0.0, 1.0], "teacher_kl_coef": [1.0, 0.0], "coef_phase_end_fracs": [0.5, 0.5]}
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "max_grad_norm": 1.0}
    return tiny_trainer(folder, settings=SETTINGS | both | steps | settings, **(arguments or {}))


def test_after_the_switch_nothing_is_asked_of_the_teacher(tmp_path: Path) -> None:
    teacher = save_pair(tmp_path / "teacher", 1)
    run = switched(
        tmp_path / "run", teacher_model_name_or_path=teacher, arguments={"teacher_model": None, "model": tiny_model(0)}
    )
    run.train()
    assert not any(weight.numel() for weight in run.teacher.model.parameters())
    assert not any(weight.numel() for weight in run.reference.model.parameters())
    scored = [entry.get("teacher/abs_advantage_mean") for entry in run.state.log_history if "loss" in entry]
    assert [value is not None for value in scored] == [True, True, False, False]
    assert logged(run, "coef/teacher_kl") == [1.0, 1.0, 0.0, 0.0]
    assert logged(run, "coef/task_reward") == [0.0, 0.0, 1.0, 1.0]
    with pytest.raises(SGOPDConfigError, match=r"the teacher .*teacher was freed, which is asked again"):
        run.train()


def test_a_run_without_a_say_of_the_teacher_is_looked_at_and_then_trains(tmp_path: Path) -> None:
    """`sg-opd check` asks the teacher, which is only freed where training begins."""
    teacher = save_pair(tmp_path / "teacher", 1)
    settings = SETTINGS | {"task_reward_coef": [1.0], "teacher_kl_coef": [0.0], "teacher_model_name_or_path": teacher}
    run = tiny_trainer(tmp_path / "run", settings=settings, teacher_model=None)
    rollouts = next(row for row in inspect_run(run).rows if row.name == "rollouts")
    assert "could be made" not in str(rollouts)
    assert not run.teacher.is_freed
    run.train()
    assert run.teacher.is_freed


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_that_goes_on_before_or_after_the_switch_is_the_undisturbed_one(tmp_path: Path, step: int) -> None:
    whole = switched(tmp_path / "whole")
    whole.train()
    whole.save_model(str(tmp_path / "one"))
    again = switched(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    again.save_model(str(tmp_path / "two"))
    assert same_saved_student(tmp_path / "one", tmp_path / "two")


REFUSED = {
    "negative": ({"task_reward_coef": [-1.0]}, "`task_reward_coef` must be one number of at least 0, or two"),
    "three": ({"teacher_kl_coef": [1.0, 0.5, 0.0]}, "`teacher_kl_coef` must be one number of at least 0, or two"),
    "word": ({"teacher_kl_coef": "much"}, "`teacher_kl_coef` must be one number of at least 0, or two"),
    "shares": ({"coef_phase_end_fracs": [0.8, 0.4]}, "`coef_phase_end_fracs` must be two shares of the run"),
    "nothing": ({"teacher_kl_coef": [1.0, 0.0]}, "`task_reward_coef` must be above 0 where `teacher_kl_coef` is 0"),
    "distributions": (
        {"task_reward_coef": [1.0], "distillation_mode": "topk_logits"},
        "`task_reward_coef` must be 0 with distillation_mode='topk_logits'",
    ),
    "anchor": (
        {"task_reward_coef": [1.0], "teacher_kl_coef": [1.0, 0.0], "coef_phase_end_fracs": [0.2, 0.3]}
        | {"teacher_sampling_enable": True},
        "`teacher_sampling_phase2_end_frac` must not be above 0.3",
    ),
    "drift": (
        {"task_reward_coef": [1.0], "teacher_kl_coef": [0.0], "drift_gate_tau": 1.0, "num_iterations": 2},
        "`drift_gate_tau` must be None where `teacher_kl_coef` ends at 0",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_by_name(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(SGOPDConfigError, match=message.replace("[", r"\[")):
        tiny_config(tmp_path, **({"teacher_sampling_enable": False} | settings))
