"""What the method and the trainer add to the bare work.

    python benchmarks/overhead.py [--hidden 512] [--layers 8] [--vocab 32000] [--tokens 4096] [--repeats 2]
        [--steps 12] [--against OTHER_CHECKOUT]

1. Gate, routing, weights and metrics as a share of a micro-batch: every call of the trainer's public hooks and of the
   equations in `sg_opd_trl.core`, timed where it happens, against the step of one micro-batch (medians of a few): once
   with all it does, and once against the student's forward and backward pass alone, which no setting can leave out.
2. A whole trainer step of the recipe `gate_only` on the built-in task, everything between two steps included, against
   the same work in `bare_loop.py`. They take turns: one step of the one, one of the other.

With `--against`, both checkouts measure in turns, see `against.py`; the bare loop is then the control, whose ratio
should be 1.
"""

import functools
import inspect
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from against import compare_checkouts
from bare_loop import BareLoop
from builtin_task import prepare_run, train_silently
from harness import ROLLOUTS_PER_PROMPT, Ratio, Shape, arguments, make_rollouts, progress, show, synchronise
from trainers import Setup, Stepper, ours
from transformers import TrainerCallback

PHASES = ("rollout", "verify", "teacher", "reference", "loss")
VERDICTS, GATE, METRICS, LOG = "verdicts and a1", "gate, routing, weights", "metrics", "metrics of a log"
HOOKS = {
    VERDICTS: ("on_rewards", "compute_verifier_signal"),
    GATE: ("compute_gate", "route_advantages", "route_lambdas", "compute_token_weights", "reference_rows"),
}
"""Methods of `SGOPDTrainer` by part."""
STATISTICS = ("token_statistics", "masked_sum_and_count", "mean_of")
"""Functions of `core` that only metrics need."""


def share_of_the_gate(args: Any) -> tuple[list[Ratio], dict]:
    """Part 1: one micro-batch of `tokens` completion tokens in 8 rows."""
    stepper = ours(gate_setup(Shape(args.hidden, args.layers, args.vocab), args.tokens))
    metrics, watch = stepper.trainer.metrics, Stopwatch()
    watch_the_method(stepper, watch)
    times: dict[str, list[float]] = {}
    for turn in progress(range(args.repeats + 1), "micro-batch"):
        watch.seconds = dict.fromkeys((VERDICTS, GATE, METRICS), 0.0)
        parts = {"step": stepper()} | watch.seconds
        # A log after every step is the worst case.
        start = time.perf_counter()
        logged = metrics.drain("train")
        parts |= {LOG: time.perf_counter() - start, "loss": logged["time/loss"]}
        if turn > 0:  # the first turn warms up
            for name, seconds in parts.items():
                times.setdefault(name, []).append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    step, loss = medians.pop("step"), medians.pop("loss")
    total = sum(medians.values())
    ratios = [
        Ratio("gate, routing, weights, metrics / step", total / step, "<= 0.01", detail(total, step)),
        Ratio("gate, routing, weights, metrics / forward and backward", total / loss, "", detail(total, loss)),
    ]
    return ratios, {"gate_seconds": medians, "step_seconds": step, "forward_backward_seconds": loss}


def gate_setup(shape: Shape, tokens: int) -> Setup:
    """One micro-batch of one group."""
    rows = ROLLOUTS_PER_PROMPT
    return Setup(shape, make_rollouts([tokens // rows] * rows, shape.vocab_size), micro_batch=rows)


class Stopwatch:
    """Seconds spent in the functions that it wraps, by part; a call inside another one counts for the outer alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to a part."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            synchronise()
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronise()
                self.seconds[part] += time.perf_counter() - start
                self._inside = False

        return call


def watch_the_method(stepper: Stepper, watch: Stopwatch) -> None:
    """Time the method inside of real steps: the hooks that subclasses override, and every equation of `core`."""
    trainer = stepper.trainer
    for part, names in HOOKS.items():
        for name in names:
            setattr(trainer, name, watch.wrap(part, getattr(trainer, name)))
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "sg_opd_trl"]
    for module in modules:
        # Inside of `core` one equation calls another: the outer call is enough.
        if module.__name__.startswith("sg_opd_trl.core."):
            continue
        for name, function in vars(module).copy().items():
            if inspect.isfunction(function) and function.__module__.startswith("sg_opd_trl.core"):
                setattr(module, name, watch.wrap(METRICS if name in STATISTICS else GATE, function))


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


def seconds_of_steps(result: dict) -> dict[str, float]:
    """The whole steps and their phases in a JSON line of this benchmark; shares of one step are no times of two."""
    task = result["built_in_task_seconds"]
    return {
        "micro-batch: step": result["step_seconds"],
        "micro-batch: forward and backward": result["forward_backward_seconds"],
        "built-in task: trainer step": task["trainer_step"],
        "built-in task: bare loop": task["bare_step"],
        **{f"built-in task, {phase}: trainer": seconds for phase, seconds in task["phases"]["trainer"].items()},
    }


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
        against="",
    )
    if args.against:
        compare_checkouts("overhead", args, seconds_of_steps)
        return
    gate, gate_data = share_of_the_gate(args)
    task, task_data = against_a_bare_loop(args)
    show("overhead", [*gate, *task], {**gate_data, **task_data, "settings": vars(args)})


if __name__ == "__main__":
    main()
