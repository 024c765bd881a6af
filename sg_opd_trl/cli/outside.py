"""Errors from outside the package, told as its own are: the setting, what was found, the way out.

Models, data, the Hub, disks and trackers fail in other libraries, each in its own words. There is one place that puts
them into ours: `explained` around a command's work. It finds the setting in three ways, in this order:

1. `concerning` around the one call that reads a setting says which it is;
2. a few errors are known by their text (`_TELLING`);
3. a library that was loading something knows what: the value is looked up among the settings. So are files;
4. some libraries are there for one setting (`_LIBRARIES`).

What none of these knows is a mistake of a program, and keeps its traceback. With `--debug` everything does.
"""

import os
import re
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import SGOPDConfigError, SGOPDError

# Locals of other libraries' functions that hold what is being loaded.
_LOADED = ("pretrained_model_name_or_path", "path_or_repo_id", "pretrained_model_path", "model_id", "model_path")

# What an error says -> the settings that it may be about, of which a command has one.
_TELLING: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"[Tt]arget modules .* not found", ("lora_target_modules",)),
    (r"No space left on device|StorageFull|PytorchStreamWriter failed|disk quota", ("output_dir", "output")),
    (r"out of memory|MemoryError|can't allocate memory", ("per_device_train_batch_size", "batch_size")),
    (r"Flash ?Attention|flash_attn|attn_implementation", ("attn_implementation",)),
    (r"No valid checkpoint|find a valid checkpoint", ("resume_from_checkpoint",)),
    (r"Using fsdp", ("fsdp",)),
    (r"RevisionNotFound|is not a valid git identifier", ("model_revision", "revision")),
    (r"doesn't support bf16", ("bf16",)),
    (r"bitsandbytes", ("load_in_4bit",)),
)
# Libraries that know our settings by name, as theirs they are.
_SPEAK_OF_SETTINGS = ("accelerate", "transformers", "trl")
# The library that raised an error while nothing was loaded -> the setting that calls for it.
_LIBRARIES: Mapping[str, str] = {
    **dict.fromkeys(("wandb", "trackio", "tensorboard", "mlflow", "comet_ml", "swanlab", "clearml"), "report_to"),
    "bitsandbytes": "load_in_4bit",
    "deepspeed": "accelerate_config",
    "huggingface_hub": "hub_model_id",
    "peft": "use_peft",
    "vllm": "use_vllm",
}

_CARRIERS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "ssl", "socket", "anyio", "contextlib")

# What an error says -> the reason in plain words, and the way out. "" leaves the reason to the error.
_WAYS_OUT: tuple[tuple[str, str, str], ...] = (
    (r"No space left on device|StorageFull|disk quota", "The disk is full.", "Make room, or set another folder."),
    (r"PytorchStreamWriter failed", "It could not be written to the end.", "Make room, or set another folder."),
    (r"PermissionError|Permission denied", "It may not be read or written here.", "Change its rights or the path."),
    (r"Read-only file system", "Nothing can be written there.", "Set another folder."),
    (
        r"[Oo]ffline|outgoing traffic has been disabled|LocalEntryNotFound|requested files in the disk",
        "It is no folder here, nor among the files that the Hub left on this machine, and the Hub is not asked "
        "(HF_HUB_OFFLINE) or does not answer.",
        "Correct the name, download it first with `hf download`, or give a folder.",
    ),
    (
        r"GatedRepo|gated repo|401 Client|RepositoryNotFound|not a valid model identifier|is not a local folder",
        "There is no such folder, and no such model on the Hub that you may read.",
        "Correct the name; for a private or gated one log in with `hf auth login`.",
    ),
    (
        r"We couldn't connect|Connection|Max retries|timed? ?out|[Tt]emporary failure in name resolution",
        "The Hub does not answer.",
        "Look at the connection, or give a folder.",
    ),
    (r"RevisionNotFound|is not a valid git identifier", "It has no such revision.", "Correct the revision."),
    (r"trust_remote_code", "Its repository brings code.", "Pass --trust_remote_code true if you trust it."),
    (r"no file named|does not appear to have a file named|config\.json", "", "Give a folder with a whole model."),
    (r"corresponds to no data|EmptyDataset|No \(supported\) data files", "It has no rows.", "Set it to another."),
    (r"DatasetGeneration|ArrowInvalid|JSON parse|CastError", "A file of it is broken.", "Mend the file."),
    (r"BuilderConfig", "It has no such configuration.", "Set dataset_config to one of these."),
    (
        r"SafetensorError|safetensors|UnpicklingError|PytorchStreamReader|incomplete metadata|deserializing",
        "A file of weights is broken or cut off.",
        "Copy or download it again.",
    ),
    (r"JSONDecodeError|not a valid JSON|Expecting ", "A file of it is no valid JSON.", "Copy or download it again."),
    (r"Unrecognized model|model type|not recognize this architecture", "", "Choose another, or update transformers."),
    (r"[Tt]okenizer", "Its tokenizer cannot be read.", "Save the tokenizer beside the model."),
    (r"No valid checkpoint|find a valid checkpoint", "There is none yet.", "Leave it out, or set the folder of one."),
    (r"Target modules", "", "Name modules of the model, or all-linear."),
    (
        r"out of memory|MemoryError|can't allocate",
        "",
        "Lower it and raise gradient_accumulation_steps, or shorten completions.",
    ),
    (
        r"ImportError|ModuleNotFoundError|pip install|not installed",
        "A package is missing.",
        "Install it, or change the setting.",
    ),
    (r"[Aa][Pp][Ii].?key|[Ll]og ?in|UsageError", "", "Log in to it, or set another."),
    (r"repo id|repo_id|Repo id", "", "Write name/model with letters, digits, `-`, `_` and `.`."),
)


@contextmanager
def explained(settings: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Tell errors from outside as errors of the package.

    Args:
        settings: returns those of the command by name; their values are what other libraries were given.

    Raises:
        SGOPDConfigError: for a foreign error whose setting is known.
    """
    try:
        yield
    except SGOPDError:
        raise
    except Exception as error:
        given = settings()
        name = _setting_of(error, given)
        if name is None:
            raise
        raise SGOPDConfigError(_message(name, given.get(name), error)) from error


def lost_processes(error: Exception) -> str | None:
    """What to do where processes did not find each other; None for an error of another kind."""
    from ..ranks import is_of_an_exchange

    if not is_of_an_exchange(error):
        return None
    rank, size, address, port = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return (
        f"The processes of this run did not find each other: process {rank} of {size}, on {socket.gethostname()}, "
        f"looked for the first at {address}:{port} ({str(error).strip()}). Start the command on every machine; see "
        "that they reach that address and each other; where the name of a machine leads to another network, name the "
        "interface in GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME beside it)."
    )


@contextmanager
def concerning(setting: str, value: Any) -> Iterator[None]:
    """Say which setting a call reads, for whatever goes wrong in it.

    Raises:
        SGOPDConfigError: for a foreign error.
    """
    try:
        yield
    except SGOPDError:
        raise
    except Exception as error:
        raise SGOPDConfigError(_message(setting, value, error)) from error


def check_vocabulary(setting: str, value: str, tokenizer: Any) -> None:
    """Refuse a tokenizer without tokens, which transformers makes where a model's folder has none.

    Raises:
        SGOPDConfigError: all its tokens are special ones, so that every text is nothing.
    """
    if tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        return
    raise SGOPDConfigError(
        f"`{setting}` must have a tokenizer, got {value!r} without its files. Every text would be read as nothing. "
        "Save the tokenizer beside the model."
    )


def _setting_of(error: BaseException, settings: Mapping[str, Any]) -> str | None:
    text = _whole_text(error)
    return (
        _told(text, settings)
        or _with_argument(text, settings)
        or _spoken_of(error, settings)
        or _being_loaded(error, settings)
        or _of_file(error, settings)
        or _of_library(error, settings)
    )


def _told(text: str, settings: Mapping[str, Any]) -> str | None:
    found = (name for pattern, names in _TELLING if re.search(pattern, text) for name in names if name in settings)
    return next(found, None)


def _with_argument(text: str, settings: Mapping[str, Any]) -> str | None:
    """The setting whose dictionary has an argument that a function does not take."""
    strange = re.search(r"unexpected keyword argument '(\w+)'", text)
    if strange is None:
        return None
    return next((name for name, value in settings.items() if isinstance(value, dict) and strange[1] in value), None)


def _spoken_of(error: BaseException, settings: Mapping[str, Any]) -> str | None:
    """The setting that a library names in its message; the longest, as `eval_steps` is in `eval_steps_delay`."""
    if not isinstance(error, (ImportError, TypeError, ValueError)) or _library(error) not in _SPEAK_OF_SETTINGS:
        return None
    text = str(error).replace(" ", "_")
    return max((name for name in settings if "_" in name and name in text), key=len, default=None)


def _library(error: BaseException) -> str:
    """The library that raised: that of the innermost frame, as a model's forward passes through many.

    What sends requests for others speaks for whoever asked it to.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
    return next((name for name in reversed(names) if name not in _CARRIERS), "")


def _of_library(error: BaseException, settings: Mapping[str, Any]) -> str | None:
    name = _LIBRARIES.get(_library(error))
    return name if name in settings else None


def _being_loaded(error: BaseException, settings: Mapping[str, Any]) -> str | None:
    """The setting whose value another library was loading when the error was raised."""
    for each in _chain(error):
        for frame in _frames(each.__traceback__):
            for local in _LOADED:
                name = _setting_with(frame.get(local), settings)
                if name is not None:
                    return name
    return None


def _of_file(error: BaseException, settings: Mapping[str, Any]) -> str | None:
    """The setting below whose path an operation of the file system failed."""
    for each in _chain(error):
        if isinstance(each, OSError) and isinstance(each.filename, str):
            for name, value in settings.items():
                inside = (
                    isinstance(value, str)
                    and value
                    and Path(each.filename).absolute().is_relative_to(Path(value).absolute())
                )
                if inside:
                    return name
    return None


def _setting_with(value: Any, settings: Mapping[str, Any]) -> str | None:
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        return None
    for name, given in settings.items():
        parts = given.values() if isinstance(given, Mapping) else [given]
        if any(isinstance(part, str) and part == str(value) for part in parts):
            return name
    return None


def _frames(trace: TracebackType | None) -> Iterator[Mapping[str, Any]]:
    for frame, _ in traceback.walk_tb(trace):
        yield frame.f_locals


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _whole_text(error: BaseException) -> str:
    return "\n".join(f"{type(each).__name__}: {each}" for each in _chain(error))


def _message(setting: str, value: Any, error: BaseException) -> str:
    # Where results go is made when they come; elsewhere a path that is not there explains everything else.
    absent = "" if setting == "output_dir" else missing(value)
    if absent:
        return f"`{setting}` cannot be used, got {value!r}. {absent} Correct the path, or give a name on the Hub."
    text = _whole_text(error)
    reason, way_out = next(
        ((reason, way_out) for pattern, reason, way_out in _WAYS_OUT if re.search(pattern, text)),
        ("", "Correct it. --debug shows where it happened."),
    )
    # `datasets` says that something went wrong, and keeps to itself what.
    told = list(_chain(error))[-1] if type(error).__name__ == "DatasetGenerationError" else error
    said = re.split(r"\n|(?<=[.!]) (?=[A-Z])", str(told).strip(), maxsplit=1)[0][:300].rstrip(".!")
    found = f"`{setting}` cannot be used, got {value!r}: {type(told).__name__}{f', {said}' if said else ''}."
    return " ".join(part for part in (found, reason, way_out) if part)


def missing(value: Any) -> str:
    """What is seen of a path from here, as a sentence, where a library would say something about the Hub; or ""."""
    if not isinstance(value, str):
        return ""
    path = Path(value).expanduser()
    looks_like_one = value.startswith((".", "~", "/")) or value.count("/") > 1
    if looks_like_one and not path.exists():
        return "There is no such file or folder."
    if path.is_dir() and not any(path.iterdir()):
        return "The folder is empty."
    return ""
