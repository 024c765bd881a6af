"""A folder is held by one process at a time, however the one before ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from sg_opd_trl import SGOPDConfigError, folder_lock
from sg_opd_trl.folder_lock import LOCK_FILE, FolderLock

HOLDER = """
import os, sys, time
from pathlib import Path
from sg_opd_trl.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
if sys.argv[2] == "fork":
    there, here = os.pipe()
    if os.fork() == 0:
        os.write(here, b"1")
        time.sleep(60)
    os.read(there, 1)  # the child runs: it has dropped the lock
print("held", flush=True)
sys.stdin.read()
"""


def holder(folder: Path, how: str = "plain") -> subprocess.Popen[str]:
    """A process that holds the folder until its input ends."""
    words = [sys.executable, "-c", HOLDER, str(folder), how]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str], with_signal: int = signal.SIGKILL) -> None:
    os.kill(process.pid, with_signal)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def write_holder(folder: Path, **changed: object) -> None:
    """What a process left that could not let go."""
    facts = {"host": socket.gethostname(), "process": os.getpid(), "started": 0.0}
    (folder / LOCK_FILE).write_text(json.dumps(facts | changed))


def test_the_second_is_told_process_and_host(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    try:
        with pytest.raises(SGOPDConfigError, match=f"process {process.pid} on {socket.gethostname()} is training"):
            FolderLock(tmp_path / "run").acquire()
    finally:
        end(process)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_however_it_ends_the_folder_is_free(tmp_path: Path, how: int) -> None:
    end(holder(tmp_path), how)
    assert (tmp_path / LOCK_FILE).is_file()
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_outlives_the_process_does_not_hold_its_folder(tmp_path: Path) -> None:
    process = holder(tmp_path, "fork")
    try:
        end(process)
        FolderLock(tmp_path).acquire()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_letting_go_twice_and_taking_again(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    for _ in range(2):
        lock.acquire()
        lock.release()
        lock.release()


def test_a_process_of_another_machine_that_gives_signs_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "_HEARTBEAT_SECONDS", 0.05)
    write_holder(tmp_path, host="other-host", process=17)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.02):
            os.utime(tmp_path / LOCK_FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(SGOPDConfigError, match="process 17 on other-host"):
            FolderLock(tmp_path).acquire()
    finally:
        stop.set()
        thread.join()


def test_one_of_another_machine_that_gives_none_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "_HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(folder_lock, "_WATCH_SECONDS", 0.3)
    write_holder(tmp_path, host="other-host", process=17)
    lock = FolderLock(tmp_path)
    lock.acquire()
    before = (tmp_path / LOCK_FILE).stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / LOCK_FILE).stat().st_mtime_ns > before, "the holder gives signs itself"
    lock.release()


def test_a_disk_without_locks_asks_for_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "fcntl", None)
    parent = psutil.Process(os.getppid())
    write_holder(tmp_path, process=parent.pid, started=parent.create_time())
    with pytest.raises(SGOPDConfigError, match=f"process {parent.pid} on"):
        FolderLock(tmp_path).acquire()
    write_holder(tmp_path, process=parent.pid, started=parent.create_time() - 100)  # its number went to another one
    FolderLock(tmp_path).acquire()
