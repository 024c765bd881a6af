"""The ranks of a run end together, with the words of the one that failed.

A rank that fails alone leaves the others waiting in their next collective operation, which never comes about. So each
of those is preceded by a word of every rank about itself, over a group of its own: whoever fails says so there, all
raise, and all of them know that all of them do. What was trained until then can be written together.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CheckpointError, RankError
from .launcher import end_with_launcher
from .run import Run

#: How long a rank that failed waits for the others to hear it. With the 30 seconds that launchers give the others
#: to end by themselves, where these hang in a collective operation, it is less than a minute.
PATIENCE = timedelta(seconds=25)
_LONGEST = 4000  # characters of a message
# What the exchanges of a training step go through, TRL's, transformers' and ours; a `LinkedRun` says of the others.
_EXCHANGES = ("gather", "reduce", "wait_for_everyone", "backward")


class LinkedRun(Run, Protocol):
    """A run that tells of exchanges that the accelerator does not see.

    Attributes:
        before_exchange: is called before those of a forward of wrapped models, and before transformers' own.
    """

    before_exchange: Callable[[], None]


class Ranks:
    """What the ranks of a run say of themselves.

    Args:
        run: of this rank.
    """

    def __init__(self, run: LinkedRun) -> None:
        self._run = run
        # Of its own, so that no word is taken for a part of something else; on the CPU, so that no device waits.
        self._group: Any = dist.new_group(backend="gloo", timeout=run.args.ddp_timeout_delta)

    def check(self) -> None:
        """Say that this rank is well, and hear the same of the others.

        Raises:
            RankError: one is not, or does not answer any more.
        """
        try:
            words = self.exchange("")
        except RuntimeError as error:
            raise _gone(self._run, error) from error
        if any(words):
            raise RankError(**json.loads(next(word for word in words if word)), told=True)

    def tell(self, error: BaseException) -> bool:
        """Have the others raise too; whether all of them know, so that something can be done together."""
        if isinstance(error, RankError):
            return error.told
        step, kind = self._run.state.global_step + 1, type(error).__name__
        rank = self._run.accelerator.process_index
        text = f"Rank {rank} has ended the run, in or after step {step}, by {kind}: {error}"[:_LONGEST]
        facts = {"kind": f"{kind} on rank {rank}", "checkpoint": is_of_a_checkpoint(error)}
        try:
            self.exchange(json.dumps({"message": text} | facts), PATIENCE)
        except RuntimeError:
            return False
        return True

    def exchange(self, word: str, patience: timedelta | None = None) -> list[str]:
        """The words of all ranks.

        Args:
            word: this rank's.
            patience: with the other ranks; default: `ddp_timeout`.

        Raises:
            RuntimeError: a rank has gone, or takes longer.
        """
        own = torch.tensor(list(word.encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self._gathered(torch.tensor([len(own)]), patience)]
        if not any(sizes):
            return ["" for _ in sizes]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = own
        rows = self._gathered(padded, patience)
        return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]

    def _gathered(self, own: Tensor, patience: timedelta | None) -> list[Tensor]:
        ranks = [torch.empty_like(own) for _ in range(self._group.size())]
        work = dist.all_gather(ranks, own, group=self._group, async_op=True)
        work.wait(*([] if patience is None else [patience]))
        return ranks

    def leave(self) -> None:
        """Nothing more is said."""
        dist.destroy_process_group(self._group)


def _gone(run: Run, error: Exception) -> RankError:
    return RankError(
        f"Another rank has gone without a word in step {run.state.global_step + 1}: it was killed, by the system for "
        f"its memory perhaps, or with its machine, or it hangs for more than `ddp_timeout`. Look at what it said "
        f"last. Raise `ddp_timeout` if a step may take that long. ({error})",
        kind="the end of another rank",
    )


def is_of_an_exchange(error: BaseException) -> bool:
    """Whether processes did not find, or have lost, each other: gloo has no class of its own for that."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


@contextmanager
def naming_the_gone(run: LinkedRun) -> Iterator[None]:
    """Say of a rank that is gone in the middle of an exchange what `Ranks.check` says of one that is gone before."""
    try:
        yield
    except RuntimeError as error:
        if run.accelerator.num_processes == 1 or isinstance(error, RankError) or not is_of_an_exchange(error):
            raise
        raise _gone(run, error) from error


def is_of_a_checkpoint(error: BaseException) -> bool:
    """Whether an error, of this rank or another, came of writing a checkpoint: there is no room for another one."""
    return error.checkpoint if isinstance(error, RankError) else isinstance(error, CheckpointError)


@contextmanager
def ending_together(run: LinkedRun) -> Iterator[Ranks | None]:
    """Have an error of one rank end all of them at their next exchange; None for a process that trains alone."""
    accelerator = run.accelerator
    if accelerator.num_processes == 1 or not dist.is_initialized():
        yield None
        return
    end_with_launcher()
    ranks = Ranks(run)
    alone, run.before_exchange = run.before_exchange, ranks.check
    for name in _EXCHANGES:
        setattr(accelerator, name, _checked(getattr(accelerator, name), ranks))
    try:
        yield ranks
    finally:
        run.before_exchange = alone
        for name in _EXCHANGES:
            delattr(accelerator, name)
        ranks.leave()


def _checked(exchange: Callable, ranks: Ranks) -> Callable:
    @wraps(exchange)
    def after_a_word(*args: Any, **kwargs: Any) -> Any:
        ranks.check()
        return exchange(*args, **kwargs)

    return after_a_word
