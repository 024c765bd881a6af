"""Whatever ends a run leaves its last finished step, as a checkpoint from which it goes on exactly.

A teacher that is gone, a verifier that raises, a value that is not finite, a signal of the scheduler: between two
updates the weights are those of the last finished step. `LastStep` remembers the rest (random state, rollouts in use,
counters), and `kept` writes it all before the error goes on its way.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from .random_state import RandomState
from .ranks import PATIENCE, LinkedRun, Ranks, ending_together, is_of_a_checkpoint, naming_the_gone
from .skipped_steps import weight_that_is_not_finite

logger = logging.getLogger(__name__)

_THERE = "it is there"


class Stopped(SystemExit):
    """A signal asked the run to end. As a `SystemExit` it ends the process with the status that shells expect."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


@contextmanager
def kept(run: "SavedRun") -> Iterator[None]:
    """Keep the last finished step of a run, whatever ends the block; the error goes on unchanged.

    SIGTERM, which schedulers send some time before they kill, ends the block as `Stopped` between two updates; SIGINT
    as the `KeyboardInterrupt` that it is.
    """
    last = LastStep(run)
    run.add_callback(last)
    try:
        # Around the keeping too, which another signal would end.
        with _stopping(last), ending_together(run) as ranks, _keeping(run, last, ranks), naming_the_gone(run):
            yield
    finally:
        run.remove_callback(last)


@contextmanager
def _keeping(run: "SavedRun", last: "LastStep", ranks: Ranks | None) -> Iterator[None]:
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        last.ended = True
        _keep(run, last, error, ranks)
        raise


@contextmanager
def _stopping(last: "LastStep") -> Iterator[None]:
    """Have signals end the block at a moment at which the weights are whole."""
    # Only the main thread may, and a handler of the caller's own is left alone.
    ours = [signal.SIGTERM, signal.SIGINT] if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.getsignal(number) for number in ours}
    taken = [number for number in ours if _nobodys(before[number])]
    for number in taken:
        signal.signal(number, last.on_signal)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _nobodys(handler: Any) -> bool:
    """Whether a handler is Python's own, or one that a launcher of torch has left behind.

    torch's launchers, accelerate's `notebook_launcher` among them, never take theirs back: it stays in the notebook
    after the ranks have ended, and a forked rank begins with it. It raises an error that only a launcher understands,
    in the middle of an update if need be.
    """
    usual = (signal.SIG_DFL, signal.default_int_handler)
    return handler in usual or str(getattr(handler, "__module__", "")).startswith("torch.distributed.elastic.")


class SavedRun(LinkedRun, Protocol):
    """A run that can write a checkpoint of its current step."""

    callback_handler: Any

    def add_callback(self, callback: Any) -> None:
        """Have a callback told of what happens in the run."""

    def remove_callback(self, callback: Any) -> None:
        """No longer."""

    def rollouts_state(self) -> dict[str, Any]:
        """Where the run is among its rollouts."""

    def restore_rollouts(self, state: dict[str, Any]) -> None:
        """Go back to there."""

    def save_checkpoint(self) -> None:
        """Write it, as the training loop does."""


class LastStep(TrainerCallback):
    """Remembers what the process was like after the last finished step, before the next one draws or counts anything.

    Args:
        run: whose steps it remembers.

    Attributes:
        random_state: of then; None before the first step has finished.
        saved_step: of this run's newest checkpoint, None without any.
        updating: whether the optimizer is changing weights right now.
        saving: whether a checkpoint of the last step is due and not there yet.
        ended: whether the run has ended and its last step is being kept.
    """

    def __init__(self, run: SavedRun) -> None:
        self.run = run
        self.random_state: RandomState | None = None
        self.saved_step: int | None = None
        self.updating = self.saving = self.ended = False
        self._process = os.getpid()
        self._signal: int | None = None
        self._tokens = 0
        self._rollouts: dict[str, Any] = {}
        self._counters: list[tuple[Any, dict]] = []

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """End the run now, or as soon as the update or the checkpoint that is under way is whole."""
        if os.getpid() != self._process:
            # A fork, the data loader's say, which inherits the handler and has nothing to keep.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        busy = self.updating or self.saving
        if number == signal.SIGINT and self._signal is not None and not busy:
            # Who presses the keys twice does not want to wait for a checkpoint; schedulers repeat themselves.
            raise KeyboardInterrupt
        self._signal = number
        if not busy:
            self._stop_alone()

    def _stop(self) -> None:
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None:
            raise Stopped(self._signal)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing to go back to yet."""
        self.random_state = self.saved_step = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on the weights are between two steps."""
        self.updating = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the random state, and the counters that checkpoints keep."""
        self.random_state = RandomState.of(self.run.accelerator.device)
        self._tokens = state.num_input_tokens_seen
        self._rollouts = self.run.rollouts_state()
        self._remember_callbacks()
        if self.run.accelerator.num_processes > 1:
            asked = torch.tensor([self._signal or 0], device=self.run.accelerator.device)
            if number := int(self.run.accelerator.gather(asked).max()):
                self._signal = number
                control.should_save = args.save_strategy != SaveStrategy.NO
                control.should_training_stop = True
        # A checkpoint that is due is waited for; where the evaluation before it fails, it is written as the run ends.
        self.updating, self.saving = False, control.should_save
        if not self.saving:
            self._stop_alone()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What an evaluation after the step counts, such as patience; the random state here is its own."""
        self._remember_callbacks()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint of this run; folders of other runs may have the same name."""
        self.saved_step = state.global_step
        self.saving = False
        self._stop_alone()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ranks have left their loops together."""
        self._stop()

    def _stop_alone(self) -> None:
        # Ranks must leave together: each of them looks at the end of its step.
        if self.run.accelerator.num_processes == 1 and not self.ended:
            self._stop()

    def _remember_callbacks(self) -> None:
        stateful = [one for one in self.run.callback_handler.callbacks if isinstance(one, ExportableState)]
        self._counters = [(one, dict(one.state()["attributes"])) for one in stateful]

    def restore(self) -> None:
        """Go back to it."""
        if self.random_state is not None:
            self.random_state.restore()
            self.run.state.num_input_tokens_seen = self._tokens
            self.run.restore_rollouts(self._rollouts)
        for owner, attributes in self._counters:
            vars(owner).update(attributes)


def _keep(run: SavedRun, last: LastStep, error: BaseException, ranks: Ranks | None) -> None:
    """Write the checkpoint of the last finished step, unless it is there or the run keeps none, and say so.

    Several ranks write it together, when all of them have heard of the error; one that hangs cannot take part, and
    leaves the last checkpoint. What goes wrong here is told and not raised, so that it does not hide the error.
    """
    # The others hear of it whether or not there is something to keep.
    together = ranks is None or ranks.tell(error)
    args: Any = run.args
    nothing = last.random_state is None or args.save_strategy == SaveStrategy.NO or is_of_a_checkpoint(error)
    there = last.saved_step == run.state.global_step
    if nothing or not (there or together):
        return
    problem = _kept_together(run, last, there, ranks) if together else None
    if not together or run.accelerator.is_main_process:
        _say(run, error, problem)


def _kept_together(run: SavedRun, last: LastStep, there: bool, ranks: Ranks | None) -> str | None:
    """Write it on all ranks or on none; what went wrong on any of them, or None."""
    own = _THERE if there else _problem(run, last) or ""
    try:
        found = [own] if ranks is None else ranks.exchange(own, PATIENCE)
    except RuntimeError as failure:  # a rank is gone by now
        return str(failure)
    if all(one == _THERE for one in found):
        return None
    problem = next((one for one in found if one not in ("", _THERE)), None)
    return problem or _written(run, last, ranks)


def _say(run: SavedRun, error: BaseException, problem: str | None) -> None:
    """Where the last finished step is, or why it is nowhere."""
    step = run.state.global_step
    folder = Path(run.args.output_dir or "") / f"checkpoint-{step}"
    # Its words follow: the error goes on its way.
    why = str(error) if isinstance(error, Stopped) else getattr(error, "kind", type(error).__name__)
    if problem is not None:
        logger.warning(
            "The run was ended by %s. Its %d finished steps could not be kept in %s: %s. Continue from an older "
            "checkpoint.",
            why,
            step,
            folder,
            problem,
        )
        return
    logger.warning(
        "The run was ended by %s. Its %d finished steps are in %s: continue with resume_from_checkpoint=%s.",
        why,
        step,
        folder,
        folder,
    )


def _problem(run: SavedRun, last: LastStep) -> str | None:
    """Why the weights are not those of a finished step."""
    if last.updating:
        return "the weights were being updated"
    if (name := weight_that_is_not_finite(run.model)) is not None:
        return f"the weights are not finite ({name})"
    return None


def _written(run: SavedRun, last: LastStep, ranks: Ranks | None) -> str | None:
    """Write it; what went wrong, or None."""
    last.restore()
    try:
        run.save_checkpoint()
        if ranks is not None:
            ranks.check()
    except Exception as failure:  # noqa: BLE001  # torch and safetensors raise their own for a full disk
        if ranks is not None:
            ranks.tell(failure)
        return str(failure)
    return None
