"""`run.json`: what a run cost, also where it was killed and resumed."""

import json
import time
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .methods import METHODS

RUN_FILE = "run.json"
_TOKENS = ("teacher_tokens_scored", "teacher_tokens_generated", "teacher_tokens_reused")


class RunCost(TrainerCallback):
    """Seconds and teacher tokens of a run; each checkpoint keeps them, and a resumed run goes on counting.

    Seconds are the wall time of training and of writing teacher rollouts before it, without loading models and data.

    Args:
        method: of the recipe.
        trainer: that of the method.
        checkpoint: that the run resumes from; True is the newest of the output folder.
    """

    def __init__(self, method: str, trainer: Any, checkpoint: str | bool | None) -> None:
        self.method, self.trainer = method, trainer
        self._before: dict[str, float] = {}
        self._at_start: dict[str, float] = {}
        self._started = time.perf_counter()
        folder = get_last_checkpoint(trainer.args.output_dir) if checkpoint is True else checkpoint
        path = Path(str(folder)) / RUN_FILE
        if folder and path.is_file():
            self._before = json.loads(path.read_text(encoding="utf-8"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._started = time.perf_counter()
        # What a resumed run's teacher has counted by now (rollouts that SFT reads or writes again before the first
        # step) is in the checkpoint's numbers already, and must not be counted twice.
        self._at_start = self._counts() if self._before else {}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the costs into the checkpoint."""
        self.write(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `run.json` into a folder; all processes must call it. The one that writes returns its contents."""
        own = self._counts()
        for name, count in self._at_start.items():
            own[name] -= count
        own["seconds"] += time.perf_counter() - self._started
        ranks = gather_object([own])
        if not self.trainer.accelerator.is_main_process:
            return {}
        facts: dict[str, Any] = {
            "method": self.method,
            "seed": self.trainer.args.seed,
            "steps": self.trainer.state.global_step,
            # Processes run side by side: seconds are one's, tokens the sum over all.
            "seconds": round(own["seconds"] + self._before.get("seconds", 0.0), 3),
        }
        for name in _TOKENS:
            facts[name] = int(sum(rank[name] for rank in ranks) + self._before.get(name, 0))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return facts

    def _counts(self) -> dict[str, float]:
        use = METHODS[self.method].teacher_use(self.trainer)
        return {
            "teacher_tokens_scored": use.tokens_scored,
            "teacher_tokens_generated": use.tokens_generated,
            "teacher_tokens_reused": use.tokens_reused,
            "seconds": use.seconds,
        }


def describe_cost(facts: dict[str, Any]) -> str:
    """`run.json` in one line."""
    parts = [f"{facts['steps']} steps in {facts['seconds']:.1f} s"]
    if any(facts[name] for name in _TOKENS):
        scored, generated, reused = (f"{facts[name]:,}" for name in _TOKENS)
        parts.append(
            f"tokens of the teacher: {scored} scored, {generated} generated, {reused} read from stored rollouts"
        )
    return "; ".join(parts)
