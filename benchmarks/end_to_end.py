"""Time to a given accuracy on the built-in task: SG-OPD and OPD against TRL's GRPO.

    python benchmarks/end_to_end.py [--target 0.5] [--seeds 0] [--every 10] [--problems 100] [--max_steps 0]

Runs the recipes of `recipes/arithmetic` as `sg-opd train` does, and measures avg@8 on held-out problems every few
steps until the target is reached. Time is that of training alone, start-up and evaluations not counted; the built-in
models and problems are prepared beforehand. `--max_steps 0` keeps the recipe's. Runs follow one another: on a busy
machine, compare steps rather than seconds.
"""

import statistics
import time
from typing import Any

from builtin_task import Run, prepare_run, train_silently
from harness import Ratio, arguments, progress, show
from transformers import TrainerCallback

from sg_opd_trl.evaluation import evaluate_model

RECIPES = {"SG-OPD": "sg_opd", "OPD": "opd", "TRL GRPO": "grpo"}
SAMPLES = 8


class UntilTarget(TrainerCallback):
    """Evaluates every few steps, and ends training at the target; `seconds` is time spent training."""

    def __init__(self, run: Run, args: Any, bar: Any) -> None:
        self.run, self.args, self.bar = run, args, bar
        self.seconds, self.resumed, self.reached = 0.0, 0.0, False
        self.course: list[tuple[int, float, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.resumed = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Stop the clock for an evaluation."""
        self.bar.update()
        if state.global_step % self.args.every and state.global_step != state.max_steps:
            return
        self.seconds += time.perf_counter() - self.resumed
        accuracy = self._accuracy(model)
        self.course.append((state.global_step, self.seconds, accuracy))
        self.bar.set_postfix_str(f"avg@{SAMPLES} {accuracy:.3f}")
        self.reached = accuracy >= self.args.target
        control.should_training_stop = control.should_training_stop or self.reached
        self.resumed = time.perf_counter()

    def _accuracy(self, model: Any) -> float:
        result = evaluate_model(
            model,
            self.run.trainer.processing_class,
            self.run.problems,
            num_samples=SAMPLES,
            max_new_tokens=self.run.settings.training.max_completion_length,
            batch_size=400,
            reward_func=self.run.reward_func,
            progress=False,
        )
        return result.avg_at_k

    def result(self) -> dict:
        """What this run needed."""
        steps, seconds, accuracy = self.course[-1]
        return {
            "reached": self.reached,
            "steps": steps,
            "seconds": seconds,
            "accuracy": accuracy,
            "course": self.course,
        }


def train_until_target(name: str, args: Any, seed: int) -> dict:
    """One run of one recipe."""
    run = prepare_run(RECIPES[name], args, seed)
    with progress(None, f"{name}, seed {seed}") as bar:
        bar.reset(total=run.settings.training.max_steps)
        until_target = UntilTarget(run, args, bar)
        run.trainer.add_callback(until_target)
        train_silently(run)
    return until_target.result()


def told(results: list[dict]) -> str:
    """Median time and steps, or how far it came."""
    if not all(result["reached"] for result in results):
        worst = min(results, key=lambda result: result["accuracy"])
        return (
            f"not reached in {worst['steps']} steps, {worst['seconds']:.1f} s (avg@{SAMPLES} {worst['accuracy']:.2f})"
        )
    return f"{median(results, 'seconds'):.1f} s, {median(results, 'steps'):.0f} steps"


def median(results: list[dict], what: str) -> float:
    """Median over seeds."""
    return statistics.median(result[what] for result in results)


def compare(slow: str, fast: str, runs: dict[str, list[dict]]) -> Ratio:
    """How many times longer `slow` trains to the target; no number where one of them never got there."""
    reached = all(result["reached"] for name in (slow, fast) for result in runs[name])
    ratio = median(runs[slow], "seconds") / median(runs[fast], "seconds") if reached else None
    return Ratio(f"{slow} / {fast}", ratio, "", f"{told(runs[slow])} / {told(runs[fast])}")


def main() -> None:
    args = arguments(
        __doc__ or "",
        target=0.5,
        seeds=[0],
        every=10,
        problems=100,
        max_steps=0,
        student="",
        teacher="",
        dataset="",
    )
    runs = {name: [train_until_target(name, args, seed) for seed in args.seeds] for name in RECIPES}
    ratios = [compare(*pair, runs) for pair in (("TRL GRPO", "SG-OPD"), ("TRL GRPO", "OPD"), ("OPD", "SG-OPD"))]
    show("end_to_end", ratios, {"runs": runs, "settings": vars(args)})


if __name__ == "__main__":
    main()
