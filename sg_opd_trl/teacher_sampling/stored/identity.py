"""Which weights a teacher has, as facts: what a name alone does not say.

A folder is known by its contents, a Hub id by its commit, a model given as an object by all of its weights. So a
folder may move, and a model that was trained on under the same name is another one.
"""

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from ...errors import SGOPDConfigError
from ...scrubbing import without_secrets
from ...teachers import AdapterTeacher, BaseTeacher, LocalTeacher, ServerTeacher, Teacher
from ...trl_seam import get_config_model_id, is_sharded
from .keys import digest, folder_digest

# Fields of a model's configuration that say nothing of what it computes.
_NOT_OF_THE_MODEL = ("_name_or_path", "_commit_hash", "transformers_version", "attn_implementation", "dtype")
# Options of `from_pretrained` that say nothing of which weights are loaded.
_NOT_OF_THE_WEIGHTS = (
    *("trust_remote_code", "device_map", "attn_implementation"),
    *("max_memory", "offload_folder", "low_cpu_mem_usage"),
    # Where files are found, and with which key: facts are uploaded with a store.
    *("token", "use_auth_token", "cache_dir", "proxies", "force_download", "local_files_only"),
    # It has a fact of its own, as it is without being asked for.
    *("dtype", "torch_dtype"),
)
# Options that finding a model's files on the Hub needs again.
_LOOK_UP = ("token", "cache_dir", "proxies", "local_files_only")
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
    if isinstance(teacher, ServerTeacher):
        return {"identity": _of_server(teacher.identity)}
    if not isinstance(teacher, LocalTeacher):
        # A teacher of the user's own says what it is.
        return {"identity": _without_paths(teacher.identity)}
    model = teacher.accelerator.unwrap_model(teacher.model)
    facts = {"dtype": str(model.dtype)}
    source = None if teacher.loaded_from is None else _of_source(*teacher.loaded_from)
    return facts | (source or _of_weights(model, sharded=is_sharded(teacher.accelerator)))


def source_facts(
    name: str, revision: str | None, *, subfolder: str = "", gguf_file: str | None = None, **where: Any
) -> dict[str, Any] | None:
    """Facts of a model or adapter by path or Hub id.

    Args:
        name: path or Hub id.
        revision: of a Hub id.
        subfolder: as for `from_pretrained`.
        gguf_file: as for `from_pretrained`.
        **where: further options of `from_pretrained` that say where files are found.

    Returns:
        None where the files that are loaded are not known as weights.

    Raises:
        SGOPDConfigError: a Hub id whose commit is not known.
    """
    if Path(name).is_dir():
        contents = folder_digest(Path(name), subfolder, gguf_file)
        kind = "adapter" if (Path(name) / subfolder / "adapter_config.json").is_file() else "model"
        return None if contents is None else {kind: {"contents": contents}}
    if gguf_file is not None and Path(gguf_file).is_file():
        # It is loaded in place of the weights on the Hub.
        return None
    where |= {"subfolder": subfolder} if subfolder else {}
    adapter = find_adapter_config_file(name, revision=revision, **where)
    file = adapter or cached_file(name, gguf_file or "config.json", revision=revision, **where)
    commit = extract_commit_hash(file, None)
    if commit is None:
        raise _indistinguishable(f"{name!r}, whose commit is not known", "Give the teacher as a local folder")
    return {"adapter" if adapter else "model": {"id": name, "commit": commit}}


def _of_source(name: str, revision: str | None, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Facts of a model by what it was loaded from and how; None where its files do not tell it from others."""
    where = {key: options[key] for key in _LOOK_UP if options.get(key) is not None}
    facts = source_facts(
        name,
        revision or options.get("revision"),
        subfolder=options.get("subfolder") or "",
        gguf_file=options.get("gguf_file"),
        **where,
    )
    # An adapter that `from_pretrained` found has a base, whose weights are elsewhere.
    if facts is None or "adapter" in facts:
        return None
    kept = {key: value for key, value in options.items() if key not in _NOT_OF_THE_WEIGHTS}
    return facts | ({"options": _without_paths(kept)} if kept else {})


def _of_server(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a server says of itself, with the contents of folders that are here too in place of their names."""
    facts = _without_paths(identity)
    for key in ("name", "root"):
        if isinstance(identity.get(key), str) and os.path.isdir(identity[key]):
            contents = folder_digest(Path(identity[key]))
            facts |= {} if contents is None else {key: f"contents {contents}"}
    return facts


def _of_adapter(teacher: AdapterTeacher, student: Any) -> dict[str, Any]:
    base = student.get_base_model()
    if isinstance(teacher, BaseTeacher):
        own = student.peft_config
        return {"dtype": str(base.dtype)} | _of_weights(base, sharded=is_sharded(teacher.accelerator), left_out=own)
    source = source_facts(teacher.path, teacher.revision)
    if source is None:
        raise _indistinguishable(f"{teacher.path!r}, where no weights are found", "Give the adapter with its weights")
    facts = {"dtype": str(base.dtype)} | source
    # The student's own adapter and others of its kind are no part of the teacher.
    return facts | {"base": _of_weights(base, sharded=is_sharded(teacher.accelerator), left_out=student.peft_config)}


def _of_weights(model: Any, *, sharded: bool, left_out: Collection[str] = ()) -> dict[str, Any]:
    """Hash of all weights and of the configuration, the adapters of some names left out."""
    if sharded:
        name = get_config_model_id(model.config) or type(model).__name__
        raise _indistinguishable(
            f"the sharded weights of {name!r}, of which no process has all",
            "Give the teacher as a path with weights of its own",
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


def _indistinguishable(got: str, way_out: str) -> SGOPDConfigError:
    return SGOPDConfigError(
        f"`teacher_rollouts_path` must go with a teacher that can be told from others, got {got}. Its rollouts could "
        f"be taken for another's. {way_out}, or leave teacher_rollouts_path out."
    )


def _without_paths(facts: Any) -> Any:
    """Facts without keys, and with absolute paths as hashes: a store may be published, and folders are named after
    people.
    """
    if isinstance(facts, Mapping):
        return {key: _without_paths(value) for key, value in without_secrets(facts).items()}
    if isinstance(facts, list | tuple):
        return [_without_paths(value) for value in facts]
    if isinstance(facts, str | Path) and (Path(facts).is_absolute() or str(facts).startswith("~")):
        return f"path {digest(str(facts))}"
    return without_secrets(facts)
