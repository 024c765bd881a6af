"""Which teacher and reference the arguments name: one of each, and no option that nothing would use."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import SGOPDConfigError
from .remote import read_servers
from .routed import RoutedTeacher
from .server import ServerTeacher

if TYPE_CHECKING:
    from ..config import SGOPDConfig

# The one loading option that is for a server: `sg-opd serve-teacher` starts it so.
_SERVED_OPTIONS = {"dtype"}


def teacher_source(args: "SGOPDConfig", teacher_model: Any) -> Any:
    """The teacher that is given or named: a path, a model, a teacher, or a mapping from `teacher_id` to these.

    Names that have a URL become servers; those that share a URL and a name share one.
    """
    if isinstance(teacher_model, RoutedTeacher):
        return teacher_model.teachers
    names, url = args.teacher_model_name_or_path, args.teacher_model_server_url
    if teacher_model is not None or url is None:
        return names if teacher_model is None else teacher_model
    urls = read_servers(url)
    built: dict[tuple, ServerTeacher] = {}

    def server(replicas: list[str], name: Any) -> ServerTeacher:
        key = (*replicas, name)
        if key not in built:
            timeout, max_retries = args.teacher_request_timeout, args.teacher_max_retries
            built[key] = ServerTeacher(replicas, model=name, timeout=timeout, max_retries=max_retries)
        return built[key]

    if isinstance(urls, dict):
        named = {str(label): name for label, name in (names or {}).items()}  # type: ignore[union-attr]
        return named | {label: server(replicas, named.get(label)) for label, replicas in urls.items()}
    if isinstance(names, Mapping):
        return {str(label): server(urls, name) for label, name in names.items()}
    return server(urls, names)


def check_sources(args: "SGOPDConfig", teacher_model: Any, reference_model: Any) -> None:
    """Refuse no teacher, two of a kind, loading options that nothing is loaded with, and a reference without a use.

    Raises:
        SGOPDConfigError: names the sources, the option, or the lambdas that leave the reference without a use.
    """
    _check_mapping("teacher_model", teacher_model, paths_only=False)
    _check_mapping("teacher_model_name_or_path", args.teacher_model_name_or_path, paths_only=True)
    _check_one_source("teacher", teacher_model, args.teacher_model_name_or_path, args.teacher_model_server_url)
    _check_one_source("reference", reference_model, args.reference_model_name_or_path)
    _check_servers(args, teacher_model)
    for role, given in (("teacher", teacher_model), ("reference", reference_model)):
        _check_loading_options(role, given, args)
    given = args.reference_model_name_or_path if reference_model is None else "reference_model"
    if given is not None and not args.needs_reference:
        raise SGOPDConfigError(
            f"A reference must have a use, got {given!r} with every lambda equal to 1: the extrapolation term is zero "
            "and the reference would never be run. Leave the reference out, or set lambda_base or lambda_high."
        )


def _check_loading_options(role: str, given: Any, args: "SGOPDConfig") -> None:
    revision, init_kwargs = getattr(args, f"{role}_model_revision"), getattr(args, f"{role}_model_init_kwargs")
    if given is not None and not _names_a_path(given) and (revision or init_kwargs):
        name, value = ("revision", revision) if revision else ("init_kwargs", init_kwargs)
        raise SGOPDConfigError(
            f"`{role}_model_{name}` must go with a path, got {value!r} for a {role} given as a model. It is loaded "
            f"already, the option would do nothing. Leave it out, or give the {role}'s path."
        )
    if role == "reference" and revision and given is None and args.reference_model_name_or_path is None:
        raise SGOPDConfigError(
            f"`reference_model_revision` must go with a reference of its own, got {revision!r} with the initial "
            "student "
            "as the reference. It would do nothing. Leave it out, or set reference_model_name_or_path."
        )


def _names_a_path(given: Any) -> bool:
    return any(isinstance(part, str) for part in (given.values() if isinstance(given, Mapping) else [given]))


def _check_mapping(setting: str, value: Any, *, paths_only: bool) -> None:
    """Several teachers: at least one, each with a name."""
    if not isinstance(value, Mapping):
        return
    odd = [label for label, part in value.items() if not str(label) or (paths_only and not isinstance(part, str))]
    if not value or odd:
        what = "paths or Hub ids" if paths_only else "teachers"
        raise SGOPDConfigError(
            f"`{setting}` must map the names in the column `teacher_id` to {what}, got {str(dict(value))[:200]}. "
            "Every row is scored by the teacher it names. Set for example {'math': 'path/of/one', 'code': "
            "'path/of/another'}."
        )


def _check_one_source(role: str, given: Any, named: Any, url: Any = None) -> None:
    if given is not None and named is not None and given != named:
        raise SGOPDConfigError(
            f"The {role} must be given once, got `{role}_model` and `{role}_model_name_or_path={named!r}`. Which one "
            "is meant is not clear. Leave one of them out."
        )
    if role == "teacher" and given is None and named is None and url is None:
        raise SGOPDConfigError(
            "A teacher must be given, got None. Distillation needs one. Pass `teacher_model` to the trainer or set "
            "`teacher_model_name_or_path` or `teacher_model_server_url`; for reinforcement learning without a teacher "
            "use trl.GRPOTrainer."
        )


def _check_servers(args: "SGOPDConfig", teacher_model: Any) -> None:
    names, url = args.teacher_model_name_or_path, args.teacher_model_server_url
    if url is None:
        return
    if teacher_model is not None:
        raise SGOPDConfigError(
            "The teacher must be given once, got `teacher_model` and `teacher_model_server_url`. Which one is meant "
            "is not clear. Leave one of them out; `teacher_model_name_or_path` may name what the server has."
        )
    if isinstance(url, Mapping) and isinstance(names, str):
        raise SGOPDConfigError(
            f"`teacher_model_name_or_path` must be a mapping with the names of `teacher_model_server_url`, got "
            f"{names!r}. Which of the servers has that model is not clear. Map each `teacher_id` to its model, or "
            "leave it out."
        )
    local = isinstance(url, Mapping) and bool(set(map(str, names or {})) - set(map(str, url)))
    odd = sorted(set(args.teacher_model_init_kwargs or {}) - _SERVED_OPTIONS)
    if odd and not local:
        raise SGOPDConfigError(
            f"`teacher_model_init_kwargs` must hold nothing but dtype with `teacher_model_server_url`, got {odd}. "
            "Nothing is loaded in this process; dtype is what `sg-opd serve-teacher` serves in. Leave the others out, "
            "and give the server its own options."
        )
    if args.teacher_model_revision and names is None:
        raise SGOPDConfigError(
            f"`teacher_model_revision` must go with `teacher_model_name_or_path`, got {args.teacher_model_revision!r} "
            "with a server alone. It would do nothing. Leave it out, or name the model."
        )
