"""The same command for a start and for going on, on two ranks that kill themselves once; see `test_resume_ranks`.

Trains one run undisturbed, one that fails on one rank, and one that is killed, both inside a generation batch, and
compares their students.
"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tiny import changed_weights, copied_weights, tiny_data, tiny_trainer
from transformers import TrainerCallback

from sg_opd_trl import RankError

PHASES = {"teacher_sampling_phase1_end_frac": 0.5, "teacher_sampling_phase2_end_frac": 0.8}
SETTINGS = PHASES | {
    "per_device_train_batch_size": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 3,
    "learning_rate": 1e-2,
    "shuffle_dataset": True,
    "teacher_sampling_ratio": 0.6,
}
KILLED_IN = 8  # steps are 4 to a pass over a generation batch: the checkpoint before is of step 6, in the second pass


class KillOnce(TrainerCallback):
    """Kills this rank in a step, unless that was done before."""

    def __init__(self, done: Path) -> None:
        self.done = done

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == KILLED_IN and not self.done.exists():
            self.done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class FailOnTheLastRank(TrainerCallback):
    """In that step it alone raises."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == KILLED_IN and PartialState().process_index == 1:
            raise ZeroDivisionError


def build(folder: Path, callbacks: list | None = None) -> Any:
    settings = SETTINGS | {"resume_from_checkpoint": True}
    return tiny_trainer(folder, settings=settings, train_dataset=tiny_data(12), callbacks=callbacks or [])


def check_same(run: Any, whole: Any) -> None:
    """Weights and logs of a run that was interrupted are those of the whole one."""
    rank = PartialState().process_index
    if different := changed_weights(run.model, copied_weights(whole.model)):
        raise RuntimeError(f"rank {rank} ended with other weights: {different}")
    ours, theirs = (
        [{name: e[name] for name in e if "time" not in name} for e in each.state.log_history if "loss" in e]
        for each in (run, whole)
    )
    if ours != theirs or len(ours) != SETTINGS["max_steps"]:
        raise RuntimeError(f"rank {rank} logged something else: {ours} {theirs}")


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    whole = build(folder / "whole")
    whole.train()
    with suppress(ZeroDivisionError, RankError):
        build(folder / "failed", [FailOnTheLastRank()]).train()
    if not (folder / "failed" / f"checkpoint-{KILLED_IN - 1}").exists():
        raise RuntimeError("the last finished step was not kept")
    failed = build(folder / "failed")
    failed.train()
    check_same(failed, whole)
    cut = build(folder / "cut", [KillOnce(folder / f"killed-{state.process_index}")])
    cut.train()
    check_same(cut, whole)
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
