"""A teacher that is gone ends the run; its last finished step is kept as a checkpoint to go on from."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from .errors import TeacherError
from .random_state import RandomState

logger = logging.getLogger(__name__)


class LastStep(TrainerCallback):
    """Remembers what the process was like after the last finished step, before the next one draws or counts anything.

    Args:
        trainer: whose run it is.

    Attributes:
        random_state: of then; None before the first step has finished.
        saved_step: of this run's newest checkpoint, None without any.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.random_state: RandomState | None = None
        self.saved_step: int | None = None
        self._tokens = 0
        self._counters: list[tuple[Any, dict]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing to go back to yet."""
        self.random_state = self.saved_step = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the random state, and the counters that checkpoints keep."""
        self.random_state = RandomState.of(self.trainer.accelerator.device)
        self._tokens = state.num_input_tokens_seen
        self._remember_callbacks()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What an evaluation after the step counts, such as patience; the random state here is its own."""
        self._remember_callbacks()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint of this run; folders of other runs may have the same name."""
        self.saved_step = state.global_step

    def _remember_callbacks(self) -> None:
        stateful = [one for one in self.trainer.callback_handler.callbacks if isinstance(one, ExportableState)]
        self._counters = [(one, dict(one.state()["attributes"])) for one in stateful]

    def restore(self) -> None:
        """Go back to it."""
        if self.random_state is not None:
            self.random_state.restore()
            self.trainer.state.num_input_tokens_seen = self._tokens
        for owner, attributes in self._counters:
            vars(owner).update(attributes)


def keep_last_step(trainer: Any, last: LastStep, error: TeacherError) -> None:
    """Write the checkpoint of the last finished step, unless it is there or the run keeps none, and say so.

    Ranks that did not fail wait for one another and cannot take part: with several processes nothing is written. What
    goes wrong here is told and not raised, so that it does not hide the error.

    Args:
        trainer: whose run the error ends.
        last: its callback.
        error: why.
    """
    args, step = trainer.args, trainer.state.global_step
    if last.random_state is None or trainer.accelerator.num_processes > 1 or args.save_strategy == SaveStrategy.NO:
        return
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    if last.saved_step != step:
        last.restore()
        try:
            trainer.save_checkpoint()
        except Exception as failure:  # noqa: BLE001  # torch and safetensors raise their own for a full disk
            logger.warning(
                "The teacher ended the run, and its %d finished steps could not be kept in %s: %s. Delete that "
                "folder, and continue from an older checkpoint.",
                step,
                folder,
                failure,
            )
            return
    inside = step * args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations)
    logger.warning(
        "The teacher ended the run (%s). Its %d finished steps are in %s: continue with resume_from_checkpoint=%s.%s",
        type(error).__name__,
        step,
        folder,
        folder,
        " It is inside a generation batch: what is left of it is replaced by new rollouts." if inside else "",
    )
