"""SIGKILL at every kind of moment inside the writing of a checkpoint, then the same call again.

Forks a run whose process is killed when the writing of `checkpoint-4` reaches its N-th file operation, forks the same
run again, and says of each N what was there in between and whether the final student is that of an undisturbed run.
`python kill_points_script.py FOLDER NUMBER` prints JSON; run by `test_kill_points.py`, and `make reliability`.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tiny import same_saved_student, tiny_trainer
from transformers import TrainerCallback

# Inside a generation batch, so that the rollouts in use are written too; older checkpoints are pruned.
SETTINGS = {
    **{"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "learning_rate": 1e-2},
    **{"per_device_train_batch_size": 4, "num_generations": 4, "steps_per_generation": 4},
    **{"teacher_sampling_phase1_end_frac": 0.5, "teacher_sampling_phase2_end_frac": 0.8, "shuffle_dataset": True},
}
STEP = 4
# What changes a disk, and what reads it again for the checksums; torch and safetensors write their own files unseen.
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


class Operations(TrainerCallback):
    """Counts the file operations between the end of a step and the news that its checkpoint is there.

    Attributes:
        names: of those that there were.
        kill_at: the process is killed just before this one; None counts only.
    """

    def __init__(self, kill_at: int | None = None) -> None:
        self.names: list[str] = []
        self.kill_at = kill_at
        self.counting = False
        sys.addaudithook(self.on_event)

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.counting or event not in OPERATIONS or "checkpoint" not in str(arguments[0]):
            return
        if len(self.names) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(f"{event} {Path(str(arguments[0])).name}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counting = state.global_step == STEP

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counting = False


def train(folder: Path, kill_at: int | None = None) -> None:
    """The command of the run: it starts, or goes on from what is there."""
    operations = Operations(kill_at)
    trainer = tiny_trainer(folder, settings=SETTINGS, callbacks=[operations])
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    (folder / "operations.json").write_text(json.dumps(operations.names), encoding="utf-8")


def in_a_process(folder: Path, kill_at: int | None = None) -> int:
    """Train in a fork; the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        # Metrics are printed, and the JSON is to be alone.
        os.dup2(2, 1)
        status = 1
        try:
            train(folder, kill_at)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"The run in {folder} failed: its error is above.")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def spread(total: int, number: int) -> list[int]:
    """Indices of operations, the first and the last among them."""
    return sorted({round(index * (total - 1) / (number - 1)) for index in range(number)})


def main(root: Path, number: int) -> list[dict[str, Any]]:
    in_a_process(root / "whole")
    names = json.loads((root / "whole" / "operations.json").read_text(encoding="utf-8"))
    outcomes = []
    for index in spread(len(names), number):
        folder = root / f"killed at {index}"
        killed = in_a_process(folder, kill_at=index) == signal.SIGKILL
        left = sorted(path.name for path in folder.glob("checkpoint-*"))
        in_a_process(folder)
        same = same_saved_student(folder, root / "whole")
        outcomes.append({"before": names[index], "killed": killed, "left": left, "same student": same})
    return outcomes


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1]), int(sys.argv[2])), sys.stdout, indent=1)
