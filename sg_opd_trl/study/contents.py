"""What local files hold: a retrained model or an edited data set under its old name is another one."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..teacher_sampling.stored.keys import digest, folder_digest

_MODELS = ("model_name_or_path", "teacher_model_name_or_path", "reference_model_name_or_path")
_DATA = ("dataset_name", "chat_template_path", "deepspeed", "fsdp_config", "accelerate_config")
_MIXTURE = ("path", "data_dir", "data_files")
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.jinja", "generation_config.json")
_BUILT_IN = "builtin/"

Stamp = tuple[tuple[str, int, int], ...]


def local_contents(recipe: Mapping[str, Any], evaluate: Mapping[str, Any], model: str | None = None) -> dict[str, str]:
    """Digests of the local models and data sets, and of the files with settings, that a job reads.

    Hub ids and built-in names have none: they are known by their names. Nor have folders that runs add to, such as
    `teacher_rollouts_path`. A file is read again only where its size or its time has changed.

    Args:
        recipe: of the job, empty where nothing is trained.
        evaluate: flags of its evaluation.
        model: that is measured, where nothing is trained.

    Returns:
        Path as given -> digest.
    """
    models = [*_texts([recipe.get(name) for name in _MODELS]), *_texts(model)]
    mixture = [entry for entry in recipe.get("datasets") or [] if isinstance(entry, Mapping)]
    data = [*(recipe.get(name) for name in _DATA), evaluate.get("dataset_name")]
    data += [entry.get(name) for entry in mixture for name in _MIXTURE]
    found = {name: _digest(name, is_model=True) for name in models}
    found |= {name: _digest(name, is_model=False) for name in _texts(data) if name not in found}
    return {name: value for name, value in found.items() if value is not None}


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value: a teacher may be a mapping, data files may be a list."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, Iterable):
        for item in value:
            yield from _texts(item)


def _digest(name: str, *, is_model: bool) -> str | None:
    path = Path(name)
    if not name or name.startswith(_BUILT_IN) or not path.exists():
        return None
    files = [path] if path.is_file() else sorted(_model_files(path) if is_model else _data_files(path))
    stamp = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _read_digest(path, stamp, is_model)


def _model_files(folder: Path) -> Iterator[Path]:
    """Weights, configuration and tokenizer are at the top; checkpoints of a training run are below."""
    return (path for path in folder.iterdir() if path.is_file())


def _data_files(folder: Path) -> Iterator[Path]:
    """Without what is hidden, and without what `datasets` leaves beside a saved data set when it is mapped."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        left = (path.name.startswith("cache-") and path.suffix == ".arrow") or (
            path.name.startswith("tmp") and not path.suffix
        )
        if path.is_file() and not hidden and not left:
            yield path


# Read once per size and time: a study asks for every job, and models are gigabytes.
@cache
def _read_digest(path: Path, stamp: Stamp, is_model: bool) -> str:
    """`stamp` is what the cache goes by; a model's other files, such as logs and cards, do not count."""
    if is_model and path.is_dir():
        files = {file for pattern in _TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()}
        return digest([folder_digest(path), _hashes(path, files)])
    return digest(_hashes(path, [Path(name) for name, _, _ in stamp]))


def _hashes(base: Path, files: Iterable[Path]) -> list[list[str]]:
    hashes = []
    for path in sorted(files):
        with path.open("rb") as file:
            hashes.append([str(path.relative_to(base)), hashlib.file_digest(file, "sha256").hexdigest()])
    return hashes
