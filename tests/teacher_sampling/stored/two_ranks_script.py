"""Two runs with one cache on two gloo ranks, started by `test_two_ranks.py`: what each rank read and generated."""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from tiny import ANCHOR, logged, tiny_trainer

from sg_opd_trl.launcher import leave_group

SETTINGS = ANCHOR | {
    "num_generations": 2,
    "max_completion_length": 4,
    "lambda_high": 1.0,
    "teacher_sampling_ratio": 0.6,
    "teacher_num_generations": 2,
    "max_steps": 2,
}


def one_run(folder: Path, rows_per_process: int) -> dict:
    """A run of two steps; counts of all ranks."""
    settings = {"teacher_rollouts_path": str(folder / "cache"), "per_device_train_batch_size": rows_per_process}
    trainer = tiny_trainer(folder, settings=SETTINGS | settings)
    trainer.train()
    return {
        "world": trainer.accelerator.num_processes,
        "generated": gather_object([trainer.teacher.tokens_generated]),
        "reused": gather_object([trainer.rollout_cache.tokens_reused]),
        "hits": logged(trainer, "anchor/cache_hits"),
        "misses": logged(trainer, "anchor/cache_misses"),
        "loss": logged(trainer, "loss"),
        "anchor": logged(trainer, "anchor/loss"),
    }


if __name__ == "__main__":
    output = Path(sys.argv[1])
    results = [one_run(output, 2) for _ in range(2)]
    if PartialState().is_main_process:
        (output / "results.json").write_text(json.dumps(results))
    leave_group()
