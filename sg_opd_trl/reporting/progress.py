"""A progress bar for training that shows the numbers to watch instead of printing every log."""

from typing import Any

from tqdm.auto import tqdm
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
        if latest and self.training_bar is not None:
            self.training_bar.set_postfix(latest)
