"""Cases on the ranks of one launch; what came out is kept after each, so that the one that hangs is known.

Words: a folder, then the names of the cases.
"""

import faulthandler
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from sharded.gloo_ranks import gloo_ranks_as_devices, is_sharded_launch

gloo_ranks_as_devices()

import torch  # noqa: E402  # accelerate makes its state from here on
from accelerate import PartialState  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402

from sharded.cases import ACTIONS, run_case  # noqa: E402
from sharded.launches import COLLECTIVE_PATIENCE  # noqa: E402


def recorded() -> list[str]:
    """What this rank has exchanged since it started, in order: operation, group, and sizes where they are equal."""
    entries = json.loads(torch._C._distributed_c10d._dump_fr_trace_json()).get("entries", [])
    # The rank that has the whole gives it to a scatter, the others give nothing.
    sizes = [[] if "scatter" in e["profiling_name"] else e["input_sizes"] for e in entries]
    return [f"{e['profiling_name']} {e['process_group'][0]} {size}" for e, size in zip(entries, sizes, strict=True)]


def main(folder: Path, names: list[str]) -> None:
    patience = timedelta(seconds=COLLECTIVE_PATIENCE)
    state = PartialState(cpu=not is_sharded_launch(), timeout=patience)
    results: dict[str, Any] = {}
    for number, name in enumerate(names):
        faulthandler.dump_traceback_later(4 * COLLECTIVE_PATIENCE, exit=True)
        before = len(recorded())
        try:
            result = run_case(name, folder / str(number), use_cpu=not is_sharded_launch())
        except Exception:
            print(f"Rank {state.process_index} in {name!r} began last: {recorded()[-5:]}", file=sys.stderr, flush=True)
            raise
        results[name] = result | {"collectives": gather_object([recorded()[before:]])}
        if name in ACTIONS:
            results[name]["ranks"] = gather_object([result])
        if state.is_main_process:
            torch.save(results, folder / "results.pt")
        # Each run has its own settings of DeepSpeed, and its own precision: transformers leaves it behind.
        AcceleratorState._reset_state()
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
