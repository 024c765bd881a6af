"""Both ranks begin a run in a folder; each says what became of it. Run by `test_run_folder.py`."""

import sys
from types import SimpleNamespace

from accelerate import PartialState

from sg_opd_trl import SGOPDError
from sg_opd_trl.launcher import leave_group
from sg_opd_trl.run_folder import owned, read_resume

folder, resume, rate = sys.argv[1:]


def say(line: str) -> None:
    """In one piece: `print` writes the line's end apart, and both ranks have one pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


state = PartialState(cpu=True)
args = SimpleNamespace(
    output_dir=folder,
    overwrite_output_dir=False,
    allow_changed=None,
    world_size=state.num_processes,
    to_dict=lambda: {"learning_rate": float(rate)},
)
try:
    with owned(args) as own:
        start = own.begin({"learning_rate": float(rate)}, read_resume(resume))
        say(f"rank {state.process_index}: starts from {start.checkpoint and start.checkpoint.name}")
        state.wait_for_everyone()
except SGOPDError as error:
    say(f"rank {state.process_index}: {error}")
leave_group()
