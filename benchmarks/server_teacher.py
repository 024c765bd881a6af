"""A step of SG-OPD with its teacher behind a vLLM server against one with the same teacher in the training process.

    sg-opd serve-teacher --config recipes/arithmetic/sg_opd.yaml \
        --teacher_model_name_or_path builtin/arithmetic-servable-teacher
    python benchmarks/server_teacher.py --url http://localhost:8000 \
        [--teacher builtin/arithmetic-servable-teacher] [--steps 10] [--repeats 3]

Both run the recipe `sg_opd` of the built-in task in turns, the anchor at its full weight in every step. A step's parts
are what training waits for: with a server, requests that run while the student works cost what is left of them. On
one machine server and student share its cores; where the server has a machine of its own, its work is not in the way.
"""

import statistics
import sys
from typing import Any

from builtin_task import prepare_run, train_silently
from harness import Ratio, arguments, progress, show

PARTS = ("rollout", "verify", "teacher", "reference", "anchor", "loss")
_WHOLE_RUN = {"teacher_sampling_phase1_end_frac": 1.0, "teacher_sampling_phase2_end_frac": 1.0, "logging_steps": 1}


def seconds_of_steps(args: Any, url: str) -> list[dict[str, float]]:
    """Seconds of each part of every step but the first two, and of the whole step."""
    run = prepare_run("sg_opd", args, 0, **_WHOLE_RUN, **({"teacher_model_server_url": url} if url else {}))
    train_silently(run)
    logs = [entry for entry in run.trainer.state.log_history if "time/loss" in entry]
    steps = [{part: entry[f"time/{part}"] for part in PARTS} for entry in logs[2:]]
    return [step | {"step": sum(step.values())} for step in steps]


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of each part over all steps."""
    return {name: statistics.median(step[name] for step in steps) for name in (*PARTS, "step")}


def told(remote: float, local: float) -> str:
    """Both times."""
    return f"{remote * 1e3:.1f} ms / {local * 1e3:.1f} ms"


def main() -> None:
    args = arguments(
        __doc__ or "",
        url="",
        teacher="builtin/arithmetic-servable-teacher",
        student="",
        dataset="",
        problems=1,
        steps=10,
        repeats=3,
    )
    if not args.url:
        sys.exit("no --url of a server: nothing measured")
    args.max_steps = args.steps + 2
    steps: dict[str, list[dict[str, float]]] = {"server": [], "process": []}
    for _ in progress(range(args.repeats), "server and process in turns"):
        steps["server"] += seconds_of_steps(args, args.url)
        steps["process"] += seconds_of_steps(args, "")
    remote, local = medians(steps["server"]), medians(steps["process"])
    ratios = [
        Ratio(f"{name}: server / process", remote[name] / local[name], "", told(remote[name], local[name]))
        for name in ("step", "teacher", "anchor")
    ]
    show("server_teacher", ratios, {"server": remote, "process": local, "settings": vars(args)})


if __name__ == "__main__":
    main()
