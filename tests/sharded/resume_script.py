"""A run that fails and goes on by the same command, on the ranks of one launch, beside the run that did not.

Words: a folder. Models write and score themselves here, with the random numbers that a checkpoint keeps.
"""

import faulthandler
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from sharded.gloo_ranks import gloo_ranks_as_devices, is_sharded_launch

gloo_ranks_as_devices()

import torch  # noqa: E402  # accelerate makes its state from here on
from accelerate import PartialState  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from tiny import ANCHOR, tiny_data, tiny_trainer  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from sg_opd_trl import RankError  # noqa: E402
from sharded.cases import from_folders, lora, unchecked  # noqa: E402
from sharded.launches import COLLECTIVE_PATIENCE  # noqa: E402

FAILS_IN, STEPS = 4, 5  # the last checkpoint before is of step 2, the last finished step is 3
SETTINGS = ANCHOR | {
    "per_device_train_batch_size": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 2,
    "learning_rate": 1e-2,
    "shuffle_dataset": True,
    "teacher_sampling_ratio": 0.6,
    "resume_from_checkpoint": True,
    "preflight": False,
    "ddp_timeout": COLLECTIVE_PATIENCE,
}
#: name -> what makes the models, and the ranks that fail.
RUNS = {"full weights": (from_folders, (1,)), "LoRA": (lora, (0, 1))}


class Failing(TrainerCallback):
    """Raises at the beginning of a step on some ranks."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == FAILS_IN and PartialState().process_index in self.ranks:
            raise ZeroDivisionError


def run(folder: Path, name: str, callbacks: list | None = None) -> dict[str, Any]:
    AcceleratorState._reset_state()  # each run has its own settings of DeepSpeed
    make_models, _ = RUNS[name]
    arguments = {"train_dataset": tiny_data(12), "callbacks": callbacks or []} | make_models(folder.parent)
    trainer = tiny_trainer(folder, settings=SETTINGS | {"use_cpu": not is_sharded_launch()}, **arguments)
    with unchecked():
        trainer.train()
    trainer.save_model()
    logs = [{name: e[name] for name in e if "time" not in name} for e in trainer.state.log_history if "loss" in e]
    return {"student": str(folder), "logs": logs}


def main(folder: Path) -> None:
    state = PartialState(cpu=not is_sharded_launch(), timeout=timedelta(seconds=COLLECTIVE_PATIENCE))
    results: dict[str, Any] = {}
    for name, (_, failing) in RUNS.items():
        faulthandler.dump_traceback_later(4 * COLLECTIVE_PATIENCE, exit=True)
        own = folder / name
        whole = run(own / "whole", name)
        with suppress(ZeroDivisionError, RankError):
            run(own / "cut", name, [Failing(failing)])
        kept = sorted(path.name for path in (own / "cut").glob("checkpoint-*"))
        results[name] = {"whole": whole, "resumed": run(own / "cut", name), "kept": kept}
        if state.is_main_process:
            torch.save(results, folder / "results.pt")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
