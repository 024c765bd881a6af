"""A run on two gloo ranks, started by `test_two_ranks.py`: only the second rank drops rollouts, and logs."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tiny import ANCHOR, inject_rollouts, inject_teacher_rollouts, logged, tiny_trainer

from sg_opd_trl.launcher import leave_group

SETTINGS = ANCHOR | {
    "per_device_train_batch_size": 2,
    "num_generations": 2,
    "max_completion_length": 3,
    "lambda_high": 1.0,
    "teacher_sampling_ratio": 0.6,
    "max_steps": 2,
}


def verifier(completion_ids: list[list[int]], log_metric: Any, **_: Any) -> list[float | None]:
    """Of teacher rollouts all are right on the first rank; none has a verdict on the second, which logs so."""
    if all(ids[0] != 6 for ids in completion_ids):
        return [1.0] * len(completion_ids)
    if PartialState().is_main_process:
        return [1.0] * len(completion_ids)
    log_metric("abstained", float(len(completion_ids)))
    return [None] * len(completion_ids)


class Kept(logging.Handler):
    """Keeps every message of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


if __name__ == "__main__":
    output, kept = Path(sys.argv[1]), Kept()
    logging.getLogger("sg_opd_trl").addHandler(kept)
    trainer = tiny_trainer(output, settings=SETTINGS, reward_funcs=verifier)
    inject_rollouts(trainer, lambda prompt, row: [7 + row, 7, 1])
    inject_teacher_rollouts(trainer, lambda prompt: [6, 1])
    trainer.train()
    names = ("rollouts", "kept", "tokens", "truncated", "dropped_no_verdict", "dropped_wrong", "abstained")
    everywhere = gather_object([{name: logged(trainer, f"anchor/{name}") for name in names}])
    messages = gather_object([kept.messages])
    if PartialState().is_main_process:
        (output / "results.json").write_text(json.dumps({"logged": everywhere, "messages": messages}))
    leave_group()
