"""Files that are written whole or not at all, and paths that are refused before there is anything to write."""

import os
import tempfile
from pathlib import Path

from .errors import SGOPDConfigError


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file, and the folders above it; a reader sees the old content or the new one, never a part.

    A process that is killed in between leaves `NAME.partial`, which the next attempt overwrites. Two processes must
    not write one file at the same time.

    Args:
        path: of the file.
        content: text is written as UTF-8.

    Returns:
        The path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename is atomic inside one file system only, and a temporary folder may be on another.
    partial = target.with_name(target.name + ".partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        # Otherwise a machine that goes down may have the new name and not what is behind it.
        os.fsync(file.fileno())
    os.replace(partial, target)
    return target


def check_folder(setting: str, path: Path) -> None:
    """Refuse a folder that cannot be written into, before hours of work end there.

    Raises:
        SGOPDConfigError: it is a file, or may not be written.
    """
    # What will be made is not made here: a run that is refused leaves nothing behind.
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = f"{there} is a file" if there.is_file() else error.strerror
        raise SGOPDConfigError(
            f"`{setting}` must be a folder that can be written, got {str(path)!r}: {reason}. Results are kept there. "
            "Set it to another folder."
        ) from error


def check_file(setting: str, path: str | os.PathLike[str] | None) -> None:
    """Refuse a file that cannot be written, before hours of work end there; None is no file.

    Raises:
        SGOPDConfigError: it is a folder, or may not be written.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise SGOPDConfigError(
            f"`{setting}` must be a file, got the folder {str(path)!r}. Results are written into it. Add a file's "
            "name."
        )
    check_folder(setting, Path(path).absolute().parent)
    if Path(path).exists() and not os.access(path, os.W_OK):
        raise SGOPDConfigError(
            f"`{setting}` must be a file that can be written, got {str(path)!r}. Set it to another."
        )
