"""Every case on the ranks of one launch; what came out is kept after each, so that the one that hangs is known.

Words: a folder, then the names of the cases.
"""

import faulthandler
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from sharded.gloo_ranks import gloo_ranks_as_devices, is_sharded_launch

gloo_ranks_as_devices()

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from sharded.cases import logs, make

from sg_opd_trl import SGOPDConfigError

#: Seconds after which a collective that not all ranks take part in ends its process.
PATIENCE = 60


def run_case(name: str, folder: Path) -> dict[str, Any]:
    before = len(recorded())
    try:
        trainer = make(name, folder, use_cpu=not is_sharded_launch(), ddp_timeout=PATIENCE)
    except SGOPDConfigError as error:
        return {"refused": str(error)}
    trainer.train()
    trainer.save_model(str(folder / "student"))
    return {"logs": logs(trainer), "collectives": gather_object([recorded()[before:]])}


def recorded() -> list[str]:
    """What this rank has exchanged since it started, in order, as PyTorch's flight recorder has it."""
    entries = json.loads(torch._C._distributed_c10d._dump_fr_trace_json()).get("entries", [])
    # Of a scatter the rank that has the whole gives it, the others nothing.
    sizes = [[] if "scatter" in e["profiling_name"] else e["input_sizes"] for e in entries]
    return [f"{e['profiling_name']} {e['process_group'][0]} {size}" for e, size in zip(entries, sizes, strict=True)]


def main(folder: Path, names: list[str]) -> None:
    state = PartialState(cpu=not is_sharded_launch(), timeout=timedelta(seconds=PATIENCE))
    results: dict[str, Any] = {}
    for number, name in enumerate(names):
        faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
        own = folder / str(number)
        if state.is_main_process:
            own.mkdir(parents=True)
        state.wait_for_everyone()
        try:
            results[name] = run_case(name, own) | {"student": str(own / "student")}
        except Exception:
            print(f"in the case {name!r}: {traceback.format_exc()}", file=sys.stderr)
            raise
        if state.is_main_process:
            torch.save(results, folder / "results.pt")
        # Each run has its own settings of DeepSpeed.
        AcceleratorState._reset_state()
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
