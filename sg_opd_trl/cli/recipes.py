"""Recipes: where they are, and how a YAML file is read without trusting it."""

import json
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import SGOPDConfigError

ENV_WHITELIST = frozenset(
    {
        "CUDA_VISIBLE_DEVICES",
        "HF_DATASETS_OFFLINE",
        "HF_HUB_OFFLINE",
        "NCCL_DEBUG",
        "OMP_NUM_THREADS",
        "PYTORCH_CUDA_ALLOC_CONF",
        "TOKENIZERS_PARALLELISM",
        "TRACKIO_PROJECT",
        "VLLM_LOGGING_LEVEL",
        "WANDB_MODE",
        "WANDB_NAME",
        "WANDB_PROJECT",
        "WANDB_RUN_GROUP",
    }
)
"""What a recipe's `env:` block may set. Recipes are shared between people; variables such as LD_PRELOAD, PYTHONPATH or
a server's address would let them run foreign code or send data elsewhere."""


class _StrictLoader(yaml.SafeLoader):
    """Safe loader (no Python tags) that refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{key}` is set twice; remove one of them", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe.

    Args:
        path: YAML file with one mapping of settings.

    Returns:
        The settings, `env` included.

    Raises:
        SGOPDConfigError: no such file, not YAML, not a mapping, a key set twice, or `trust_remote_code` switched on.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        recipe = yaml.load(text, Loader=_StrictLoader)
    except OSError as error:
        raise SGOPDConfigError(
            f"`config` must be a readable YAML file, got {str(path)!r}: {error.strerror}."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SGOPDConfigError(f"Recipe {path} cannot be read as YAML: {error}") from error
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise SGOPDConfigError(
            f"Recipe {path} must be a mapping of field names to values, got {type(recipe).__name__}."
        )
    if _trusts_remote_code(recipe):
        raise SGOPDConfigError(
            f"`trust_remote_code` must not be set by a recipe, got true in {path}. It runs code of the model's "
            "repository and a recipe is often somebody else's. Pass `--trust_remote_code true` on the command line if "
            "you trust it."
        )
    return recipe


def apply_env(recipe: dict[str, Any], path: str | Path) -> None:
    """Take the `env` block out of a recipe and set its variables; one that the shell has set already wins.

    Raises:
        SGOPDConfigError: not a mapping, or a variable outside the whitelist.
    """
    variables = recipe.pop("env", None)
    if variables is None:
        return
    if not isinstance(variables, dict):
        raise SGOPDConfigError(f"`env` must be a mapping of variables to values, got {variables!r} in {path}.")
    refused = sorted(str(key) for key in variables if key not in ENV_WHITELIST)
    if refused:
        raise SGOPDConfigError(
            f"`env` must only set {sorted(ENV_WHITELIST)}, got {refused} in {path}. Other variables could load "
            "foreign code or redirect traffic. Export them in the shell instead."
        )
    for key, value in variables.items():
        os.environ.setdefault(key, str(value))


def recipes_folder() -> Path | None:
    """`recipes/` of the clone that this package runs from; None for an installed wheel, which has no recipes."""
    folder = Path(__file__).resolve().parents[2] / "recipes"
    return folder if (folder / "arithmetic").is_dir() else None


def find_recipe(name: str) -> Path:
    """A recipe of the clone by its path below `recipes/`, e.g. `arithmetic/sg_opd.yaml`.

    Raises:
        SGOPDConfigError: the package runs without its clone.
    """
    folder = recipes_folder()
    if folder is None or not (folder / name).is_file():
        raise SGOPDConfigError(
            f"`recipe` must be given, got None. recipes/{name} is part of the repository and not of the installed "
            "package. Set `--recipe PATH`, or run from a clone."
        )
    return folder / name


def _trusts_remote_code(value: Any) -> bool:
    """Looks into nested mappings, and into JSON strings, which the parser would turn into mappings later."""
    if isinstance(value, Mapping):
        return any(
            (key == "trust_remote_code" and _is_on(item)) or _trusts_remote_code(item) for key, item in value.items()
        )
    if isinstance(value, list):
        return any(_trusts_remote_code(item) for item in value)
    if isinstance(value, str) and "trust_remote_code" in value and value.lstrip().startswith("{"):
        try:
            return _trusts_remote_code(json.loads(value))
        except json.JSONDecodeError:
            return True
    return False


def _is_on(value: Any) -> bool:
    return str(value).lower() not in ("false", "0", "no", "n", "f", "none", "null")
