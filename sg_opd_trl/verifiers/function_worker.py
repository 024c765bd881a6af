"""The child process of one reward function of the caller's: pickled calls in, pickled answers out.

It is started as a file, so that a main script without a `__main__` guard, a notebook or a process that already uses a
GPU can start it. It imports the standard library, and what the function's own module imports.

Protocol. Argument 1 is JSON: `path` (for `sys.path`), `start_limit` and `limit` (seconds that importing the function
and a call may take), `patience` (seconds beyond a limit after which this process ends itself, where the parent has
not), `trace` (descriptor to which SIGUSR1 writes where the function is). A message is eight bytes that say how long it
is, and a pickle. The first to come is the function, answered by `("ready",)`; each other one the keyword arguments of
a call, answered by `("answer", value, logged)`. What is raised is `("raised", pickled error or None, its type and
words, traceback)`.

The parent kills a call that takes too long. Where the parent is gone, this process ends itself and what it has
started: at once if Python runs, else with the limit, which a thread below Python keeps.
"""

import faulthandler
import hashlib
import json
import os
import pickle
import random
import select
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

_LENGTH = struct.Struct(">Q")
_LONGEST = 1e9  # seconds that a timer can count
_Recorded = list[tuple[str, tuple, dict[str, Any]]]


def _private_pipes() -> tuple[BinaryIO, int]:
    """Moves the protocol away from descriptors 0 and 1, for what the function reads and prints."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    # What is printed before a kill is not lost.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return requests, replies


def _end_with(requests: int) -> None:
    """Waits until nobody can send requests any more, then ends the session."""
    parent = select.poll()
    parent.register(requests, 0)  # only that the other end is closed
    parent.poll()
    os.killpg(0, signal.SIGKILL)


def _messages(requests: BinaryIO) -> Iterator[Any]:
    while len(head := requests.read(_LENGTH.size)) == _LENGTH.size:
        yield requests.read(_LENGTH.unpack(head)[0])


def _send(replies: int, message: tuple) -> None:
    data = pickle.dumps(message)
    data = _LENGTH.pack(len(data)) + data
    while data:
        data = data[os.write(replies, data) :]


def _raised(error: BaseException) -> tuple:
    try:
        pickled = pickle.dumps(error)
        # Many errors can be written and not read: they are made of other arguments than they keep.
        pickle.loads(pickled)
    except Exception:  # noqa: BLE001  # whatever a class of the caller's does
        pickled = None
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    return "raised", pickled, f"{type(error).__name__}: {error}", text


def _seed(arguments: dict[str, Any]) -> None:
    """Makes what is random in the function depend on the batch alone, so that a run that goes on repeats it."""
    rows = [(len(ids), sum(ids)) for ids in arguments.get("completion_ids", ())]  # quick, of millions too
    batch = repr((getattr(arguments.get("trainer_state"), "global_step", 0), rows))
    seed = int.from_bytes(hashlib.blake2b(batch.encode(), digest_size=4).digest(), "big")
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _load(found: list[Callable[..., Any]], message: bytes) -> tuple:
    found.append(pickle.loads(message))
    return ("ready",)


def _call(function: Callable[..., Any], message: bytes) -> tuple:
    arguments = pickle.loads(message)
    logged: _Recorded = []

    def recorder(name: str) -> Callable[..., None]:
        return lambda *values, **named: logged.append((name, values, named))

    _seed(arguments)
    recorders = {name: recorder(name) for name in ("log_extra", "log_metric")}
    return "answer", function(**arguments, **recorders), logged


def _within(limit: float, trace: int, work: Callable[[], tuple]) -> tuple:
    faulthandler.dump_traceback_later(min(limit, _LONGEST), exit=True, file=trace)
    try:
        return work()
    except BaseException as error:  # noqa: BLE001  # SystemExit too: the parent raises it
        return _raised(error)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _reply(replies: int, message: tuple) -> None:
    try:
        _send(replies, message)
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001  # what the function returned or logged cannot be pickled
        _send(replies, _raised(TypeError(f"what it returned or logged cannot be sent on: {error}")))


def main() -> None:
    """Runs the child: reads the function, then calls it until the input ends."""
    settings = json.loads(sys.argv[1])
    requests, replies = _private_pipes()
    threading.Thread(target=_end_with, args=[requests.fileno()], daemon=True).start()
    faulthandler.register(signal.SIGUSR1, file=settings["trace"], all_threads=False)
    sys.path[:] = settings["path"]
    trace, messages = settings["trace"], _messages(requests)
    found: list[Callable[..., Any]] = []

    try:
        for message in messages:
            work = partial(_call, found[0]) if found else partial(_load, found)
            limit = settings["limit" if found else "start_limit"] + settings["patience"]
            _reply(replies, _within(limit, trace, partial(work, message)))
    except BrokenPipeError:
        return  # The parent is gone.


if __name__ == "__main__":
    main()
