"""Baselines on two gloo ranks: undisturbed, ended by one rank, and going on. Launched by `test_baseline_ranks.py`.

`two_ranks_script.py FOLDER STUDENT TEACHER` writes what each rank ended with, and where the students differ.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from any_baseline import METHODS, any_baseline
from baseline_pair import Pair
from tiny import copied_weights

from sg_opd_trl.checkpoints import checkpoints_of, find_problem
from sg_opd_trl.launcher import leave_group

# Four rows on each rank.
SETTINGS = {"per_device_train_batch_size": 4, "ddp_timeout": 120}
STEPS = 3  # that have ended before the failure


def fail_on_the_second_rank(trainer: Any) -> None:
    """In the loss; where there are rewards, in these: the first rank waits for them in TRL's own exchange."""
    name = "_calculate_rewards" if hasattr(trainer, "reward_funcs") else "compute_loss"
    owner = trainer.reward_funcs if name == "_calculate_rewards" else None
    original = owner[0] if owner else trainer.compute_loss

    def failing(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == STEPS and trainer.accelerator.process_index == 1:
            raise RuntimeError("nobody expected that")
        return original(*args, **kwargs)

    if owner:
        owner[0] = failing
    else:
        trainer.compute_loss = failing


def ended(trainer: Any) -> dict[str, str]:
    try:
        trainer.train()
    except Exception as error:  # noqa: BLE001  # whatever it is, is looked at
        return {"kind": type(error).__name__, "text": str(error)}
    return {"kind": "", "text": ""}


def run_case(method: str, pair: Pair, folder: Path) -> dict[str, Any]:
    whole = any_baseline(method, pair, folder / "whole", **SETTINGS)
    whole.train()
    whole.save_model()
    weights = copied_weights(whole.model)

    broken = any_baseline(method, pair, folder / "cut", **SETTINGS)
    fail_on_the_second_rank(broken)
    ends = gather_object([ended(broken)])
    kept = {path.name: find_problem(path) for path in checkpoints_of(folder / "cut")}

    resumed = any_baseline(method, pair, folder / "cut", **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    pairs = zip(weights.values(), resumed.model.parameters(), strict=True)
    return {
        "ends": ends,
        "kept": kept,
        "same": gather_object([all(torch.equal(one, other) for one, other in pairs)]),
        "whole": {path.name: find_problem(path) for path in checkpoints_of(folder / "whole")},
        "files": sorted(path.name for path in (folder / "whole" / "checkpoint-4").iterdir()),
        "left": [path.name for path in folder.rglob("*in-progress*")],
    }


if __name__ == "__main__":
    output, student, teacher = sys.argv[1:]
    results = {method: run_case(method, Pair(student, teacher), Path(output) / method) for method in METHODS}
    if PartialState().is_main_process:
        (Path(output) / "results.json").write_text(json.dumps(results), encoding="utf-8")
    leave_group()
