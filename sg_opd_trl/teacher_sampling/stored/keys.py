"""What a stored rollout is found by, as digests of facts: equal facts have equal digests, on every machine.

Torch is not imported here: the command line and studies take digests before anything is loaded.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT = 1
"""Goes into every digest: entries of another format are not found."""

DIGEST_LENGTH = 24
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
_DESCRIPTIONS = ("config.json", "adapter_config.json", "*.index.json", "*.py")
_WEIGHTS = ("*.safetensors", "*_model*.bin")


def context_facts(
    teacher: Mapping[str, Any], tokenizer: Mapping[str, Any], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that decides how likely a rollout is, ready for JSON.

    Args:
        teacher: facts that tell its weights from others.
        tokenizer: of the student, see `tokenizer_facts`.
        sampling: fields of `teachers.Sampling`.
    """
    # YAML's 1 and 1.0 are one temperature.
    numbers = {name: float(sampling[name]) for name in _NUMBERS if sampling.get(name) is not None}
    facts = {"format": FORMAT, "teacher": teacher, "tokenizer": tokenizer, "sampling": {**sampling, **numbers}}
    return json.loads(json.dumps(facts, default=str))


def digest(facts: Any) -> str:
    """Hash of JSON-ready facts, in hexadecimal digits; the order of keys does not count."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What a token id means: the whole vocabulary by its hash, and the ids that begin, end and fill."""
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {"vocabulary": digest(tokenizer.get_vocab()), **special}


def folder_digest(folder: Path, subfolder: str = "", gguf_file: str | None = None) -> str | None:
    """Hash of a model folder's configuration, weights and code; its name and its other files do not count.

    Args:
        folder: of the model.
        subfolder: below it, where configuration and weights are.
        gguf_file: what has the weights in their place, a path of its own or in the folder.

    Returns:
        None without weights: what is left would not tell them from others.
    """
    inside = folder / subfolder
    files, weights = _matching(inside, _DESCRIPTIONS) | _matching(folder, ("*.py",)), _matching(inside, _WEIGHTS)
    if gguf_file is not None:
        # As `from_pretrained` looks for it.
        found = [path for path in (Path(gguf_file), inside / gguf_file) if path.is_file()]
        files, weights = files | weights, set(found[:1])
    if not weights:
        return None
    parts = []
    for path in sorted(files | weights, key=lambda path: (path.name, path)):
        with path.open("rb") as file:
            parts.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return digest(parts)


def _matching(folder: Path, patterns: Sequence[str]) -> set[Path]:
    return {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}


def differences(left: Any, right: Any, name: str = "") -> Iterator[str]:
    """The facts in which two contexts differ, as `sampling.temperature: 1.0 and 0.7`."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in sorted({*left, *right}):
            yield from differences(left.get(key), right.get(key), f"{name}.{key}" if name else key)
    elif left != right:
        yield f"{name}: {left!r:.60} and {right!r:.60}"
