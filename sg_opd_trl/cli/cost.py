"""`run.json`: what a run cost, also where it was killed and resumed."""

import json
import time
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..run_folder import RunFolder
from ..run_identity import RUN_FILE, read_json
from .methods import METHODS

_TOKENS = ("teacher_tokens_scored", "teacher_tokens_generated", "teacher_tokens_reused")


class RunCost(TrainerCallback):
    """Seconds and teacher tokens of a run; each checkpoint keeps them, and a resumed run goes on counting.

    Seconds are the wall time of training and of writing teacher rollouts before it, without loading models and data.

    Args:
        method: of the recipe.
        trainer: that of the method.
        folder: of the run.
        checkpoint: that the run goes on from, or None.
    """

    def __init__(self, method: str, trainer: Any, folder: RunFolder, checkpoint: Path | None) -> None:
        self.method, self.trainer, self.folder = method, trainer, folder
        self._before: dict[str, float] = {}
        self._at_start: dict[str, float] = {}
        self._started = time.perf_counter()
        trainer.beside_checkpoint = self.write
        if checkpoint is not None:
            self._before = read_json(checkpoint / RUN_FILE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._started = time.perf_counter()
        # What a resumed run's teacher has counted by now (rollouts that SFT reads or writes again before the first
        # step) is in the checkpoint's numbers already, and must not be counted twice.
        self._at_start = self._counts() if self._before else {}

    def write(self, checkpoint: Path) -> None:
        """Write costs and identity into a checkpoint that is being written."""
        facts = self.facts()
        if facts:
            content = {**facts, "identity": self.folder.identity}
            (checkpoint / RUN_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def facts(self) -> dict[str, Any]:
        """What the run has cost so far; all processes must call it. Only the main one learns the sum."""
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
