"""What the processes of a run have in common, looked at before they train, on one machine or on several.

Every machine has its own disk, its own copy of a recipe and its own command line. A checkpoint holds a part of every
process, and a step is one only where all of them compute the same: both would go wrong without a word.
"""

import secrets
import socket
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .errors import SGOPDConfigError
from .run_identity import CARRIED_OUT, Identity, changes, told

# Seconds: a network disk may show another machine's file with delay.
_PATIENCE = 10.0
# They may name the device of a process.
_OF_A_DEVICE = {"model_init_kwargs", "teacher_model_init_kwargs", "reference_model_init_kwargs"}


def machines_without(folder: Path) -> list[str]:
    """Hosts on which a folder is not the main process's; all processes must ask.

    Empty where the main process cannot write there, of which others tell.
    """
    state = PartialState()
    if state.num_processes == 1:
        return []
    mark: str | None = _marked(folder) if state.is_main_process else None
    mark = broadcast_object_list([mark])[0]
    if mark is None:
        return []
    seen = state.is_main_process or _sees(folder, mark)
    without = gather_object([] if seen else [socket.gethostname()])
    if state.is_main_process:
        (folder / mark).unlink(missing_ok=True)
    return sorted(set(without))


def check_shared(folder: Path) -> None:
    """Refuse an `output_dir` of which a machine has one of its own; all processes must call it.

    Raises:
        SGOPDConfigError: on every process, names the machines.
    """
    if without := machines_without(folder):
        raise SGOPDConfigError(
            f"`output_dir` must be a folder that all machines of a run share, got {str(folder)!r}, which on {without} "
            "is not the folder of the first process. A checkpoint has a part of every process, and no run could go "
            "on from it. Set the same folder everywhere, on a disk that all machines have; or save_strategy: 'no' "
            "for a run without checkpoints, whose student is saved by the first process."
        )


def check_same(identity: Identity) -> None:
    """Refuse processes that would train different runs together; all of them must call it.

    Args:
        identity: of this process's run, or a part of it.

    Raises:
        SGOPDConfigError: on every process, names what differs.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    own = {name: value for name, value in identity.items() if name not in CARRIED_OUT | _OF_A_DEVICE}
    main: Identity = broadcast_object_list([own])[0]
    found = changes(main, own) | _other_weights(main, own)
    words = gather_object([f"rank {state.process_index} on {socket.gethostname()}: {told(found)}"] if found else [])
    if words:
        raise SGOPDConfigError(
            "All processes of a run must have the same settings, rows and models, got on " + ", ".join(words) + " of "
            "the first process. Start the same command, with the same recipe, data and models, on every machine."
        )


def _other_weights(main: Identity, own: Identity) -> dict[str, tuple[Any, Any]]:
    """Teachers and references of which both processes know the weights, and that have others."""
    found = {}
    for role in ("teacher", "reference"):
        before, now = ((each.get(role) or {}).get("fingerprint") for each in (main, own))
        if None not in (before, now) and before != now:
            found[f"{role} (its weights)"] = before, now
    return found


def _marked(folder: Path) -> str | None:
    # A name that nobody has asked for: a network disk remembers for a while what was not there.
    name = f"_shared-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError:
        return None
    return name


def _sees(folder: Path, name: str) -> bool:
    end = time.monotonic() + _PATIENCE
    try:
        # Asks the disk, which may remember that there was no such folder.
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    while not (folder / name).exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
