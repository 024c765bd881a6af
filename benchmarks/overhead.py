"""What the method and the trainer add to the bare work.

    python benchmarks/overhead.py [--hidden 512] [--layers 8] [--vocab 32000] [--tokens 4096] [--repeats 2]
        [--steps 12]

1. Gate, routing, weights and metrics as a share of a micro-batch: the trainer's own calls, each timed on the inputs of
   a real step (median of many), against the whole step of one micro-batch (median of a few): once with all it does,
   and once against the student's forward and backward pass alone, which no setting can leave out.
2. A whole trainer step of the recipe `gate_only` on the built-in task, everything between two steps included, against
   the same work in `bare_loop.py`. They take turns: one step of the one, one of the other.
"""

import statistics
import time
from typing import Any

from bare_loop import BareLoop
from builtin_task import prepare_run, train_silently
from harness import ROLLOUTS_PER_PROMPT, Ratio, Shape, arguments, make_rollouts, progress, show, timed
from trainers import Setup, Stepper, ours
from transformers import TrainerCallback

from sg_opd_trl import trainer as trainer_module
from sg_opd_trl.trainer import MicroBatchLoss

PHASES = ("rollout", "verify", "teacher", "reference", "loss")
MERGE, REPORT, VERDICTS, DRAIN = "gate, routing, weights", "metrics", "verdicts and a1", "metrics of a log"
DIRECT_CALLS = 50


def share_of_the_gate(args: Any) -> tuple[list[Ratio], dict]:
    """Part 1: one micro-batch of `tokens` completion tokens in 8 rows."""
    setup = gate_setup(Shape(args.hidden, args.layers, args.vocab), args.tokens)
    stepper = ours(setup)
    calls = recorded_calls(stepper)
    parts: dict[str, list[float]] = {"step": [], "loss": []}
    for turn in progress(range(args.repeats + 1), "micro-batch"):
        seconds = stepper()
        if turn > 0:
            parts["step"].append(seconds)
            parts["loss"].append(stepper.trainer.metrics.drain("train")["time/loss"])
    own = direct_medians(stepper, calls)
    step, loss = (statistics.median(parts[name]) for name in ("step", "loss"))
    total = sum(own.values())
    ratios = [
        Ratio("gate, routing, weights, metrics / step", total / step, "<= 0.01", detail(total, step)),
        Ratio("gate, routing, weights, metrics / forward and backward", total / loss, "", detail(total, loss)),
    ]
    return ratios, {"gate_seconds": own, "step_seconds": step, "forward_backward_seconds": loss}


def gate_setup(shape: Shape, tokens: int) -> Setup:
    """One micro-batch of one group."""
    rows = ROLLOUTS_PER_PROMPT
    return Setup(shape, make_rollouts([tokens // rows] * rows, shape.vocab_size), micro_batch=rows)


def recorded_calls(stepper: Stepper) -> dict[str, tuple]:
    """Have the trainer keep the arguments of its own calls, so that they can be repeated."""
    trainer, calls = stepper.trainer, {}

    def record(name: str, original: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[name] = arguments
            return original(*arguments)

        return call

    class Recorded(MicroBatchLoss):
        def __init__(self, trainer: Any, inputs: dict) -> None:
            super().__init__(trainer, inputs)
            self.given = dict(inputs)

        def merge(self, student_logps: Any) -> Any:
            calls[MERGE] = self.given, student_logps.detach()
            return super().merge(student_logps)

    trainer_module.MicroBatchLoss = Recorded
    trainer._report = record(REPORT, trainer._report)
    trainer.on_rewards = record(VERDICTS, trainer.on_rewards)
    return calls


def direct_medians(stepper: Stepper, calls: dict[str, tuple]) -> dict[str, float]:
    """Median seconds of each part, called on its own; a log after every step is the worst case."""
    trainer = stepper.trainer
    kind = type(trainer)
    inputs, student_logps = calls[MERGE]
    functions = {
        VERDICTS: lambda: kind.on_rewards(trainer, *calls[VERDICTS]),
        MERGE: lambda: MicroBatchLoss(trainer, dict(inputs)).merge(student_logps),
        REPORT: lambda: kind._report(trainer, *calls[REPORT]),
        DRAIN: lambda: trainer.metrics.drain("train"),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(DIRECT_CALLS):
        for name, function in functions.items():
            times[name].append(timed(function))
    return {name: statistics.median(values) for name, values in times.items()}


class TakeTurns(TrainerCallback):
    """After every step of the trainer, one of the bare loop; the first of each warms up."""

    def __init__(self, bare: BareLoop) -> None:
        self.bare, self.resumed = bare, 0.0
        self.trainer_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.bare_phases: list[dict[str, float]] = []
        self.trainer_phases: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer's step lasts from where it was resumed to here: data, logs and rollouts included."""
        ended = time.perf_counter()
        seconds = self.bare.step()
        if self.resumed:
            self.trainer_seconds.append(ended - self.resumed)
            self.bare_seconds.append(seconds)
            self.bare_phases.append(self.bare.seconds)
        self.resumed = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The trainer's own account of a step."""
        if "time/loss" in logs:
            self.trainer_phases.append({phase: logs[f"time/{phase}"] for phase in PHASES})


def against_a_bare_loop(args: Any) -> tuple[list[Ratio], dict]:
    """Part 2. The learning rate is next to nothing, so that rollouts stay as long as they are."""
    args.max_steps = args.steps + 1
    # A log after every step: the worst case, and it tells the phases of every step.
    run = prepare_run("gate_only", args, 0, learning_rate=1e-9, logging_steps=1)
    trainer = run.trainer
    turns = TakeTurns(
        BareLoop(
            run.settings.student,
            run.settings.training.teacher_model_name_or_path,
            trainer.train_dataset,
            run.settings.training,
            run.reward_func,
        )
    )
    trainer.add_callback(turns)
    train_silently(run)
    whole, bare = statistics.median(turns.trainer_seconds), statistics.median(turns.bare_seconds)
    phases = {"trainer": medians(turns.trainer_phases[1:]), "bare": medians(turns.bare_phases)}
    ratios = [Ratio("built-in task: trainer step / bare loop", whole / bare, "<= 1.3", detail(whole, bare))]
    for phase in PHASES:
        seconds = phases["trainer"][phase], phases["bare"][phase]
        ratios.append(
            Ratio(f"built-in task, {phase}: trainer / bare loop", seconds[0] / seconds[1], "", detail(*seconds))
        )
    rest = whole - sum(phases["trainer"].values()), bare - sum(phases["bare"].values())
    data = {"trainer_step": whole, "bare_step": bare, "phases": phases, "outside_of_phases": rest}
    return ratios, {"built_in_task_seconds": data}


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Median of every phase."""
    return {phase: statistics.median(row[phase] for row in rows) for phase in PHASES}


def detail(above: float, below: float) -> str:
    """Both sides of a ratio of times."""
    return f"{above * 1000:.3g} ms / {below * 1000:.3g} ms"


def main() -> None:
    args = arguments(
        __doc__ or "",
        hidden=512,
        layers=8,
        vocab=32_000,
        tokens=4096,
        repeats=2,
        steps=12,
        student="",
        teacher="",
        dataset="",
        problems=8,
    )
    gate, gate_data = share_of_the_gate(args)
    task, task_data = against_a_bare_loop(args)
    show("overhead", [*gate, *task], {**gate_data, **task_data, "settings": vars(args)})


if __name__ == "__main__":
    main()
