"""Names of the built-in tasks and what they stand for. Imports nothing heavy until something has to be prepared."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SGOPDConfigError
from ..student_files import check_student
from .settings import ArithmeticSettings, ChainSettings, ModelSettings, SupervisedSettings, TaskSettings, settings_key

PREFIX = "builtin/"
TASKS: dict[str, type[ArithmeticSettings] | type[ChainSettings]] = {
    "arithmetic": ArithmeticSettings,
    "chains": ChainSettings,
}
ROLES = ("teacher", "student", "servable-teacher")  # each has `ROLE_model` and `ROLE_training` in the settings


@dataclass(frozen=True)
class _Artefact:
    """What a known name stands for; `role` None is the data set."""

    task: str
    role: str | None


_ARTEFACTS = {
    f"{PREFIX}{task}{'' if role is None else f'-{role}'}": _Artefact(task, role)
    for task in TASKS
    for role in (None, *ROLES)
}
KNOWN_NAMES = tuple(_ARTEFACTS)


def resolve(name: str, settings: TaskSettings | None = None) -> str:
    """Turn the name of a built-in artefact into a local folder, preparing it on first use.

    `builtin/arithmetic` and `builtin/chains` are data sets with splits `train`, `test` and `tune` for
    `datasets.load_dataset`; with `-teacher` or `-student` after it the name is a model for `from_pretrained`,
    tokenizer and chat template included; `-servable-teacher` is a teacher for vLLM on a CPU. `@SEED` after a model's
    name, such as `builtin/arithmetic-student@2`, gives another one made in the same way; 0 without it.

    Args:
        name: A built-in name, or the name or path of anything else.
        settings: What the built-in task is made of; as shipped if None.

    Returns:
        str: Absolute path of the folder; any name that does not start with `builtin/` is returned unchanged.

    Raises:
        SGOPDConfigError: If there is no such built-in, if its seed is not a whole number, or if the cache cannot be
            written to.
        CheckpointError: If it is the folder of a student that is half in its place.
    """
    if not name.startswith(PREFIX):
        # Every model that a command names passes here, whoever loads it then.
        check_student(name)
        return name
    base, marker, seed = name.partition("@")
    artefact = _ARTEFACTS.get(base)
    if artefact is None or (artefact.role is None and marker):
        raise SGOPDConfigError(_unknown_name_message(name, base))
    settings = settings or TASKS[artefact.task]()
    if artefact.role is None:
        return str(_dataset_folder(artefact.task, settings))
    return str(_model_folder(artefact.task, artefact.role, _parse_seed(name, marker, seed), settings))


def _parse_seed(name: str, marker: str, seed: str) -> int:
    if not marker:
        return 0
    if not (seed.isascii() and seed.isdigit()):
        raise SGOPDConfigError(
            f"The seed of a built-in model must be a whole number >= 0, got {name!r}. Because it seeds the model's "
            f"weights and training problems. Set it after the name, as in '{name.partition('@')[0]}@1', or leave '@' "
            "out for seed 0."
        )
    return int(seed)


def _unknown_name_message(name: str, base: str) -> str:
    # A cutoff of 0: there are a few names only, and the nearest is always worth naming.
    near = difflib.get_close_matches(base, KNOWN_NAMES, n=1, cutoff=0.0)[0]
    return (
        f"A name under '{PREFIX}' must be one of {', '.join(KNOWN_NAMES)} (a model may be followed by '@SEED'), got "
        f"{name!r}. Because this package makes these itself and knows no others. Set it to {near!r}, or to a local "
        "path or a hub name."
    )


def _load_task(name: str) -> Any:
    if name == "arithmetic":
        from .arithmetic import TASK as arithmetic

        return arithmetic
    from .chains import TASK as chains

    return chains


def _dataset_folder(task: str, settings: TaskSettings) -> Path:
    from .cache import cached_folder

    def build(folder: Path) -> dict[str, object]:
        # Only where something has to be built: this imports torch and transformers.
        from .prepare import prepare_dataset

        return prepare_dataset(folder, _load_task(task), settings.data)

    return cached_folder(f"{task}-{settings_key('dataset', settings.data)}", build)


def _model_folder(task: str, role: str, seed: int, settings: TaskSettings) -> Path:
    from .cache import cached_folder

    field = role.replace("-", "_")
    shape: ModelSettings = getattr(settings, f"{field}_model")
    training: SupervisedSettings = getattr(settings, f"{field}_training")

    def build(folder: Path) -> dict[str, object]:
        from .prepare import prepare_model

        return prepare_model(folder, _load_task(task), f"{task}-{role}", seed, settings.data, shape, training)

    key = settings_key(role, seed, settings.data, shape, training)
    return cached_folder(f"{task}-{role}-seed{seed}-{key}", build)
