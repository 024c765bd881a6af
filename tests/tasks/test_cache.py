import json
import multiprocessing
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.tasks import cache as cache_module
from sg_opd_trl.tasks.cache import cache_root, cached_folder, is_complete


def write_text(folder: Path) -> dict[str, object]:
    (folder / "text").write_text("done")
    return {"size": 4}


def build_slowly(root: str, barrier: "multiprocessing.synchronize.Barrier") -> None:
    """Entry point of a process: builds and counts that it did."""
    os.environ["SG_OPD_CACHE"] = root

    def build(folder: Path) -> dict[str, object]:
        time.sleep(0.3)
        (Path(root).parent / f"built-{os.getpid()}").touch()
        return write_text(folder)

    barrier.wait()
    assert (cached_folder("thing", build) / "text").read_text() == "done"


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


def test_root_follows_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SG_OPD_CACHE", raising=False)
    assert cache_root() == tmp_path / ".cache" / "sg_opd_trl"
    monkeypatch.setenv("SG_OPD_CACHE", "~/elsewhere")
    assert cache_root() == tmp_path / "elsewhere"
    monkeypatch.setenv("SG_OPD_CACHE", "")
    assert cache_root() == tmp_path / ".cache" / "sg_opd_trl"


def test_second_call_builds_nothing(cache: Path) -> None:
    folder = cached_folder("thing", write_text)

    def never(folder: Path) -> dict[str, object]:
        raise AssertionError("built twice")

    assert cached_folder("thing", never) == folder == cache / "thing"
    assert json.loads((folder / ".prepared.json").read_text()) == {"size": 4}
    assert visible(cache) == ["thing"]


def test_failure_leaves_nothing_behind(cache: Path) -> None:
    def fail(folder: Path) -> dict[str, object]:
        write_text(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("thing", fail)
    assert visible(cache) == []
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert is_complete(cached_folder("thing", write_text))


def test_half_built_folder_is_replaced(cache: Path) -> None:
    (cache / "thing").mkdir(parents=True)
    (cache / "thing" / "text").write_text("half")
    (cache / "thing" / "rubbish").touch()
    (cache / ".thing.0123").mkdir()  # what a killed process leaves behind
    folder = cached_folder("thing", write_text)
    assert (folder / "text").read_text() == "done"
    assert not (folder / "rubbish").exists()


def test_folder_appears_in_one_piece(cache: Path) -> None:
    def build(folder: Path) -> dict[str, object]:
        write_text(folder)
        assert not (cache / "thing").exists()
        assert not is_complete(folder)
        return {}

    assert is_complete(cached_folder("thing", build))


def test_first_rename_wins_without_locks(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class NoLock:
        def __init__(self, path: Path) -> None:
            self.path = path

        def acquire(self, timeout: float = -1) -> None:
            raise NotImplementedError("no locks here")

        def release(self) -> None:
            """Nothing was acquired."""

    monkeypatch.setattr(cache_module, "FileLock", NoLock)

    def build_while_another_finishes(folder: Path) -> dict[str, object]:
        cached_folder("thing", write_text)
        (folder / "text").write_text("late")
        return {}

    folder = cached_folder("thing", build_while_another_finishes)
    assert (folder / "text").read_text() == "done"
    assert [path.name for path in cache.iterdir()] == ["thing"]
    assert "no locks here" in caplog.text


def test_waiting_is_announced(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    started, go_on = threading.Event(), threading.Event()

    def build(folder: Path) -> dict[str, object]:
        started.set()
        assert go_on.wait(10)
        return write_text(folder)

    first = threading.Thread(target=cached_folder, args=("thing", build))
    second = threading.Thread(target=cached_folder, args=("thing", build))
    first.start()
    assert started.wait(10)
    second.start()
    deadline = time.monotonic() + 10
    while "Waiting for another process" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "Waiting for another process that is preparing thing." in caplog.text
    go_on.set()
    for thread in (first, second):
        thread.join(10)
        assert not thread.is_alive()
    assert is_complete(cache / "thing")


def test_others_may_read_the_folder(cache: Path) -> None:
    umask = os.umask(0o022)
    try:
        folder = cached_folder("thing", write_text)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_unusable_cache_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    monkeypatch.setenv("SG_OPD_CACHE", str(blocker / "below"))
    with pytest.raises(SGOPDConfigError, match=r"`SG_OPD_CACHE` must be a folder that can be written to, got .*below"):
        cached_folder("thing", write_text)


@pytest.mark.slow
def test_racing_processes_build_once(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    processes = [context.Process(target=build_slowly, args=(str(cache), barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(list(cache.parent.glob("built-*"))) == 1
    assert visible(cache) == ["thing"]
