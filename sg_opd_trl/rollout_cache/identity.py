"""Which weights a teacher has, as facts: what a name alone does not say.

A folder is known by its contents, a Hub id by its commit, a model given as an object by all of its weights. So a
folder may move, and a model that was trained on under the same name is another one.
"""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import SGOPDConfigError
from ..teachers import AdapterTeacher, LocalTeacher, Teacher
from ..trl_seam import get_config_model_id, is_sharded
from .keys import digest, folder_digest

_NOT_OF_THE_MODEL = ("_name_or_path", "_commit_hash", "transformers_version", "attn_implementation", "dtype")
_NOT_OF_THE_WEIGHTS = (
    *("trust_remote_code", "device_map", "attn_implementation"),
    # It has a fact of its own, as it is without being asked for.
    *("dtype", "torch_dtype"),
)
_WRAPPERS = ("base_layer", "original_module")
"""What PEFT puts into the names of weights it wraps, which depends on the student's own adapter."""


def teacher_facts(teacher: Teacher, student: Any) -> dict[str, Any]:
    """Facts that tell a teacher's weights from any others.

    Args:
        teacher: ready to score.
        student: unwrapped; the base of an adapter is its own.

    Raises:
        SGOPDConfigError: weights that cannot be told from others.
    """
    if isinstance(teacher, AdapterTeacher):
        return _of_adapter(teacher, student)
    if not isinstance(teacher, LocalTeacher):
        # A server says which model it serves; a teacher of the user's own says what it is.
        return {"identity": _without_paths(teacher.identity)}
    model = teacher.accelerator.unwrap_model(teacher.model)
    facts = {"dtype": str(model.dtype)}
    if teacher.loaded_from is None:
        return facts | _of_weights(model, sharded=is_sharded(teacher.accelerator))
    name, revision, options = teacher.loaded_from
    options = {key: value for key, value in options.items() if key not in _NOT_OF_THE_WEIGHTS}
    return facts | source_facts(name, revision) | ({"options": options} if options else {})


def source_facts(name: str, revision: str | None) -> dict[str, Any]:
    """Facts of a model or adapter by path or Hub id.

    Raises:
        SGOPDConfigError: a Hub id whose commit is not known.
    """
    if Path(name).is_dir():
        kind = "adapter" if (Path(name) / "adapter_config.json").is_file() else "model"
        return {kind: {"contents": folder_digest(Path(name))}}
    adapter = find_adapter_config_file(name, revision=revision)
    file = adapter or cached_file(name, "config.json", revision=revision)
    commit = extract_commit_hash(file, None)
    if commit is None:
        raise SGOPDConfigError(
            f"`teacher_rollouts_path` must go with a teacher that can be told from others, got {name!r}, whose commit "
            "is not known. Its rollouts could be taken for another's. Give the teacher as a local folder, or leave "
            "teacher_rollouts_path out."
        )
    return {"adapter" if adapter else "model": {"id": name, "commit": commit}}


def _of_adapter(teacher: AdapterTeacher, student: Any) -> dict[str, Any]:
    base = student.get_base_model()
    facts = {"dtype": str(base.dtype)} | source_facts(teacher.path, teacher.revision)
    # The student's own adapter and others of its kind are no part of the teacher.
    return facts | {"base": _of_weights(base, sharded=is_sharded(teacher.accelerator), left_out=student.peft_config)}


def _of_weights(model: Any, *, sharded: bool, left_out: Collection[str] = ()) -> dict[str, Any]:
    """Hash of all weights and of the configuration, the adapters of some names left out."""
    if sharded:
        raise SGOPDConfigError(
            f"`teacher_rollouts_path` must go with a teacher that can be told from others, got the sharded weights of "
            f"{get_config_model_id(model.config) or type(model).__name__!r}, of which no process has all. Give the "
            "teacher as a path with weights of its own, or leave teacher_rollouts_path out."
        )
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        parts = name.split(".")
        if any(adapter in parts for adapter in left_out) or not isinstance(value, torch.Tensor):
            continue
        plain = ".".join(part for part in parts if part not in _WRAPPERS)
        total.update(f"{plain} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    return {"weights": total.hexdigest()[:32], "config": config}


def _without_paths(facts: Any) -> Any:
    """Facts with absolute paths as hashes: a store may be published, and folders are named after people."""
    if isinstance(facts, Mapping):
        return {key: _without_paths(value) for key, value in facts.items()}
    return f"path {digest(facts)}" if isinstance(facts, str) and Path(facts).is_absolute() else facts
