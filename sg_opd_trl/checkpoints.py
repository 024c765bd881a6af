"""A checkpoint is whole or it is not there.

It is written into a folder beside its place, flushed, completed by a manifest with the size and the checksum of every
file, and only then renamed to `checkpoint-N`. So a process that is killed, or a disk that is full, leaves the
checkpoints that were there; and what happens to files afterwards, a part missing or a bit flipped, is found before a
run goes on from them.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ASIDE = "checkpoint-in-progress"
"""Folder of the run in which a checkpoint is written; what a killed process left there is overwritten."""
# A folder without a manifest is TRL's or an older version's: what a resumed run reads without saying if it is missing.
_NEEDED = ("trainer_state.json", "scheduler.pt")
_NEEDED_OF_EVERY_RANK = "rng_state"
_NUMBERED = re.compile(r"^checkpoint-(\d+)$")
_BLOCK = 1 << 22


# --- writing ---------------------------------------------------------------------------------------------------------
@contextmanager
def told_of_a_full_disk(folder: Path, needed: int, *, own: bool = True) -> Iterator[None]:
    """Turn what torch, safetensors and the system say of a full disk into one message.

    Args:
        folder: that is written.
        needed: bytes that the checkpoint takes, as far as it is known.
        own: whether this process may delete what was written so far; others may write there still.

    Raises:
        CheckpointError: names the folder and the space.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        if own:
            shutil.rmtree(folder, ignore_errors=True)
        raise _no_room(folder, needed) from error


def check_room(folder: Path, needed: int) -> None:
    """Refuse to begin a checkpoint that cannot end.

    Raises:
        CheckpointError: names the folder and the space.
    """
    if free_space(folder) < needed:
        raise _no_room(folder, needed)


def free_space(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def _no_room(folder: Path, needed: int) -> CheckpointError:
    return CheckpointError(
        f"`output_dir` must have room for a checkpoint of about {_mib(needed)}, got {folder.parent}, whose disk is "
        f"full: {_mib(free_space(folder))} are free. The checkpoints that are there are whole. Free some space or "
        "choose another output_dir, then continue with resume_from_checkpoint; `save_total_limit` keeps fewer of "
        "them, `save_only_model` smaller ones."
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, is of a disk that takes no more."""
    while error is not None:
        words = str(error).lower()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(phrase in words for phrase in _FULL):
            return True
        # torch fails once more while it closes the file.
        error = error.__cause__ or error.__context__
    return False


# The last two are torch's words for a write that ended early.
_FULL = ("no space left", "file too large", "quota exceeded", "file write failed", "unexpected pos")


def complete(aside: Path, place: Path) -> None:
    """Flush a written checkpoint, write its manifest, and put it in its place; an older folder of that name goes.

    Args:
        aside: the folder as it was written.
        place: `checkpoint-N` of the run, in the same file system.
    """
    files = {path.relative_to(aside).as_posix(): path for path in sorted(aside.rglob("*")) if path.is_file()}
    for path in files.values():
        flush(path)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    entries = {name: {"size": sizes[name], "sha256": digest} for name, digest in _digests(files).items()}
    manifest = aside / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")
    flush(manifest)
    flush(aside)
    replaced = place.with_name(f"{place.name}-replaced")
    if place.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        place.rename(replaced)
    aside.rename(place)
    flush(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _digests(files: dict[str, Path]) -> dict[str, str]:
    # Hashing leaves the interpreter's lock: large files of a checkpoint are read side by side.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(_digest, files.values()), strict=True))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems of clusters cannot flush a folder.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# --- reading ---------------------------------------------------------------------------------------------------------
def checkpoints_of(output_dir: Path) -> list[Path]:
    """Folders named `checkpoint-N`, the highest N first."""
    if not output_dir.is_dir():
        return []
    numbered = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NUMBERED.match(path.name))]
    return [path for _, path in sorted(numbered, reverse=True) if path.is_dir()]


def newest_whole_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of a run that is whole; None where there is none.

    Every one that is passed over is warned about, with the file and what is wrong with it.
    """
    for checkpoint in checkpoints_of(Path(output_dir)):
        problem = find_problem(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("The checkpoint %s is passed over: %s.", checkpoint, problem)
    return None


def check_checkpoint(checkpoint: str | os.PathLike[str]) -> None:
    """Refuse to go on from a checkpoint that is not whole.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    folder = Path(checkpoint)
    problem = find_problem(folder) if folder.is_dir() else "there is no such folder"
    if problem is not None:
        raise CheckpointError(
            f"`resume_from_checkpoint` must be a whole checkpoint, got {str(checkpoint)!r}: {problem}. A run that "
            "goes on from it would be another run, or end in the middle. Give an older checkpoint, or "
            "resume_from_checkpoint=True for the newest whole one."
        )
    if not (folder / MANIFEST).is_file():
        logger.warning(
            "The checkpoint %s has no %s: whether its files are as they were written cannot be told.", folder, MANIFEST
        )


def find_problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a sentence that names the file; None if it is whole."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return _missing_part(checkpoint)
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, _) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes in place of {size}"
    # Sizes of all files before the content of any: that costs nothing.
    digests = _digests({name: checkpoint / name for name in expected})
    changed = next((name for name, (_, digest) in expected.items() if digests[name] != digest), None)
    if changed is not None:
        return f"the content of {changed} is not what was written"
    # Whole, and yet nothing to go on from: transformers would begin with a new optimizer, without a word.
    return None if _has_optimizer(expected) else "it holds the model alone (save_only_model), and no optimizer"


def _has_optimizer(names: Iterable[str]) -> bool:
    # FSDP and DeepSpeed have folders of their own for it.
    return any(name.startswith(("optimizer", "global_step")) for name in names)


def _missing_part(checkpoint: Path) -> str | None:
    """For a folder without a manifest: the part that transformers would pass over without a word, or fail at."""
    names = [path.name for path in checkpoint.iterdir()]
    missing = [name for name in _NEEDED if name not in names]
    if not any(name.startswith(_NEEDED_OF_EVERY_RANK) for name in names):
        missing.append(f"{_NEEDED_OF_EVERY_RANK}.pth")
    if not _has_optimizer(names):
        missing.append("optimizer.pt")
    if missing:
        return f"{missing[0]} is missing"
    try:
        json.loads((checkpoint / _NEEDED[0]).read_text(encoding="utf-8"))
    except ValueError:
        return f"{_NEEDED[0]} cannot be read"
    return None
