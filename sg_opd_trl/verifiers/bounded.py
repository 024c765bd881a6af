"""Reward functions of the caller's in processes of their own, so that one that never returns does not hold the run.

A function that can be found by its name is called in a fresh interpreter. What takes longer than `verifier_timeout` is
killed there with all that it has started, and its batch has no verdict. What cannot be moved stays in this process,
unbounded, with a warning that says why.
"""

import functools
import inspect
import json
import logging
import os
import pickle
import pickletools
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from torch import nn

from ..errors import SGOPDConfigError, VerifierError
from ..setting import declared, setting, value_problems
from ..trl_seam import get_callable_name, is_async_callable
from .child import START_LIMIT, Child, ChildEnded, ChildSilent, environment_without_secrets, require_posix

logger = logging.getLogger(__name__)

_WORKER_FILE = Path(__file__).with_name("function_worker.py")
_LENGTH = struct.Struct(">Q")
_PATIENCE = 30.0  # seconds beyond a limit, after which the child ends itself should this process have gone
_TRACE_LIMIT = 0.5  # seconds in which a child says where it is
_MAX_CRASHES = 2  # as for `math_reward`: the first may be the machine's doing, such as a killer of processes
_MAX_UNANSWERED = 5
"""Calls in a row without an answer, after which the run ends: such a function would use up all of it (our choice)."""
_PACKAGE = __name__.partition(".")[0]


@dataclass
class RewardFields:
    """The setting of every method that calls reward functions; a base to stand before TRL's configuration."""

    verifier_timeout: float | None = setting(
        None,
        group="Reward functions",
        above=0,
        off=None,
        why="It is the time that a call of a reward function may take.",
        way_out="Set it to None to call reward functions in this process, without a limit.",
        help="Seconds that one call of a reward function on one batch may take. Each function that can be found by "
        "its name runs in a process of its own then, without secrets in its environment; a call that takes longer is "
        "killed, and its batch has no verdict. What cannot be moved stays, with a warning. `math_reward` has limits "
        "of its own. None: in this process, without a limit (our choice).",
    )


def reward_problems(config: RewardFields) -> Iterator[str]:
    """What is wrong with the setting, for configurations that do not check all of theirs together."""
    yield from value_problems(config, declared(RewardFields))


def check_limit(limit: float) -> None:
    """Check a limit that is in no configuration.

    Raises:
        SGOPDConfigError: it is no number above 0.
    """
    problem = declared(RewardFields)["verifier_timeout"].problem(limit)
    if problem is not None:
        raise SGOPDConfigError(problem)


def bounded(reward_funcs: Any, limit: float | None) -> Any:
    """The reward functions of a run, each that can be moved in a process of its own.

    Args:
        reward_funcs: as TRL's trainers take them: one or a list, functions, models or names of models.
        limit: `verifier_timeout`; None changes nothing.

    Raises:
        VerifierError: the system has no processes that can be bounded.
    """
    if limit is None or reward_funcs is None:
        return reward_funcs
    several = isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
    return [_bounded(each, limit) for each in (reward_funcs if several else [reward_funcs])]


def close(reward_funcs: Sequence[Any]) -> None:
    """End the processes of the functions that have one; the next call starts another."""
    for each in reward_funcs:
        if isinstance(each, BoundedFunction):
            each.close()


def _bounded(function: Any, limit: float) -> Any:
    function = function.__wrapped__ if isinstance(function, BoundedFunction) else function
    if isinstance(function, (str, nn.Module)) or _is_of_this_package(function):
        return function
    reason = why_it_stays(function)
    if reason is None:
        return BoundedFunction(function, limit)
    logger.warning(
        "`verifier_timeout=%g` does not bound `%s`: %s. It is called in this process, and holds the run should it "
        "never return. Put it into a module of its own as a plain function, or give it a limit of its own.",
        limit,
        get_callable_name(function),
        reason,
    )
    return function


# --- what can be moved -----------------------------------------------------------------------------------------------
def why_it_stays(function: Any) -> str | None:
    """Why a function cannot run in another process and be the same; None if it can."""
    if is_async_callable(function):
        return "it is async, and shares its event loop with others"
    if "environments" in _parameters(function):
        return "it asks for `environments`, which are in this process"
    try:
        if _has_state(function):
            return f"it is an object with a state of its own ({type(_innermost(function)).__name__})"
        names = {argument for _, argument, _ in pickletools.genops(pickle.dumps(function))}
    except Exception as error:  # noqa: BLE001  # whatever a class of the caller's does
        return f"it cannot be found by its name ({error})"
    if names & {"__main__", "__mp_main__"}:
        return "it is defined in a script or a notebook"
    return None


def _is_of_this_package(function: Any) -> bool:
    return str(getattr(_innermost(function), "__module__", "")).partition(".")[0] == _PACKAGE


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _parameters(function: Any) -> Sequence[str]:
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:  # some that are written in C have none
        return []


def _has_state(function: Any) -> bool:
    """Whether a call may change what the next one sees, other than through its module."""
    while isinstance(function, functools.partial):
        if not _is_plain([function.args, function.keywords]):
            return True
        function = function.func
    if isinstance(function, type):
        return False
    if inspect.isroutine(function):
        owner = getattr(function, "__self__", None)
        return owner is not None and not isinstance(owner, (type, ModuleType))
    # An object that is found by its name, such as what `functools.cache` makes, or one that is like any other.
    return not isinstance(function.__reduce_ex__(4), str) and function.__getstate__() is not None


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


# --- a function in a process of its own ------------------------------------------------------------------------------
class BoundedFunction:
    """A reward function that is called in a process of its own, and like the function itself.

    The process starts with the first call, and again after it was killed. The completions of a call that takes too
    long, or at which the process dies twice, get None. What the function raises is raised here; what it gives to
    `log_extra` and `log_metric` is passed on; `trainer_state` is a copy. Threads take turns.

    Args:
        function: one that `why_it_stays` has nothing against.
        limit: seconds that a call may take.

    Attributes:
        limit: the same.

    Raises:
        VerifierError: the system has no POSIX signals.
    """

    __name__: str

    def __init__(self, function: Callable[..., Any], limit: float) -> None:
        functools.update_wrapper(self, function, updated=())
        self.__wrapped__ = function
        self.__name__ = get_callable_name(function)  # as TRL logs it
        require_posix(self.__name__, "Set verifier_timeout to None here.")
        self.limit = limit
        self._pickled = pickle.dumps(function)
        self._unanswered = 0
        self._told: set[str] = set()
        self._columns: dict[str, None] = {}
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._process: _FunctionProcess | None = None

    def __call__(self, *, completions: Sequence[Any], **arguments: Any) -> Any:
        """What the function answers; None for every completion where it does not.

        Args:
            completions: of the batch.
            arguments: the others that TRL has for reward functions.

        Raises:
            VerifierError: it cannot be started, or has not answered for several calls in a row.
        """
        if os.getpid() != self._owner:
            self._reset()  # a fork, which has a process of its own
        logs = {name: arguments.pop(name, _leave_out) for name in ("log_extra", "log_metric")}
        state = arguments.get("trainer_state")
        request = self._request({"completions": completions} | arguments)
        with self._lock:
            answer = self._ask(request, getattr(state, "global_step", 0))
        self._pass_on(answer, logs, len(completions))
        return [None] * len(completions) if answer is None else answer.value

    def close(self) -> None:
        """End the process. The function stays usable: the next call starts another."""
        process, self._process = self._process, None
        if process is not None and os.getpid() == self._owner:
            process.stop()

    def _request(self, arguments: dict[str, Any]) -> bytes:
        if arguments.pop("environments", None) is not None:
            self._tell(
                "environments",
                f"`{self.__name__}` is not given `environments`, as it runs in a process of its own "
                "(`verifier_timeout`). Name the parameter in its signature to have it stay with them.",
            )
        if "trainer_state" in arguments:
            # Its class would bring transformers and torch into a process that may need neither.
            arguments["trainer_state"] = SimpleNamespace(**vars(arguments["trainer_state"]))
        try:
            return pickle.dumps(arguments)
        except Exception as error:
            names = [name for name, value in arguments.items() if not _can_be_sent(value)]
            raise VerifierError(
                f"`verifier_timeout` must be None with values that cannot be sent to another process, got them in "
                f"{names} for `{self.__name__}`: {error}. Leave such columns out of the data set, or leave the "
                "setting out."
            ) from error

    def _ask(self, request: bytes, step: int) -> "_Answer | None":
        kind = problem = ""
        for _ in range(_MAX_CRASHES):
            try:
                return self._asked_once(request)
            except ChildSilent as error:
                limit = f"`verifier_timeout`, {self.limit:g} seconds"
                kind, problem = "silent", f"took longer than {limit}{error}, and was killed"
                break
            except ChildEnded as error:
                kind, problem = "ended", f"ended its process twice, with {error}"
        self._left_without(kind, problem, step)
        return None

    def _asked_once(self, request: bytes) -> "_Answer":
        answer = None
        try:
            if self._process is None:
                self._process = _FunctionProcess(self.__name__, self._pickled, self.limit)
            answer = self._process.ask(request, self.limit)
        finally:
            # Also where a signal ends the wait: what comes then would be taken for the answer to the next call.
            if answer is None:
                self.close()
        self._unanswered = 0
        return answer

    def _left_without(self, kind: str, problem: str, step: int) -> None:
        self._unanswered += 1
        told = f"`{self.__name__}` {problem}, after {step} finished steps."
        if self._unanswered >= _MAX_UNANSWERED:
            raise VerifierError(
                f"{told} It is call {self._unanswered} in a row without an answer; the whole run would have no "
                "verdict. Mend the function, or raise `verifier_timeout` if it may take longer."
            )
        self._tell(
            kind,
            f"{told} The completions of this call have no verdict; `rewards/{self.__name__}/unanswered` counts them. "
            f"The run ends after {_MAX_UNANSWERED} such calls in a row.",
        )

    def _tell(self, kind: str, message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("%s", message)

    def _pass_on(self, answer: "_Answer | None", logs: dict[str, Callable[..., None]], count: int) -> None:
        logs["log_metric"](f"rewards/{self.__name__}/unanswered", float(count if answer is None else 0))
        if answer is None:
            # The table of completions needs columns of one length.
            for column in self._columns:
                logs["log_extra"](column, [None] * count)
            return
        for name, values, named in answer.logged:
            if name == "log_extra":
                self._columns[values[0] if values else named["column"]] = None
            logs[name](*values, **named)


class _Answer(NamedTuple):
    """What a call has come to."""

    value: Any
    logged: list[tuple[str, tuple, dict[str, Any]]]


class _FunctionProcess:
    """A fresh interpreter that calls one function.

    Args:
        name: of the function.
        pickled: the function.
        limit: of a call, in seconds.

    Raises:
        VerifierError: the function cannot be imported there.
    """

    def __init__(self, name: str, pickled: bytes, limit: float) -> None:
        self._name = name
        self._trace = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        settings = {
            "path": [os.path.abspath(entry) for entry in sys.path],  # "" is the working directory
            "limit": limit,
            "start_limit": START_LIMIT,
            "patience": _PATIENCE,
            "trace": self._trace.fileno(),
        }
        # -P: the folder of the worker is not importable; the rest of the path comes with the settings.
        command = [sys.executable, "-P", str(_WORKER_FILE), json.dumps(settings)]
        self._child = Child(
            command, environment=environment_without_secrets(), own_session=True, kept=[self._trace.fileno()]
        )
        try:
            self._wait_until_ready(pickled)
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self, pickled: bytes) -> None:
        try:
            kind, *rest = self._exchange(pickled, START_LIMIT)
        except (ChildSilent, ChildEnded) as error:
            kind, rest = "", [f"{type(error).__name__}: {error or f'nothing came in {START_LIMIT:g} seconds'}"]
        if kind != "ready":
            raise VerifierError(
                f"`{self._name}` must be importable in a process of its own where `verifier_timeout` is set, got: "
                f"{rest[-1].strip()}\nThat process has this one's `sys.path`, and its environment without secrets. "
                "Mend the module, or set verifier_timeout to None."
            )

    def ask(self, request: bytes, limit: float) -> _Answer:
        """Call the function.

        Args:
            request: the pickled keyword arguments.
            limit: seconds that it may take.

        Raises:
            ChildSilent: it takes longer; its words say where it was, as far as is known.
            ChildEnded: the process is gone.
        """
        kind, *rest = self._exchange(request, limit)
        if kind == "answer":
            return _Answer(*rest)
        raise self._error(*rest)

    def _error(self, pickled: bytes | None, text: str, told: str) -> BaseException:
        error: Any = None if pickled is None else _loaded(pickled)
        if not isinstance(error, BaseException):
            error = VerifierError(f"`{self._name}` ended in {text}")
        error.add_note(
            f"Raised by `{self._name}` in a process of its own (`verifier_timeout`), whose environment has no "
            f"variables that are named like secrets:\n{told}"
        )
        return error

    def _exchange(self, data: bytes, limit: float) -> tuple:
        deadline = time.monotonic() + limit
        self._child.send(_LENGTH.pack(len(data)) + data)
        try:
            size = _LENGTH.unpack(self._take(_LENGTH.size, deadline))[0]
            return pickle.loads(self._take(size, deadline))
        except ChildSilent as error:
            raise ChildSilent(self._where()) from error

    def _take(self, size: int, deadline: float) -> bytes:
        while len(self._child.received) < size:
            self._child.wait(deadline)
        taken, self._child.received = self._child.received[:size], self._child.received[size:]
        return taken

    def _where(self) -> str:
        """Where the function is, in words that follow "took longer than ..."; "" where it does not say."""
        os.kill(self._child.pid, signal.SIGUSR1)
        deadline = time.monotonic() + _TRACE_LIMIT
        frames: list[str] = []
        while not frames and time.monotonic() < deadline:
            time.sleep(0.01)
            # Not by a seek, which would move the place at which the child writes.
            text = os.pread(self._trace.fileno(), 1 << 16, 0).decode(errors="replace")
            lines = text.rpartition("\n")[0].splitlines()
            frames = [line.strip() for line in lines if line.startswith("  File ") and str(_WORKER_FILE) not in line]
        return f" ({', from '.join(frames[:3])})" if frames else ""

    def stop(self) -> None:
        """End the process and all that it has started."""
        self._child.stop(at_once=True)
        self._trace.close()


def _loaded(pickled: bytes) -> Any:
    try:
        return pickle.loads(pickled)
    except Exception:  # noqa: BLE001  # a class that only the child can import
        return None


def _can_be_sent(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # noqa: BLE001  # whatever a class of the caller's does
        return False
    return True


def _leave_out(*args: Any, **kwargs: Any) -> None:
    """Stands in for TRL's logging functions where the caller has none."""
