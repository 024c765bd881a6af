"""One optimizer step on the same global batch, on one process or two: what reaches the optimizer and the logs.

Launched on two processes by `test_distributed`, and called by it in its own process. Ranks are seeded differently, so
rollouts are functions of the prompt and of the row in the global batch.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tiny import (
    ANCHOR,
    GradientRecorder,
    inject_rollouts,
    inject_teacher_rollouts,
    tiny_data,
    tiny_model,
    tiny_trainer,
)
from two_ranks import recorded_collectives

from sg_opd_trl import NonFiniteError, TeacherAnchorCallback

COMPARED = ("gate/", "teacher/", "anchor/", "reward", "entropy", "completions/", "grad_norm", "loss", "eval_")
BOTH, ONE_RANK, NONE = [0, 2, 1, 4], [0, 1, 2, 3], [1, 3, 5, 7]
# name -> (settings, rows of the teacher's prompts: even rows are verified, and slot i is dealt to rank i % 2)
CASES: dict[str, tuple[dict, list[int]]] = {
    "verified on both ranks": ({}, BOTH),
    "verified on one rank only": ({}, ONE_RANK),
    "verified on no rank": ({}, NONE),
    "two micro-batches": ({"gradient_accumulation_steps": 2, "global_batch": 4}, BOTH),
    "two micro-batches, one rank only": ({"gradient_accumulation_steps": 2, "global_batch": 4}, ONE_RANK),
    "a group over both ranks": ({"num_generations": 8}, ONE_RANK),
    "more ranks than teacher prompts": ({"teacher_sampling_ratio": 0.3}, ONE_RANK),
    "anchor per rollout": ({"teacher_sft_reduction": "seq_mean", "teacher_sft_phi": "dft"}, ONE_RANK),
    "anchor as a sum": ({"teacher_sft_reduction": "sum"}, BOTH),
    "tokens of the whole batch": ({"loss_type": "dapo", "stability_norm": "batch", "stability_tau": 0.3}, ONE_RANK),
    # 2 prompts per step: each rank's rollouts have one teacher, and the other is asked for nothing.
    "a teacher per rank": ({"several_teachers": True}, BOTH),
    "no verdict on one rank": ({"verifier": "first rows"}, NONE),
    "nothing counts on one rank": ({"write": "first rows", "mask_truncated_completions": True}, ONE_RANK),
    "empty completions on one rank": ({"rollout_func": True, "teacher_sampling_enable": False}, NONE),
    "an end token and nothing else": ({"write": "every third", "num_generations": 8}, ONE_RANK),
    "advantages of the whole batch": ({"scale_rewards": "batch", "teacher_sampling_enable": False}, NONE),
}


class FixedPrompts(TeacherAnchorCallback):
    """The teacher's prompts are chosen rows of the data set."""

    def __init__(self, rows: list[int] | None = None) -> None:
        super().__init__()
        self.rows = rows or []

    def reserved_examples(self, trainer: Any, step: int, prompts: int) -> list[dict]:
        return [trainer.train_dataset[row] for row in self.rows[:prompts]]


def even_rows_are_right(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] % 2 == 1) if ids else 0.0 for ids in completion_ids]


def write(prompt: list[int], row: int) -> list[int]:
    """A student rollout of 2 to 5 tokens."""
    return [5 + (3 * row + len(prompt)) % 7, 7, 9 + row, 11, 1][: 2 + row % 4]


def write_in_first_rows(prompt: list[int], row: int) -> list[int]:
    """The last of two ranks finishes nothing."""
    return [*write(prompt, row)[:4], 1] if row < 4 else write(prompt, row)[:3]


def write_in_first_rows_alone(prompts: list, trainer: Any) -> dict:
    """A `rollout_func`, as nothing else may write nothing: the last of two ranks does not."""
    prompt_ids, first = trainer.tokenize_prompts(prompts), trainer.accelerator.process_index * len(prompts)
    written = [write(ids, first + row) if first + row < 4 else [] for row, ids in enumerate(prompt_ids)]
    return {"prompt_ids": prompt_ids, "completion_ids": written, "logprobs": [[-1.0] * len(ids) for ids in written]}


def write_but_every_third(prompt: list[int], row: int) -> list[int]:
    return [1] if row % 3 == 1 else write(prompt, row)


def judge_first_rows(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """No verdict on the rollouts of the last of two ranks, of which the third token tells the row."""
    rows = [ids[2] - 9 if len(ids) > 2 and ids[1] == 7 else 0 for ids in completion_ids]
    late = any(row >= 4 for row in rows) and len(rows) < 8
    verdicts = even_rows_are_right(completion_ids)
    if len(rows) == 8:
        return [*verdicts[:4], None, None, None, None]
    return [None if late else verdict for verdict in verdicts]


WRITERS = {
    "first rows": write_in_first_rows,
    "every third": write_but_every_third,
}
VERIFIERS = {"first rows": judge_first_rows}


def teach(prompt: list[int]) -> list[int]:
    """A teacher rollout of 2 to 4 tokens that starts with the prompt's first digit, whose id is odd in even rows."""
    return [prompt[1], 20, 21, 1][: 2 + prompt[1] % 3]


def build(folder: Path, settings: dict, rows: list[int], **arguments: Any) -> tuple[Any, GradientRecorder]:
    recorder = GradientRecorder()
    defaults = ANCHOR | {"max_steps": 1, "max_grad_norm": 1e9, "teacher_sampling_ratio": 0.6, "global_batch": 8}
    chosen: dict = defaults | settings
    batch = chosen.pop("global_batch") // PartialState(cpu=True).num_processes
    chosen |= {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
    if chosen.pop("several_teachers", False):
        arguments["teacher_model"] = {"even": tiny_model(1), "odd": tiny_model(3)}
        arguments["train_dataset"] = tiny_data().add_column("teacher_id", ["even", "odd"] * 8)
    callbacks: list = [recorder]
    if chosen.get("teacher_sampling_enable", True):
        callbacks.append(FixedPrompts(rows))
    if chosen.pop("rollout_func", False):
        arguments["rollout_func"] = write_in_first_rows_alone
    models_write = chosen.pop("models_write", False)
    verifier = VERIFIERS.get(chosen.pop("verifier", ""), even_rows_are_right)
    writer = WRITERS.get(chosen.pop("write", ""), write)
    trainer = tiny_trainer(folder, settings=chosen, callbacks=callbacks, reward_funcs=verifier, **arguments)
    if not models_write:
        inject_rollouts(trainer, writer)
        inject_teacher_rollouts(trainer, teach)
    return trainer, recorder


def compared(trainer: Any) -> dict[str, float]:
    """The logged values that must not depend on the number of processes."""
    # TRL averages the entropy over micro-batches, into which each rank shuffles its own rows, and over ranks.
    apart = (
        trainer.args.gradient_accumulation_steps > 1 or trainer.args.mask_truncated_completions or trainer.rollout_func
    )
    left_out = {"entropy"} if apart else set()
    return {
        name: value
        for entry in trainer.state.log_history
        for name, value in entry.items()
        if name.startswith(COMPARED) and "time" not in name and "per_second" not in name and name not in left_out
    }


def check_same_weights(trainer: Any) -> None:
    """Ranks that drift apart would go unnoticed in the logs."""
    own = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    ranks = trainer.accelerator.gather(own.unsqueeze(0))
    if not all(torch.equal(own, other) for other in ranks):
        raise RuntimeError("the ranks ended with different weights")


def counted_forwards(trainer: Any) -> list[int]:
    """One entry for each forward of the student with gradient: as many gradients are exchanged."""
    forwards, run_policy = [], trainer.run_policy

    def counted(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            forwards.append(1)
        return run_policy(*args, **kwargs)

    trainer.run_policy = counted
    return forwards


def run_cases(folder: Path) -> dict[str, dict]:
    """Every case: gradient, metrics, and an evaluation with the teacher."""
    results: dict[str, dict] = {}
    for name, (settings, rows) in CASES.items():
        trainer, recorder = build(folder, settings, rows)
        forwards = counted_forwards(trainer)
        with recorded_collectives() as collectives:
            trainer.train()
        check_same_weights(trainer)
        results[name] = {"gradient": recorder.steps[0], "metrics": compared(trainer)}
        results[name]["ranks"] = gather_object([{"collectives": collectives, "forwards": len(forwards)}])
    # Three prompts are a global batch and a half.
    trainer, _ = build(folder, {"eval_with_teacher": True}, NONE, eval_dataset=tiny_data(3))
    trainer.evaluate()
    results["evaluation"] = {"gradient": {}, "metrics": compared(trainer)}
    return results


def shared_prompts(folder: Path) -> float:
    """Rollouts on shared prompts, which each rank takes from its own: only their number can be compared."""
    trainer, _ = build(folder, {"teacher_sampling_prompts": "share"}, NONE)
    trainer.train()
    check_same_weights(trainer)
    return compared(trainer)["anchor/rollouts"]


def error_on_every_rank(folder: Path) -> list[str]:
    """Advantages that are not finite on the last rank alone: what each rank ends with."""
    trainer, _ = build(folder, {"teacher_sampling_enable": False, "max_skipped_steps": 0}, NONE)
    weights = trainer.compute_token_weights
    if trainer.accelerator.process_index == trainer.accelerator.num_processes - 1:
        trainer.compute_token_weights = lambda *arguments: weights(*arguments) * torch.nan
    try:
        trainer.train()
        raised = 0
    except NonFiniteError:
        raised = 1
    ranks = trainer.accelerator.gather(torch.tensor([raised, trainer.state.global_step])).view(-1, 2)
    return [f"raised={raised} steps={steps}" for raised, steps in ranks.tolist()]


def fail_on_one_rank(folder: Path) -> None:
    """The last rank's teacher rollout gets a verdict that is none; the run must end on every rank."""
    trainer, _ = build(folder, {}, BOTH)
    last = trainer.accelerator.process_index == trainer.accelerator.num_processes - 1
    trainer.reward_funcs[0] = trainer.verifier.function = lambda completion_ids, **_: [
        0.5 if last and len(completion_ids) < 3 else 1.0 for _ in completion_ids
    ]
    trainer.train()


def main(action: str, output: str) -> None:
    """Run on two ranks; the main process saves what came out."""
    state = PartialState(cpu=True)
    if state.num_processes != 2:
        raise RuntimeError(f"two processes are needed, got {state.num_processes}")
    with tempfile.TemporaryDirectory() as folder:
        if action == "fail":
            fail_on_one_rank(Path(folder))
        results: dict = run_cases(Path(folder))
        results["shared"] = shared_prompts(Path(folder))
        results["errors"] = error_on_every_rank(Path(folder))
    if state.is_main_process:
        torch.save(results, output)
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    # Two words: what to do, and the file for the main process.
    main(*sys.argv[1:])
