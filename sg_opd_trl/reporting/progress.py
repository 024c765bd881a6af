"""A progress bar for training that shows the numbers to watch instead of printing every log."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

_WATCHED = {
    "reward": "reward",
    "gate/consensus": "consensus",
    "teacher/kl_k3": "kl",
    "anchor/alpha": "alpha",
}


class CompactProgressCallback(ProgressCallback):
    """One bar: what runs, steps done of all, time left, and reward, gate consensus, teacher KL (k3), anchor weight.

    Log messages are written above the bar, not into it, and it counts this package's warnings since it was opened: one
    that has scrolled away is not missed.

    It takes the place of the trainer's own progress callback; only the main process shows it. On a resumed run the
    time left is estimated from the steps of this run alone.

    ```python
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(CompactProgressCallback())
    ```

    Args:
        description: shown before the bar.
    """

    def __init__(self, description: str = "Distilling") -> None:
        super().__init__()
        self.description = description
        self.training_bar: Any = None
        self._latest: dict[str, str] = {}
        self._warnings = _WarningCounter(self._show)
        self._logging = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar at the step where the run starts."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.description,
                unit="step",
                dynamic_ncols=True,
                disable=args.disable_tqdm,
            )
            self._watch_logging()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar; messages go where they went before."""
        self._logging.close()
        super().on_train_end(args, state, control, **kwargs)

    def _watch_logging(self) -> None:
        # A run that ended with an error has not closed its own.
        self._logging.close()
        self._latest, self._warnings.count = {}, 0
        package = logging.getLogger(__package__.partition(".")[0])
        package.addHandler(self._warnings)
        self._logging.callback(package.removeHandler, self._warnings)
        self._logging.enter_context(logging_redirect_tqdm())

    def _show(self) -> None:
        counted = {"warnings": str(self._warnings.count)} if self._warnings.count else {}
        if self.training_bar is not None and (self._latest or counted):
            self.training_bar.set_postfix(self._latest | counted)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the watched metrics of a training log; other logs leave the bar as it is."""
        values = logs or {}
        latest = {label: f"{float(values[key]):.3g}" for key, label in _WATCHED.items() if key in values}
        if latest:
            self._latest = latest
            self._show()


class _WarningCounter(logging.Handler):
    """Counts warnings and worse, and says when there is one more."""

    def __init__(self, on_warning: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self.count = 0
        self._on_warning = on_warning

    def emit(self, record: logging.LogRecord) -> None:
        """Count one; who shows its text is not this handler's business."""
        self.count += 1
        self._on_warning()
