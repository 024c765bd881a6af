"""One rank of two fails, in every way that leaves its process alive: what each rank ends with, and what is kept.

Launched by `test_ranks`.
"""

import errno
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import reward_functions
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tiny import ANCHOR, copied_weights, logged, parity_verifier, tiny_data, tiny_trainer
from transformers import TrainerCallback

from sg_opd_trl import trl_seam
from sg_opd_trl.checkpoints import find_problem

SETTINGS = ANCHOR | {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 100,
    "learning_rate": 1e-2,
    "teacher_sampling_ratio": 0.6,
}
STEPS = 2  # that have ended before the failure


def fail(error: BaseException) -> Callable[..., Any]:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error

    return failing


class FailAfter(TrainerCallback):
    """From a step's end on, `break_it` is what the run meets."""

    def __init__(self, break_it: Callable[[], None]) -> None:
        self.break_it = break_it

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS:
            self.break_it()


def put(owner: str, name: str, error: BaseException) -> Callable[[Any], None]:
    """Breaks a method of the trainer, or of a part of it."""
    return lambda trainer: setattr(getattr(trainer, owner) if owner else trainer, name, fail(error))


def verifier_raises(error: BaseException) -> Callable[[Any], None]:
    def break_it(trainer: Any) -> None:
        trainer.reward_funcs[0] = trainer.verifier.function = fail(error)

    return break_it


# name -> what the last rank alone meets after two steps
CASES: dict[str, Callable[[Any], None]] = {
    "the verifier raises": verifier_raises(ZeroDivisionError("in the verifier")),
    "the verifier leaves": verifier_raises(SystemExit(3)),
    "the verifier has no memory": verifier_raises(MemoryError()),
    "the verifier of teacher rollouts": put("", "judge", ZeroDivisionError("in judge")),
    "the teacher does not write": put("teacher", "generate", RuntimeError("no memory")),
    "the teacher does not score": put("", "score_with_teacher", RuntimeError("gone")),
    "the rollouts": put("", "_generate_single_turn", RuntimeError("probability tensor contains nan")),
    "the gate of a subclass": put("", "compute_gate", IndexError("in the gate")),
    "the data": put("", "_prepare_inputs", KeyError("prompt")),
    "a callback": fail(OSError("in a callback")),
}


@contextmanager
def last_rank_alone(trainer: Any, break_it: Callable[[Any], None]) -> Iterator[None]:
    if trainer.accelerator.process_index == 1:
        trainer.add_callback(FailAfter(lambda: break_it(trainer)))
    yield


def ended(trainer: Any, folder: Path) -> dict:
    """What this rank's training ends with."""
    start = time.monotonic()
    try:
        trainer.train()
        kind = text = ""
    except BaseException as error:  # noqa: BLE001  # SystemExit too
        kind, text = type(error).__name__, str(error)
    return {
        "kind": kind,
        "text": text,
        "steps": trainer.state.global_step,
        "seconds": time.monotonic() - start,
        "kept": sorted(path.name for path in folder.glob("checkpoint-*")),
        "left_over": [path.name for path in folder.glob("*in-progress*/*")],
        "problem": [find_problem(path) for path in folder.glob("checkpoint-?")],
    }


def disk(folder: Path, rank: int) -> dict:
    """The disk is full on one rank, when the checkpoint of the second step is due."""
    trainer = tiny_trainer(folder, settings=SETTINGS | {"save_steps": 1}, train_dataset=tiny_data())
    name = "complete" if rank == 0 else "_save_rng_state"
    owner: Any = trl_seam if rank == 0 else trainer
    original = getattr(owner, name)

    def full(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == STEPS and trainer.accelerator.process_index == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*args, **kwargs)

    setattr(owner, name, full)
    try:
        return ended(trainer, folder)
    finally:
        setattr(owner, name, original)


def run_cases(folder: Path) -> dict[str, dict]:
    results = {}
    for number, (name, break_it) in enumerate(CASES.items()):
        trainer = tiny_trainer(folder / str(number), settings=SETTINGS, reward_funcs=[parity_verifier])
        with last_rank_alone(trainer, break_it):
            results[name] = ended(trainer, folder / str(number))
    for rank in (0, 1):
        results[f"the disk of rank {rank}"] = disk(folder / f"disk {rank}", rank)
    return results


def one_ends(folder: Path, action: str) -> None:
    """A rank that says nothing any more, with a teacher that judges nothing."""
    acts = {"killed": lambda **_: os.kill(os.getpid(), signal.SIGKILL), "stuck": lambda **_: time.sleep(200)}
    trainer = tiny_trainer(folder, settings=SETTINGS | {"save_steps": 1}, reward_funcs=[parity_verifier])

    def act() -> None:
        trainer.reward_funcs[0] = trainer.verifier.function = acts[action]

    with last_rank_alone(trainer, lambda _: act()):
        trainer.train()


def unanswered(folder: Path) -> dict:
    """The last rank's verifier never answers in the third step."""
    settings = SETTINGS | {"verifier_timeout": 5.0, "save_strategy": "no"}
    trainer = tiny_trainer(folder, settings=settings, reward_funcs=reward_functions.sleeps_on_the_last_rank)
    end = ended(trainer, folder)
    weights = str(folder / f"rank {trainer.accelerator.process_index}.pt")
    torch.save(copied_weights(trainer.accelerator.unwrap_model(trainer.model)), weights)
    return end | {
        "unanswered": logged(trainer, "rewards/sleeps_on_the_last_rank/unanswered"),
        "weights": weights,
    }


def main(action: str, output: str) -> None:
    """The main process saves what came out on every rank."""
    state = PartialState(cpu=True)
    if action in ("killed", "stuck"):
        return one_ends(Path(output), action)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(own) if state.is_main_process else Path()
        shared = Path(gather_object([str(folder)])[0])
        ranks = gather_object([run_cases(shared) if action == "cases" else unanswered(Path(output).parent)])
        if state.is_main_process:
            Path(output).write_text(json.dumps(ranks), encoding="utf-8")
        state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
