"""Recipes: where they are, and how a YAML file is read without trusting it."""

import json
import os
import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import SGOPDConfigError
from ..scrubbing import remember
from .values import control_character, is_nothing

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


# Escapes that YAML knows and that begin a LaTeX command. A real tab or line break is let through.
_MEANT_AS_TEXT = re.compile(
    r"""(?<!\\)(?:\\\\)*\\(?:[0abevfrN_LP]
    |t(?=(?:an|anh|au|binom|ext[a-z]*|frac|heta|herefore|hinspace|ilde|imes|o|op|riangle[a-z]*)(?![a-zA-Z]))
    |n(?=(?:abla|atural|e|earrow|eg|eq|ewline|exists|geq|leq|mid|onumber|ot|otin|parallel|sim|u)(?![a-zA-Z]))
    )""",
    re.VERBOSE,
)
# `instruction: Answer after ####` is "Answer after" and a comment.
_HASHES = re.compile(r"[ \t]+##[^\n]*")


class _Loader(yaml.SafeLoader):
    """Safe loader (no Python tags) that refuses what YAML would quietly make something else of.

    PyYAML reads YAML 1.1. Where a recipe's writer means something else than that does, the value is either what is
    meant (`1e-6` is a number) or an error that says how to write it.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            # `<<` takes in another mapping, whose keys give way to those written here; it is no key itself.
            merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if merge else self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{key}` is set twice; remove one of them", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Numbers of base 8 and 60: nobody means them, and a revision such as 0123456 looks like one."""
        number = super().construct_yaml_int(node)
        text = node.value.lstrip("+-")
        if ":" in text or (len(text) > 1 and text[0] == "0" and text[1] not in "xXbB"):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{node.value} is the number {number} in YAML; write that, or {node.value!r} for a text",
                node.start_mark,
            )
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
# YAML 1.1 wants a point before the exponent, and a sign in it: its `1e-6` is a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe.

    Args:
        path: YAML file with one mapping of settings.

    Returns:
        The settings, `env` included.

    Raises:
        SGOPDConfigError: no such file, not YAML, not a mapping, a key set twice, a text that is not what was written,
            or `trust_remote_code` switched on.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        recipe = _read(text, path)
    except OSError as error:
        raise SGOPDConfigError(
            f"`config` must be a readable YAML file, got {str(path)!r}: {error.strerror}."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        advice = " In single quotes a backslash is a backslash." if " escape " in str(error) else ""
        raise SGOPDConfigError(f"Recipe {path} cannot be read as YAML: {error}{advice}") from error
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
        if isinstance(value, (list, dict)):
            raise SGOPDConfigError(f"`env` must map {key} to a single value, got {value!r} in {path}.")
        # Null means that the recipe sets nothing: "None" would be a project of that name.
        if not is_nothing(value):
            os.environ.setdefault(key, str(value).lower() if isinstance(value, bool) else str(value))


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


def _read(text: str, path: str | Path) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        texts = list(_texts(node, ""))
        for key, scalar in texts:
            # Before anything is said of one of them; as it is written too, which a message may quote.
            for text in (scalar.value, _written(scalar)):
                remember(text, key.rpartition(".")[2].partition("[")[0])
        for key, scalar in texts:
            problem = _text_problem(key, scalar)
            if problem is not None:
                raise SGOPDConfigError(f"`{key}` in recipe {path} {problem}")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _texts(node: yaml.Node, key: str, above: tuple[int, ...] = ()) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """The texts of a document with the keys that lead to them, such as `datasets[0].path`."""
    if id(node) in above:  # an anchor may lead back into itself
        return
    above = (*above, id(node))
    if isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            yield from _texts(value, f"{key}.{name}" if key else name, above)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _texts(value, f"{key}[{index}]", above)
    elif node.tag == "tag:yaml.org,2002:str":
        yield key, node


def _written(node: yaml.ScalarNode) -> str:
    return (node.start_mark.buffer or "")[node.start_mark.pointer : node.end_mark.pointer]


def _text_problem(key: str, node: yaml.ScalarNode) -> str | None:
    """What YAML made of a text that its writer cannot have meant."""
    source, end = node.start_mark.buffer or "", node.end_mark.pointer
    written = _written(node)
    escape = _MEANT_AS_TEXT.search(written) if node.style == '"' else None
    if escape is not None or control_character(node.value) is not None:
        return (
            f"must be written in single quotes, got {written}, which YAML reads as {node.value!r}. In double quotes a "
            f"backslash begins an escape{f', such as {escape.group()[:2]}' if escape else ''}. Write "
            f"{key.rpartition('.')[2]}: '{written[1:-1].replace(chr(39), 2 * chr(39))}', and a text of several lines "
            "as a block after `|`."
        )
    after = _HASHES.match(source, end) if node.style is None else None
    if after is not None:
        return (
            f"must be written in quotes, got {node.value!r}: YAML takes {after.group().strip()!r} for the "
            f"beginning of a comment. Write {key.rpartition('.')[2]}: '{node.value}{after.group().rstrip()}'."
        )
    return None


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
