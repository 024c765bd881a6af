"""A folder cache in which an artefact either is complete or is not there, whatever happens while it is built."""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import SGOPDConfigError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "SG_OPD_CACHE"
COMPLETE_MARK = ".prepared.json"
"""Written last; a folder without it is not an artefact. The leading dot keeps it out of data set discovery."""


def cache_root() -> Path:
    """Folder of all prepared artefacts: `$SG_OPD_CACHE`, or `~/.cache/sg_opd_trl`."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/sg_opd_trl").expanduser().absolute()


def is_complete(folder: Path) -> bool:
    """Whether a folder holds an artefact that was built to the end."""
    return (folder / COMPLETE_MARK).is_file()


def cached_folder(name: str, build: Callable[[Path], dict[str, object]]) -> Path:
    """Return the folder of an artefact, building it first if it is not there.

    It is built in a folder of its own and renamed when done, so nobody ever sees half of it. Processes that share the
    cache take turns: the first one builds, the others wait and use what it built. Where the file system has no locks
    they all build and the first rename wins.

    Args:
        name: Name of the folder inside the cache; must hold a hash of everything that shapes the artefact.
        build: Fills the empty folder it is given and returns facts to be kept beside the files.

    Returns:
        Path: Absolute path of the complete folder.

    Raises:
        SGOPDConfigError: If the cache cannot be written to.
    """
    target = cache_root() / name
    if is_complete(target):
        return target
    _make_root(target.parent)
    with _turn(target):
        if not is_complete(target):
            _build(target, build)
    return target


def _make_root(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        writable = os.access(root, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise SGOPDConfigError(
            f"`{CACHE_VARIABLE}` must be a folder that can be written to, got {str(root)!r}. Because the built-in "
            f"models and problems are prepared there once. Set {CACHE_VARIABLE} to a folder of yours."
        )


@contextmanager
def _turn(target: Path) -> Iterator[None]:
    """Hold the artefact's lock; go on without it where the file system has no locks."""
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        try:
            lock.acquire(timeout=0)  # at first without waiting, so that a wait can be announced
        except Timeout:
            logger.warning("Waiting for another process that is preparing %s.", target.name)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        logger.warning("%s is prepared without a lock (%s); another process may do the same work.", target.name, error)
    try:
        yield
    finally:
        lock.release()


def _build(target: Path, build: Callable[[Path], dict[str, object]]) -> None:
    # Not `tempfile`, whose folders only their owner can read: a cache may be shared.
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    scratch.mkdir()
    try:
        facts = build(scratch)
        (scratch / COMPLETE_MARK).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("Prepared %s.", target)


def _publish(scratch: Path, target: Path) -> None:
    """Rename into place, unless another process was faster; remains without the mark give way."""
    if target.exists() and not is_complete(target):
        _set_aside(target)
    try:
        scratch.rename(target)
    except OSError:
        if not is_complete(target):
            raise


def _set_aside(target: Path) -> None:
    # Renamed first, which happens at once: a process that dies while it deletes leaves nothing in the way.
    remains = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    target.rename(remains)
    shutil.rmtree(remains, ignore_errors=True)
