"""Names of the built-in task and what they stand for. Imports nothing heavy until something has to be prepared."""

import difflib
from pathlib import Path
from typing import Literal

from ..errors import SGOPDConfigError
from .settings import ArithmeticSettings, settings_key

PREFIX = "builtin/"
DATASET = "builtin/arithmetic"
TEACHER = "builtin/arithmetic-teacher"
STUDENT = "builtin/arithmetic-student"
KNOWN_NAMES = (DATASET, TEACHER, STUDENT)


def resolve(name: str, settings: ArithmeticSettings | None = None) -> str:
    """Turn the name of a built-in artefact into a local folder, preparing it on first use.

    `builtin/arithmetic` is a data set with splits `train` and `test` for `datasets.load_dataset`;
    `builtin/arithmetic-teacher` and `builtin/arithmetic-student` are models for `from_pretrained`, tokenizer and chat
    template included. `@SEED` after a model's name, such as `builtin/arithmetic-student@2`, gives another one made in
    the same way; 0 without it.

    Args:
        name: A built-in name, or the name or path of anything else.
        settings: What the built-in task is made of; as shipped if None.

    Returns:
        str: Absolute path of the folder; any name that does not start with `builtin/` is returned unchanged.

    Raises:
        SGOPDConfigError: If there is no such built-in, if its seed is not a whole number, or if the cache cannot be
            written to.
    """
    if not name.startswith(PREFIX):
        return name
    settings = settings or ArithmeticSettings()
    artefact, marker, seed = name.partition("@")
    if artefact == DATASET and not marker:
        return str(_dataset_folder(settings))
    if artefact == TEACHER:
        return str(_model_folder("teacher", _parse_seed(name, marker, seed), settings))
    if artefact == STUDENT:
        return str(_model_folder("student", _parse_seed(name, marker, seed), settings))
    raise SGOPDConfigError(_unknown_name_message(name, artefact))


def _parse_seed(name: str, marker: str, seed: str) -> int:
    if not marker:
        return 0
    if not (seed.isascii() and seed.isdigit()):
        raise SGOPDConfigError(
            f"The seed of a built-in model must be a whole number >= 0, got {name!r}. Because it seeds the model's "
            f"weights and training problems. Set it after the name, as in '{STUDENT}@1', or leave '@' out for seed 0."
        )
    return int(seed)


def _unknown_name_message(name: str, artefact: str) -> str:
    near = difflib.get_close_matches(artefact, KNOWN_NAMES, n=1, cutoff=0.0)[0]
    return (
        f"A name under '{PREFIX}' must be one of {', '.join(KNOWN_NAMES)} (a model may be followed by '@SEED'), got "
        f"{name!r}. Because this package makes these itself and knows no others. Set it to {near!r}, or to a local "
        "path or a hub name."
    )


def _dataset_folder(settings: ArithmeticSettings) -> Path:
    from .cache import cached_folder

    def build(folder: Path) -> dict[str, object]:
        from .prepare import prepare_dataset

        return prepare_dataset(folder, settings.data)

    return cached_folder(f"arithmetic-{settings_key('dataset', settings.data)}", build)


def _model_folder(role: Literal["teacher", "student"], seed: int, settings: ArithmeticSettings) -> Path:
    from .cache import cached_folder

    shape, training = (
        (settings.teacher_model, settings.teacher_training)
        if role == "teacher"
        else (settings.student_model, settings.student_training)
    )

    def build(folder: Path) -> dict[str, object]:
        from .prepare import prepare_model

        return prepare_model(folder, f"arithmetic-{role}", seed, settings.data, shape, training)

    key = settings_key(role, seed, settings.data, shape, training)
    return cached_folder(f"arithmetic-{role}-seed{seed}-{key}", build)
