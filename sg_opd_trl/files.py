"""Files that are written whole or not at all."""

import os
from pathlib import Path


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
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, target)
    return target
