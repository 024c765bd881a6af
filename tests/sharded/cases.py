"""Runs that a launch of several ranks and one process do alike: every log, and the student that is saved.

Rollouts are functions of the prompt and of the row in the global batch, as ranks are seeded differently. Settings vary
one at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig
from teachers.test_parity import save_adapter
from tiny import save_pair, tiny_data, tiny_model
from trainer.distributed_script import BOTH, COMPARED, NONE, ONE_RANK, build

from sg_opd_trl import AdapterTeacher, NonFiniteError, SGOPDConfigError, preflight
from sharded.launches import COLLECTIVE_PATIENCE


def nothing(folder: Path) -> dict:
    return {}


def lora(folder: Path) -> dict:
    return {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")}


def from_folders(folder: Path) -> dict:
    """Models that transformers loads: a launch may have it split them while it does."""
    models = {"model": folder / "student-before", "teacher_model": folder / "teacher"}
    with PartialState(cpu=True).main_process_first():
        for seed, place in enumerate(models.values()):
            if not place.exists():
                save_pair(place, seed)
    return {name: str(place) for name, place in models.items()}


def own_reference(folder: Path) -> dict:
    return {"reference_model": tiny_model(2)}


def adapter_teacher(folder: Path) -> dict:
    place = folder / "adapter"
    with PartialState(cpu=True).main_process_first():
        if not place.exists():
            save_adapter(place)
    return lora(folder) | {"teacher_model": AdapterTeacher(str(place))}


def uneven_evaluation(folder: Path) -> dict:
    """Three prompts: a global batch and a half."""
    return {"eval_dataset": tiny_data(3)}


class Case(NamedTuple):
    """A run of two steps.

    Attributes:
        settings: on top of the defaults.
        rows: of the teacher's prompts; even rows are verified, and slot i is dealt to rank i % 2.
        arguments: makes further arguments of the trainer in a folder.
    """

    settings: dict = {}  # noqa: RUF012  # only read
    rows: list[int] = ONE_RANK
    arguments: Callable[[Path], dict] = nothing


#: Of these the models are checked before the first step; others are spared what takes as long as training them.
CHECKED = ("default", "checked before the start", "LoRA", "LoRA, top-K")
EVALUATION = {"eval_strategy": "steps", "eval_steps": 1, "eval_with_teacher": True}
#: Whatever the random numbers of a rank are; the teacher has two prompts on one rank and one on the other.
GREEDY = {"models_write": True, "top_k": 1, "max_tokens_per_scoring_batch": 12}
MOVING = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}
TWO_MICRO_BATCHES = {"gradient_accumulation_steps": 2, "global_batch": 4}
CASES: dict[str, Case] = {
    "default": Case(),
    "from folders": Case(arguments=from_folders),
    "verified on no rank": Case(rows=NONE),
    "more ranks than teacher prompts": Case({"teacher_sampling_ratio": 0.3}),
    "models write": Case(GREEDY),
    "gradient checkpointing": Case({"gradient_checkpointing": True}),
    "two micro-batches": Case(TWO_MICRO_BATCHES),
    "two updates": Case({"num_iterations": 2}),
    "a group over both ranks": Case({"num_generations": 8}),
    "nothing counts on one rank": Case({"write": "first rows", "mask_truncated_completions": True}),
    "empty completions on one rank": Case({"rollout_func": True, "teacher_sampling_enable": False}, NONE),
    "tokens of the whole batch": Case({"loss_type": "dapo", "stability_norm": "batch", "stability_tau": 0.3}),
    "TimeSep": Case({"teacher_sampling_time_separated": True}),
    "top-K": Case({"distillation_mode": "topk_logits", "distillation_topk": 4}),
    "asymmetric": Case({"distillation_mode": "asymmetric", "distillation_topk": 4}),
    "whole distributions": Case({"distillation_mode": "full_logits"}),
    "several teachers": Case({"several_teachers": True}, BOTH),
    "own reference": Case(arguments=own_reference),
    "penalty to the initial student": Case({"beta": 0.1}, arguments=from_folders),
    "measured dead zone": Case({"gate_dead_zone": "auto"}),
    "checked before the start": Case({"preflight": True}),
    "evaluation": Case(EVALUATION, arguments=uneven_evaluation),
    "a moving reference": Case(MOVING, arguments=from_folders),
    "LoRA": Case(arguments=lora),
    "LoRA, gradient checkpointing": Case({"gradient_checkpointing": True}, arguments=lora),
    "LoRA, models write": Case(GREEDY, arguments=lora),
    "LoRA, top-K": Case({"distillation_mode": "topk_logits", "distillation_topk": 4}, arguments=lora),
    "an adapter as teacher": Case(arguments=adapter_teacher),
    "bfloat16": Case({"bf16": True}),
    "LoRA, bfloat16": Case({"bf16": True}, arguments=lora),
}


#: Of these only what rounding leaves alone can be compared.
HALF = ("bfloat16", "LoRA, bfloat16")

#: What a launch runs that leaves the weights whole: forwards are nobody's business but the rank's own.
OF_WHOLE_WEIGHTS = (
    *("default", "from folders", "more ranks than teacher prompts", "models write", "gradient checkpointing"),
    *("two micro-batches", "empty completions on one rank", "top-K", "whole distributions", "several teachers"),
    *("evaluation", "a moving reference", "LoRA", "LoRA, gradient checkpointing", "an adapter as teacher"),
    "bfloat16",
)


def run_case(name: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """What comes out of a case: its logs and the folder of its student, or the words in which it is refused."""
    if name in ACTIONS:
        return ACTIONS[name](folder, settings)
    try:
        trainer = make(CASES[name], folder, settings)
    except SGOPDConfigError as error:
        return {"refused": str(error)}
    with nullcontext() if name in CHECKED else unchecked():
        trainer.train()
    trainer.save_model(str(folder / "student"))
    return {"logs": logs(trainer), "student": str(folder / "student")}


def make(case: Case, folder: Path, settings: dict) -> Any:
    """The trainer of a case."""
    chosen = {"max_steps": 2, "preflight": False, "ddp_timeout": COLLECTIVE_PATIENCE} | case.settings | settings
    folder.mkdir(parents=True, exist_ok=True)
    return build(folder / "run", chosen, case.rows, **case.arguments(folder))[0]


def loss_that_is_not_finite(folder: Path, settings: dict) -> dict[str, Any]:
    """In the second step, on the last rank alone: what became of the run on this rank."""
    trainer = make(Case({"teacher_sampling_enable": False}), folder, settings)
    weigh, last = trainer.compute_token_weights, trainer.accelerator.process_index == trainer.processes - 1

    def weigh_wrongly(*arguments: Any) -> torch.Tensor:
        weights = weigh(*arguments)
        return weights * torch.nan if last and trainer.state.global_step == 1 else weights

    trainer.compute_token_weights = weigh_wrongly
    raised = ""
    with unchecked():
        try:
            trainer.train()
        except NonFiniteError as error:
            raised = str(error)
    return {"raised": raised, "steps": trainer.state.global_step, "skipped": trainer.skipped.total}


def weight_that_is_not_finite(folder: Path, settings: dict) -> dict[str, Any]:
    """In the last rank's shard alone: what this rank is told by saving the student, and what is there then."""
    trainer = make(Case({"max_steps": 1}), folder, settings)
    with unchecked():
        trainer.train()
    if trainer.accelerator.process_index == trainer.processes - 1:
        shards = (p.ds_tensor if hasattr(p, "ds_tensor") else p.to_local() for p in trainer.model.parameters())
        next(shard for shard in shards if shard.numel()).data.view(-1)[0] = torch.nan
    raised = ""
    try:
        trainer.save_model(str(folder / "student"))
    except NonFiniteError as error:
        raised = str(error)
    return {"raised": raised, "files": sorted(path.name for path in (folder / "student").glob("*"))}


ACTIONS = {
    "a loss that is not finite": loss_that_is_not_finite,
    "a weight that is not finite": weight_that_is_not_finite,
}
"""What is not compared with one process; each says what became of it on this rank."""


@contextmanager
def unchecked() -> Iterator[None]:
    """Have models not scored on made-up rows before the first step, which takes as long as training tiny ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "_check_models", lambda run: [])
        yield


def logs(trainer: Any) -> list[dict[str, float]]:
    """What was logged and must not depend on the number of processes, entry by entry."""
    # TRL averages the entropy over micro-batches, into which each rank shuffles its own rows, and over ranks.
    args = trainer.args
    apart = args.gradient_accumulation_steps > 1 or args.mask_truncated_completions or trainer.rollout_func
    left_out = {"entropy", "eval_entropy"} if apart else set()

    def compared(name: str) -> bool:
        return name.startswith(COMPARED) and "time" not in name and "per_second" not in name and name not in left_out

    return [{name: value for name, value in entry.items() if compared(name)} for entry in trainer.state.log_history]
