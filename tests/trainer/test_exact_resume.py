"""A resumed run is the uninterrupted run bit for bit, wherever it was interrupted."""

import datetime
import decimal
from pathlib import Path
from typing import Any

import pytest
from tiny import changed_weights, copied_weights, tiny_data, tiny_trainer

PHASES = {"teacher_sampling_phase1_end_frac": 0.5, "teacher_sampling_phase2_end_frac": 0.8}
SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2} | PHASES
SMALL = {"per_device_train_batch_size": 4, "num_generations": 4}
BOTH = {"steps_per_generation": 4, "num_iterations": 2}
OFF = {"teacher_sampling_enable": False}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "inside a generation batch": (SMALL | {"steps_per_generation": 4}, 16),
    "several updates on a batch": (SMALL | {"num_iterations": 2}, 16),
    "both, accumulated": (SMALL | BOTH | {"gradient_accumulation_steps": 2}, 16),
    "after an epoch": (SMALL, 3),
    "in the third epoch, inside a batch": (SMALL | {"steps_per_generation": 2}, 4),
    "prompts shared with the anchor": (
        SMALL | {"steps_per_generation": 2, "teacher_sampling_prompts": "share", "num_iterations": 2},
        16,
    ),
    "distributions": (
        SMALL | {"steps_per_generation": 4, "distillation_mode": "topk_logits", "distillation_topk": 4},
        16,
    ),
    "LoRA with dropout, evaluated": (
        SMALL
        | {"steps_per_generation": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4},
        16,
    ),
    "a stream": (SMALL | OFF | {"steps_per_generation": 4}, 32),
}


def arguments_of(case: str) -> dict[str, Any]:
    settings, rows = CASES[case]
    arguments: dict[str, Any] = {
        "settings": SETTINGS | settings | {"shuffle_dataset": True},
        "train_dataset": tiny_data(rows),
    }
    if "LoRA" in case:
        peft = pytest.importorskip("peft")
        arguments["peft_config"] = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.3)
        arguments["eval_dataset"] = tiny_data(2)
    if case == "a stream":
        arguments["train_dataset"] = arguments["train_dataset"].to_iterable_dataset()
    return arguments


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, case: str) -> None:
    straight = tiny_trainer(tmp_path / "straight", **arguments_of(case))
    straight.train()
    weights = copied_weights(straight.model)
    for step in (1, 3, 5):
        resumed = tiny_trainer(tmp_path / f"from {step}", **arguments_of(case))
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert changed_weights(resumed.model, weights) == [], step
        for ours, theirs in zip(resumed.state.log_history, straight.state.log_history, strict=True):
            same = {name for name in theirs if "time" not in name and not name.startswith(("train_", "eval_"))}
            assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}, step


INSIDE = SETTINGS | OFF | SMALL | {"steps_per_generation": 2, "max_steps": 2}


def test_rows_of_the_data_set_may_hold_dates_and_decimals(tmp_path: Path) -> None:
    """They are in a checkpoint inside a generation batch, and torch reads nothing that it does not know."""
    data = tiny_data(8).add_column("price", [decimal.Decimal("1.5")] * 8)
    data = data.add_column("written", [datetime.datetime(2026, 1, 1 + row) for row in range(8)])
    straight = tiny_trainer(tmp_path / "straight", train_dataset=data, settings=INSIDE)
    straight.train()
    resumed = tiny_trainer(tmp_path / "again", train_dataset=data, settings=INSIDE)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-1"))
    assert changed_weights(resumed.model, copied_weights(straight.model)) == []


def test_values_that_cannot_be_read_again_are_told_of_when_they_are_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zoned = [datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)] * 8
    data = tiny_data(8).add_column("written", zoned)
    tiny_trainer(tmp_path, train_dataset=data, settings=INSIDE).train()
    assert caplog.text.count("hold values that a checkpoint cannot keep") == 1
    resumed = tiny_trainer(tmp_path / "again", train_dataset=data, settings=INSIDE)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2


def test_a_second_training_does_not_use_the_rollouts_of_the_first(tmp_path: Path) -> None:
    settings = SETTINGS | SMALL | {"max_steps": 3, "steps_per_generation": 4, "save_strategy": "no"}
    trainer = tiny_trainer(tmp_path, settings=settings)
    trainer.train()
    assert trainer.rollouts_state()["step"] == 3
    generated: list[int] = []
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda *args, **kwargs: generated.append(1) or generate(*args, **kwargs)
    trainer.train()
    assert generated == [1], "new rollouts, at the first step"
