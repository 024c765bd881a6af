"""Both ranks begin runs in a folder, one after another; each says what became of it. Run by `test_run_folder.py`.

Three words for each run: folder, what to resume, learning rate; with a comma, the first rank's and the other's.
"""

import sys
from types import SimpleNamespace

from accelerate import PartialState
from transformers.trainer_utils import SaveStrategy

from sg_opd_trl import SGOPDError, machines
from sg_opd_trl.launcher import leave_group
from sg_opd_trl.run_folder import owned, read_resume

machines._PATIENCE = 1.0
state = PartialState(cpu=True)


def say(line: str) -> None:
    """In one piece: `print` writes the line's end apart, and both ranks have one pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def own(word: str) -> str:
    return word.split(",")[min(state.process_index, word.count(","))]


words = [own(word) for word in sys.argv[1:]]
for folder, resume, rate in zip(words[::3], words[1::3], words[2::3], strict=True):
    args = SimpleNamespace(
        output_dir=folder,
        overwrite_output_dir=False,
        allow_changed=None,
        world_size=state.num_processes,
        save_strategy=SaveStrategy.STEPS,
        to_dict=lambda rate=rate: {"learning_rate": float(rate)},
    )
    identity = {"learning_rate": float(rate), "teacher": {"name": "t", "fingerprint": rate}, "use_cpu": rate}
    try:
        with owned(args) as run:
            start = run.begin(identity, read_resume(resume))
            say(f"rank {state.process_index}: starts from {start.checkpoint and start.checkpoint.name}")
            state.wait_for_everyone()
    except SGOPDError as error:
        say(f"rank {state.process_index}: {error}")
leave_group()
