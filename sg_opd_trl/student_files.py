"""A student's files are put in their place once all of them are whole.

A student is saved into a folder that holds more than it: checkpoints, reports, an older student. So it is not one
rename, as for a checkpoint. It is written into a folder inside, flushed, listed, and then moved file by file. From the
first of these moves to the last the list stands there as a mark, and nobody takes what carries it for a student. A
process that is killed leaves the student that was there or the mark; and the mark stays, through any number of further
attempts that are killed as well, until a student is in its place with all of its files.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoints import MANIFEST, check_room, flush, told_of_a_full_disk
from .errors import CheckpointError

STUDENT_ASIDE = "student-in-progress"
# What `from_pretrained` looks for; shards without their index are no model.
_LAST = ("model.safetensors", "adapter_model.safetensors", ".index.json")
# Weights in one file, or in shards with their index, by the name that all of these share.
_WEIGHTS = re.compile(r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@contextmanager
def written_aside(folder: Path, needed: int, *, own: bool) -> Iterator[Path]:
    """Where to write a student that is to stand in a folder; at the end it is moved there.

    Args:
        folder: where the student is expected.
        needed: bytes that it takes, as far as it is known.
        own: whether this process writes; the others only learn where.

    Raises:
        CheckpointError: the disk is full; what was in the folder is as it was.
    """
    aside = folder / STUDENT_ASIDE
    if own:
        _sweep(aside)
        check_room(aside, needed)
        aside.mkdir(parents=True, exist_ok=True)
    try:
        with told_of_a_full_disk(aside, needed, own=False):
            yield aside
            if own:
                _list(aside)
    except CheckpointError:
        if own:
            # All but the mark of an earlier attempt, whose half student is still there.
            _sweep(aside)
        raise
    if own:
        _move(aside, folder)


def check_student(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder in which a student is half in its place; whatever loads a model from a path asks this first.

    Args:
        folder: a path; the id of a model on the Hub passes. Of an adapter, its base is looked at as well.

    Raises:
        CheckpointError: names what is missing and the way out.
    """
    _refuse_half(Path(folder))
    base = _base_of(Path(folder))
    if base is not None:
        _refuse_half(base)


def _refuse_half(folder: Path) -> None:
    aside = folder / STUDENT_ASIDE
    if has_half_a_student(folder):
        left = sorted(path.name for path in _written(aside))
        missing = f" before {left} were in their place" if left else ""
        raise CheckpointError(
            f"The student in {str(folder)!r} is not whole: the process that saved it was killed{missing}. Start the "
            "run again by the same command with resume_from_checkpoint: true, which saves it again, or load its last "
            "checkpoint."
        )


def has_half_a_student(folder: Path) -> bool:
    """Whether `check_student` would refuse it."""
    return (folder / STUDENT_ASIDE / MANIFEST).is_file()


def _base_of(folder: Path) -> Path | None:
    """What an adapter in the folder is put onto; a file that cannot be read is told of by whoever loads it."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return Path(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _written(aside: Path) -> list[Path]:
    """Files of the student, without the list of them."""
    return sorted(path for path in aside.rglob("*") if path.is_file() and path != aside / MANIFEST)


def _sweep(aside: Path) -> None:
    """Delete what an earlier attempt left, the mark of a half student excepted."""
    if not has_half_a_student(aside.parent):
        shutil.rmtree(aside, ignore_errors=True)
        return
    for path in aside.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path != aside / MANIFEST:
            path.unlink()


def _list(aside: Path) -> None:
    """From here on files may be moved, and the folder is a student in the making."""
    files = _written(aside)
    for path in files:
        flush(path)
    manifest, partial = aside / MANIFEST, aside / f"{MANIFEST}.partial"
    names = [path.relative_to(aside).as_posix() for path in files]
    partial.write_text(json.dumps({"files": names}, indent=1) + "\n", encoding="utf-8")
    flush(partial)
    # The mark of a half student that is there already goes only as this one comes.
    partial.replace(manifest)
    flush(aside)


def _move(aside: Path, folder: Path) -> None:
    names = json.loads((aside / MANIFEST).read_text(encoding="utf-8"))["files"]
    _remove_older_weights(folder, names)
    for name in sorted(names, key=lambda name: name.endswith(_LAST)):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        (aside / name).replace(place)
    for path in {(folder / name).parent for name in names} | {folder}:
        flush(path)
    (aside / MANIFEST).unlink()
    shutil.rmtree(aside, ignore_errors=True)


def _remove_older_weights(folder: Path, names: list[str]) -> None:
    """Weights in one file that stay beside a new student's shards would be loaded in place of them, and so on."""
    kinds = {match[1] for name in names if (match := _WEIGHTS.fullmatch(name))}
    for path in folder.iterdir():
        match = _WEIGHTS.fullmatch(path.name)
        if match and match[1] in kinds and path.name not in names:
            path.unlink()
