"""A student's files are put in their place once all of them are whole.

A student is saved into a folder that holds more than it: checkpoints, reports, an older student. So it is not one
rename, as for a checkpoint. It is written into a folder inside, flushed, listed, and then moved file by file, what a
reader looks for last. A process that is killed leaves the student that was there, or, once files are being moved, the
list of those that are still to come: nobody takes that for a student.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoints import MANIFEST, check_room, flush, told_of_a_full_disk
from .errors import CheckpointError

logger = logging.getLogger(__name__)

STUDENT_ASIDE = "student-in-progress"
# What `from_pretrained` looks for; shards without their index are no model.
_LAST = ("model.safetensors", "adapter_model.safetensors", ".index.json")


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
        shutil.rmtree(aside, ignore_errors=True)
        check_room(aside, needed)
        aside.mkdir(parents=True)
    with told_of_a_full_disk(aside, needed, own=own):
        yield aside
        if own:
            _list(aside)
    if own:
        _move(aside, folder)


def check_student(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder in which a student is half in its place.

    Raises:
        CheckpointError: names what is missing and the way out.
    """
    aside = Path(folder) / STUDENT_ASIDE
    if (aside / MANIFEST).is_file():
        left = sorted(path.name for path in aside.rglob("*") if path.is_file() and path.name != MANIFEST)
        raise CheckpointError(
            f"The student in {str(folder)!r} is not whole: the process that saved it was killed before {left} were in "
            "their place. Start the run again by the same command with resume_from_checkpoint: true, which saves it "
            "again, or load its last checkpoint."
        )


def has_half_a_student(folder: Path) -> bool:
    """Whether `check_student` would refuse it."""
    return (folder / STUDENT_ASIDE / MANIFEST).is_file()


def _list(aside: Path) -> None:
    """From here on files may be moved, and the folder is a student in the making."""
    files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
    for path in files:
        flush(path)
    manifest = aside / MANIFEST
    names = [path.relative_to(aside).as_posix() for path in files]
    manifest.with_suffix(".tmp").write_text(json.dumps({"files": names}, indent=1) + "\n", encoding="utf-8")
    flush(manifest.with_suffix(".tmp"))
    manifest.with_suffix(".tmp").rename(manifest)
    flush(aside)


def _move(aside: Path, folder: Path) -> None:
    names = json.loads((aside / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name in sorted(names, key=lambda name: name.endswith(_LAST)):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        (aside / name).replace(place)
    flush(folder)
    (aside / MANIFEST).unlink()
    shutil.rmtree(aside, ignore_errors=True)
