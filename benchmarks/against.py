"""One benchmark of this checkout against the same benchmark of another, in turns.

`--against PATH` of a benchmark comes here. Every turn starts one process per checkout, which runs that checkout's own
`benchmarks/NAME.py` with its own package on `PYTHONPATH`, on the same sizes. So only the printed JSON must be alike,
and a busy minute of the machine hits both. Who goes first changes with every turn: the second of two processes may
find a warmer machine.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Ratio, progress, show

ROOT = Path(__file__).resolve().parents[1]


def compare_checkouts(name: str, args: Any, numbers: Callable[[dict], dict[str, float]]) -> None:
    """Run a benchmark of two checkouts in turns and show, for every number, the medians and the ratio new / old.

    Args:
        name: of the benchmark.
        args: its flags; `against` is the other checkout, `repeats` the turns: a process repeats nothing.
        numbers: JSON line of the benchmark -> seconds by label; labels that one checkout lacks are left out.
    """
    trees = {"new": ROOT, "old": Path(args.against).resolve()}
    found: dict[str, list[dict[str, float]]] = {tree: [] for tree in trees}
    turns = [tree for turn in range(args.repeats) for tree in (("new", "old") if turn % 2 == 0 else ("old", "new"))]
    with progress(turns, f"{name}, two checkouts") as bar:
        for tree in bar:
            bar.set_postfix_str(tree)
            found[tree].append(numbers(run_once(name, args, trees[tree])))
    labels = [label for label in found["new"][0] if label in found["old"][0]]
    seconds = {label: {tree: [result[label] for result in found[tree]] for tree in trees} for label in labels}
    commits = {tree: commit_of(path) for tree, path in trees.items()}
    ratios = [ratio_of(label, **seconds[label]) for label in labels]
    show(f"{name}_against", ratios, {"seconds": seconds, "commits": commits, "settings": vars(args)})


def run_once(name: str, args: Any, tree: Path) -> dict:
    """The JSON line of one run of a checkout's benchmark."""
    flags = {flag: value for flag, value in vars(args).items() if flag != "against"} | {"repeats": 1}
    words = [word for flag, value in flags.items() for word in words_of(flag, value)]
    done = subprocess.run(
        [sys.executable, str(tree / "benchmarks" / f"{name}.py"), *words],
        env=os.environ | {"PYTHONPATH": str(tree)},
        # An installed or editable copy of the package must not be found beside the script's own folder.
        cwd=tree,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def words_of(flag: str, value: Any) -> list[str]:
    """A flag as words of a command line; what is empty is left to the default."""
    if isinstance(value, bool):
        return [f"--{flag}"] if value else []
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)]
    return [] if value in ("", None) else [f"--{flag}", str(value)]


def commit_of(tree: Path) -> str:
    """Short name of a checkout's commit, with a mark where files have been changed since."""
    done = subprocess.run(
        ["git", "-C", str(tree), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def ratio_of(label: str, new: list[float], old: list[float]) -> Ratio:
    """Ratio of the medians, and how far the turns lie apart: a change inside of that spread is none."""
    turns = [mine / theirs for mine, theirs in zip(new, old, strict=True)]
    medians = statistics.median(new), statistics.median(old)
    spread = f"turns {min(turns):.3f} to {max(turns):.3f}"
    detail = f"{medians[0] * 1000:.3g} ms / {medians[1] * 1000:.3g} ms, {spread}"
    return Ratio(f"{label}: new / old", medians[0] / medians[1], "", detail)
