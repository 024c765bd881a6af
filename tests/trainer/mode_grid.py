"""Every mode of the trainer and what it is combined with; for `test_mode_grid` and the two ranks that it launches.

Rollouts are functions of the prompt and of the row, so that any two cells of the grid can be compared.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset
from teachers.test_parity import lora, merged, save_adapter
from tiny import (
    ANCHOR,
    StepRecorder,
    changed_weights,
    copied_weights,
    inject_rollouts,
    inject_teacher_rollouts,
    tiny_data,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
)

from sg_opd_trl import AdapterTeacher, LocalTeacher, SGOPDConfigError, core
from sg_opd_trl.teachers import RoutedTeacher

CHARACTERS = "0123456789+=abcdefg\n "
NEWLINE, TWO = (tiny_tokenizer(CHARACTERS).get_vocab()[character] for character in "\n2")
#: Values under which no two routes are the same. SGD: Adam would blow up the rounding of weights without a gradient.
COMMON = {
    "lambda_base": 1.25, "disagree_interp_beta": 0.5, "gate_dead_zone": 0.05, "stability_tau": 0.3,
    "distillation_topk": 4, "teacher_sampling_enable": False, "teacher_sampling_ratio": 0.5, "optim": "sgd",
    "learning_rate": 0.05, "max_grad_norm": 1e9,
}  # fmt: skip
CONSTANT = ANCHOR | {"teacher_sampling_enable": True}
PHASED = {
    "teacher_sampling_enable": True,
    "teacher_sampling_phase1_end_frac": 0.5,
    "teacher_sampling_phase2_end_frac": 1.0,
}
GATE_OFF = {"sign_gated_extrapolation": False}
DRIFT = {"drift_gate_tau": 20.0}
SPECIAL = {"special_token_mask": ["2", "<eos>"]}
KINDS = ("sampled_token", "topk_logits", "full_logits", "asymmetric")
#: name -> settings on top of the mode's; "lora" and "accumulation" are ours.
AXES: dict[str, dict] = {
    "alone": {},
    "LoRA": {"lora": True},
    "two updates": {"num_iterations": 2},
    "anchor": CONSTANT,
    "accumulation": {"accumulation": 2},
    "together": {"lora": True, "num_iterations": 2, "accumulation": 2} | CONSTANT,
}


class Mode(NamedTuple):
    """Settings of a mode, and what makes the trainer's other arguments in a folder of the run."""

    settings: dict
    arguments: Callable[[Path], dict] = lambda folder: {}


def own_reference(folder: Path) -> dict:
    return {"reference_model": tiny_model(2)}


def several_teachers(folder: Path) -> dict:
    data = tiny_data().add_column("teacher_id", ["even", "odd"] * 8)
    teachers = {"even": tiny_model(1), "odd": tiny_model(3)}
    return {"teacher_model": teachers, "train_dataset": data} | own_reference(folder)


def routed_teacher(folder: Path) -> dict:
    given = several_teachers(folder)
    teachers = {name: LocalTeacher(model) for name, model in given["teacher_model"].items()}
    return given | {"teacher_model": RoutedTeacher(teachers)}


def teacher_prompt(folder: Path) -> dict:
    rows = tiny_data().to_list()
    for place, row in enumerate(rows):
        question = row["prompt"][0]["content"]
        own = [{"role": "user", "content": f"ba{question}"}]
        rows[place] = row | {"teacher_prompt": None if place % 4 == 1 else own}
    return {"train_dataset": Dataset.from_list(rows)}


def adapter_teacher(folder: Path) -> dict:
    return {"teacher_model": AdapterTeacher(save_adapter(folder / "adapter"))}


def merged_teacher(folder: Path) -> dict:
    return {"teacher_model": merged(save_adapter(folder / "adapter"))}


MODES: dict[str, Mode] = {
    "gate": Mode({}),
    **{kind: Mode({"distillation_mode": kind}) for kind in KINDS[1:]},
    "OPD": Mode(GATE_OFF | {"lambda_base": 1.0}),
    "OPD with a reference": Mode(GATE_OFF | {"lambda_base": 1.0}, own_reference),
    "ExOPD": Mode(GATE_OFF, own_reference),
    # Two inner updates start from the student's own scores as the reference's, where A(beta) = beta * a2.
    **{name: Mode({"disagree_mode": name}, own_reference) for name in core.DISAGREE_MODES},
    "neutral as conflict": Mode({"neutral_mode": "conflict"}),
    "IW-OPD": Mode({"iw_opd_gamma": 0.5}),
    "drift gate, 64 tokens": Mode(DRIFT | {"drift_gate_block": "64"}),
    "drift gate, 2 tokens": Mode(DRIFT | {"drift_gate_block": "2"}),
    "drift gate, lines": Mode(DRIFT | {"drift_gate_block": "newline"}),
    "drift gate, absolute": Mode(DRIFT | {"drift_gate_block": "2", "drift_gate_mean": "absolute"}),
    "special tokens, first": Mode(SPECIAL),
    "special tokens, all": Mode(SPECIAL | {"special_token_mask_scope": "all"}),
    "special tokens, dapo": Mode(SPECIAL | {"loss_type": "dapo"}),
    "truncated rollouts masked": Mode({"mask_truncated_completions": True}),
    "random gate": Mode({"gate_signal": "random"}),
    "fixed wrong rollouts": Mode({"wrong_rollout_advantage": -1.0}),
    "stability of the batch": Mode({"stability_norm": "batch"}),
    "stability, plain": Mode({"stability_norm": "none"}),
    "no stability weight": Mode({"stability_tau": None}),
    "several teachers": Mode({}, several_teachers),
    "RoutedTeacher": Mode({}, routed_teacher),
    "teacher_prompt": Mode({}, teacher_prompt),
    "AdapterTeacher": Mode({}, adapter_teacher),
    "adapter merged": Mode({}, merged_teacher),
    "phased anchor": Mode(PHASED),
    "TimeSep": Mode(PHASED | {"teacher_sampling_time_separated": True}),
}


class Cell(NamedTuple):
    """What came out of a cell of the grid.

    Attributes:
        refused: message of the refusal at construction; "" if it was trained.
        gradients: of each optimizer step.
        weights: before the first step.
        changed: names of the weights that changed.
        logs: logged values of each step.
        batches: generation batches of the student.
    """

    refused: str = ""
    gradients: list[dict[str, torch.Tensor]] = []  # noqa: RUF012  # never changed
    weights: dict[str, torch.Tensor] = {}  # noqa: RUF012
    changed: list[str] = []  # noqa: RUF012
    logs: list[dict[str, float]] = []  # noqa: RUF012
    batches: int = 0


def write(prompt: list[int], row: int) -> list[int]:
    """A student rollout of 3 to 6 tokens on two lines, a token twice in the longer ones; only row 3 ends itself."""
    ids = [5 + row % 8, TWO, NEWLINE, 9 + (row + len(prompt)) % 5, TWO, 1 if row == 3 else 20]
    return ids[: 3 + row % 4]


def teach(prompt: list[int]) -> list[int]:
    """A teacher rollout of 2 to 5 tokens."""
    return [5 + len(prompt) % 4, 20, NEWLINE, 21, 1][: 2 + len(prompt) % 4]


def verdicts(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Right where the first token is odd; none for the last row of a batch."""
    return [None if ids[0] == 12 else float(ids[0] % 2 == 1) for ids in completion_ids]


def build(folder: Path, axis: str, mode: str, kind: str | None = None) -> tuple[Any, StepRecorder]:
    """The trainer of a cell, its rollouts and the teacher's given; the global batch is that of one process."""
    recorder, settings = StepRecorder(), COMMON | AXES[axis] | MODES[mode].settings
    settings |= {} if kind is None else {"distillation_mode": kind}
    accumulation = settings.pop("accumulation", 1)
    settings["gradient_accumulation_steps"] = accumulation
    settings["per_device_train_batch_size"] = 8 // accumulation // PartialState(cpu=True).num_processes
    arguments: dict = {"peft_config": lora()} if settings.pop("lora", False) else {}
    arguments |= {name: tiny_tokenizer(CHARACTERS) for name in ("processing_class", "teacher_processing_class")}
    arguments |= MODES[mode].arguments(folder)
    trainer = tiny_trainer(folder, settings=settings, callbacks=[recorder], reward_funcs=verdicts, **arguments)
    inject_teacher_rollouts(trainer, teach)
    return trainer, recorder


def run(folder: Path, axis: str, mode: str, kind: str | None = None, check: Callable = lambda trainer: None) -> Cell:
    """Train a cell for two steps, and `check` its trainer; or the reason why it is refused."""
    try:
        trainer, recorder = build(folder, axis, mode, kind)
    except SGOPDConfigError as error:
        return Cell(refused=str(error))
    batches: list[int] = []

    def written(prompt: list[int], row: int) -> list[int]:
        batches.append(row)
        return write(prompt, row)

    inject_rollouts(trainer, written)
    before = copied_weights(trainer.model)
    trainer.train()
    check(trainer)
    rows = 8 // trainer.accelerator.num_processes
    logs = [{k: v for k, v in entry.items() if k != "step"} for entry in trainer.state.log_history[:-1]]
    changed = changed_weights(trainer.model, before)
    return Cell("", recorder.steps, recorder.weights[0], changed, logs, len(batches) // rows)


@cache
def run_once(folder: Path, axis: str, mode: str, kind: str | None = None) -> Cell:
    """`run`, for cells that several tests look at."""
    return run(folder, axis, mode, kind)
