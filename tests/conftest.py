"""How the tests run: slow files first, and a worker that dies, or a test that never ends, ends the run by name.

pytest-timeout ends a test by ending its process. pytest-xdist then starts another worker, which meets the same test,
four times for each process that was asked for: a run that stands at 99% for hours. So a dead worker is not replaced.
A test that holds the interpreter's lock keeps even the timer of pytest-timeout from running; for that one, the process
that hands out the tests has a watchdog.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# As on a machine with or without bfloat16, if that is asked for: before anything imports transformers, and for all
# processes that tests start.
_SWITCH = Path(__file__).parent / "bf16_switch"
sys.path.insert(0, str(_SWITCH))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_SWITCH), os.environ.get("PYTHONPATH")]))
import sitecustomize  # noqa: E402, F401

#: Of pytest-timeout's limit, which is the first to speak.
TIMES_THE_TIMEOUT = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scoreboard", action="store_true", help="print the figures of docs/reliability.md at the end")


def pytest_configure(config: pytest.Config) -> None:
    # Only where reports arrive, not in the processes that pytest-xdist hands tests to.
    if config.getoption("scoreboard") and not hasattr(config, "workerinput"):
        from reliability.scoreboard import Scoreboard

        config.pluginmanager.register(Scoreboard(), "scoreboard")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        config.option.maxworkerrestart = config.option.maxworkerrestart or "0"
        # pytest-xdist would begin with the files that have the most tests.
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: what begins last has to be short, or one process works while others wait."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_sessionstart(session: pytest.Session) -> None:
    # A shell that puts a command into the background has it ignore Ctrl-C, and some tests are about that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config = session.config
    # Only where tests are handed out: a person who sits in front of --pdb may take all the time in the world.
    if config.pluginmanager.hasplugin("dsession"):
        limit = TIMES_THE_TIMEOUT * float(config.getoption("timeout", None) or config.getini("timeout") or 0)
        if limit > 0:
            config.pluginmanager.register(Watchdog(config, limit), "watchdog")


@pytest.fixture(scope="module", autouse=True)
def own_launch() -> Iterator[None]:
    """accelerate keeps a run's precision, and whether it was sharded, for the process: the next file has its own."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(before)
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None and accelerate.AcceleratorState._shared_state:
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def shipped_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the built-in models as they are shipped, for all processes of the run: training takes minutes."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shipped"


class Watchdog:
    """Ends a run whose oldest test in progress, or whose last report, is too long ago."""

    def __init__(self, config: pytest.Config, limit: float) -> None:
        self.config, self.limit = config, limit
        self.running: dict[str, float] = {}
        self.died: list[str] = []
        self.heard = time.monotonic()
        self.done = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.heard = self.running[nodeid] = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.heard = time.monotonic()
        # What pytest-xdist reports of a dead worker's test has another phase, and no finish follows.
        if report.when not in ("setup", "call", "teardown"):
            self.running.pop(report.nodeid, None)
            self.died.append(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.heard = time.monotonic()
        self.running.pop(nodeid, None)

    def pytest_sessionfinish(self) -> None:
        self.done.set()

    def _watch(self) -> None:
        while not self.done.wait(min(self.limit / 4, 10)):
            running = dict(self.running)
            since = min(running.values(), default=self.heard)
            if time.monotonic() - since > self.limit:
                self._end(running)

    def _end(self, running: dict[str, float]) -> None:
        now = time.monotonic()
        tests = [f"in progress for {now - start:.0f} s: {name}" for name, start in running.items()]
        tests += [f"its worker died: {name}" for name in self.died]
        print("\nThe run is ended, it waits for ever.", *tests, sep="\n  ", file=sys.__stderr__)
        sys.__stderr__.flush()
        workers: Any = self.config.pluginmanager.getplugin("dsession").nodemanager.group
        # A worker that holds its lock does not hear that it should end: it is killed after a second.
        workers.terminate(timeout=1)
        os._exit(1)
