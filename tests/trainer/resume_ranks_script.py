"""The same command for a start and for going on, on two ranks that kill themselves once; see `test_resume_ranks`.

Trains one run undisturbed and another that is killed inside a generation batch, and compares their students.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tiny import changed_weights, copied_weights, tiny_data, tiny_trainer
from transformers import TrainerCallback

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


def build(folder: Path, callbacks: list | None = None) -> Any:
    settings = SETTINGS | {"resume_from_checkpoint": True}
    return tiny_trainer(folder, settings=settings, train_dataset=tiny_data(12), callbacks=callbacks or [])


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    whole = build(folder / "whole")
    whole.train()
    cut = build(folder / "cut", [KillOnce(folder / f"killed-{state.process_index}")])
    cut.train()
    if different := changed_weights(cut.model, copied_weights(whole.model)):
        raise RuntimeError(f"rank {state.process_index} ended with other weights: {different}")
    ours, theirs = (
        [{name: entry[name] for name in entry if "time" not in name} for entry in run.state.log_history]
        for run in (cut, whole)
    )
    if theirs and ours[:-1] != theirs[:-1]:
        raise RuntimeError(f"rank {state.process_index} logged something else: {ours} {theirs}")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
