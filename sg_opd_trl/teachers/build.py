"""The trainer's arguments -> its teacher and its reference, checked before anything is trained."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from ..data import TEACHER_PROMPT, first_prompts
from ..errors import SGOPDConfigError
from ..trl_seam import get_config_model_id, is_conversational
from .adapter import AdapterTeacher, adapter_config, fits_student, is_adapter, load_with_base
from .base import Teacher
from .fit import check_chat_templates, check_tokenizers, check_vocabulary_sizes
from .local import FrozenModel, LocalTeacher
from .reference import REFERENCE_ADAPTER, AdapterReference, Reference
from .routed import RoutedTeacher, check_teacher_columns
from .server import ServerTeacher
from .urls import read_servers

if TYPE_CHECKING:
    from ..config import SGOPDConfig

logger = logging.getLogger(__name__)


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


_TEACHER_NAMES = (*Teacher.__annotations__, "score", "generate", "stop_generating")


def build_teacher(trainer: Any, teacher_model: Any, teacher_processing_class: Any) -> Teacher | RoutedTeacher:
    """The teacher given to the trainer or named in the configuration.

    Args:
        trainer: whose student sets dtype, attention and temperature.
        teacher_model: a path or Hub id, a model, a teacher, a mapping from `teacher_id` to any of these, or None for
            `teacher_model_name_or_path` and `teacher_model_server_url`.
        teacher_processing_class: tokenizer of teachers given as models, or a mapping from `teacher_id` to it; None
            skips the token-by-token check.

    Raises:
        SGOPDConfigError: there is no teacher, there are two, or it is the student itself.
        DataError: the data set does not say which row has which teacher.
        TeacherError: its tokens are not the student's.
    """
    source = teacher_source(trainer.args, teacher_model)
    if not isinstance(source, Mapping):
        check_teacher_columns(trainer, None)
        return _build_one(trainer, source, teacher_processing_class, "teacher")
    sources = {str(label): part for label, part in source.items()}
    check_teacher_columns(trainer, list(sources))
    tokenizers = teacher_processing_class
    if not isinstance(tokenizers, Mapping):
        tokenizers = dict.fromkeys(sources, teacher_processing_class)
    _check_labels(tokenizers, sources)
    built: dict[Any, Teacher] = {}
    for label, part in sources.items():
        # Names that share a path or a model share the teacher.
        key = part if isinstance(part, str) else id(part)
        if key not in built:
            built[key] = _build_one(trainer, part, tokenizers.get(label), f"teacher {label}")
    teachers = {label: built[part if isinstance(part, str) else id(part)] for label, part in sources.items()}
    return RoutedTeacher(teachers)


def _build_one(trainer: Any, source: Any, tokenizer: Any, role: str) -> Teacher:
    """A teacher from a path, a model or a teacher, its tokens checked, ready to score."""
    teacher: Any = source
    if isinstance(source, str):
        teacher = _load_teacher(trainer, source)
        if tokenizer is None:
            tokenizer = _tokenizer(trainer, source, trainer.args.teacher_model_revision)
    elif isinstance(source, nn.Module):
        # Before it is frozen.
        _check_not_the_student(trainer, source, "teacher_model")
        teacher = LocalTeacher(teacher)
    tokenizer = _made_ready(trainer, teacher, tokenizer, role)
    if tokenizer is not None:
        _check_tokenizer(trainer, tokenizer, role)
    elif not isinstance(teacher, AdapterTeacher | ServerTeacher):
        check_vocabulary_sizes(trainer.tokenizer, teacher.vocab_size, role)
    return teacher


def _made_ready(trainer: Any, teacher: Any, tokenizer: Any, role: str) -> Any:
    """Have a teacher ready to score; returns its tokenizer, None if it is not known."""
    if isinstance(teacher, AdapterTeacher):
        teacher.bind(trainer)
        return _tokenizer_beside(trainer, teacher) if tokenizer is None else tokenizer
    if isinstance(teacher, ServerTeacher):
        tokenizer = _tokenizer_served(trainer, teacher) if tokenizer is None else tokenizer
        teacher.bind(trainer, tokenizer)
    elif isinstance(teacher, LocalTeacher):
        _check_not_the_student(trainer, teacher.model, "teacher_model")
        _prepare(trainer, teacher)
    else:
        _check_methods(teacher, role)
    return tokenizer


def _load_teacher(trainer: Any, path: str) -> LocalTeacher:
    args = trainer.args
    revision, init_kwargs = args.teacher_model_revision, args.teacher_model_init_kwargs
    if not is_adapter(path, revision):
        return _load(LocalTeacher, trainer, path, "teacher", revision, init_kwargs)
    student = trainer.accelerator.unwrap_model(trainer.model)
    # Loading options are for a model of its own.
    if not init_kwargs and fits_student(path, revision, student):
        logger.info("The teacher %s is an adapter on the student's base: it shares the student's weights.", path)
        return AdapterTeacher(path, revision=revision)
    options = {"trust_remote_code": args.trust_remote_code} | dict(init_kwargs or {})
    return load_with_base(path, like=trainer.model, revision=revision, init_kwargs=options)


def _check_tokenizer(trainer: Any, tokenizer: Any, role: str) -> None:
    """Ids, special ids and, where the data set has chats, what the chat template makes of them."""
    check_tokenizers(trainer.tokenizer, tokenizer, role)
    if trainer.environment_factories is not None:
        return
    prompts = first_prompts(trainer.train_dataset, TEACHER_PROMPT if role.startswith("teacher") else "prompt")
    if is_conversational({"prompt": prompts[0]}):
        rendered = trainer.tokenize_prompts(prompts)
        kwargs = trainer.chat_template_kwargs
        check_chat_templates(prompts, rendered, tokenizer, role, tools=trainer.tools, template_kwargs=kwargs)


def _check_labels(tokenizers: Mapping, sources: Mapping) -> None:
    odd = sorted(map(str, tokenizers.keys() - sources.keys()))
    if odd:
        raise SGOPDConfigError(
            f"`teacher_processing_class` must have the names of the teachers {sorted(sources)}, got {odd}. They would "
            "be used by nobody. Correct them."
        )


def _check_methods(teacher: Any, role: str) -> None:
    lacking = [name for name in _TEACHER_NAMES if not hasattr(teacher, name)]
    if lacking:
        raise SGOPDConfigError(
            f"The {role} must be a path, a Hub id, a model or a `sg_opd_trl.teachers.Teacher`, got "
            f"{type(teacher).__name__} without {lacking}. It could not be asked. Pass one of these."
        )


def build_reference(trainer: Any, reference_model: Any, initial_student: PreTrainedModel | None) -> Reference | None:
    """The reference of the extrapolation, or None where no route uses one or TRL's own reference serves.

    Args:
        trainer: whose student is the default reference.
        reference_model: a path or Hub id, a model, or None for `reference_model_name_or_path` or the initial student.
        initial_student: copy of a student that exists in memory only, made before anything changed it.
    """
    args = trainer.args
    if not args.needs_reference:
        return None
    source = args.reference_model_name_or_path if reference_model is None else reference_model
    reference: FrozenModel
    if isinstance(source, str):
        reference = _load(
            FrozenModel, trainer, source, "reference", args.reference_model_revision, args.reference_model_init_kwargs
        )
        _check_tokenizer(trainer, _tokenizer(trainer, source, args.reference_model_revision), "reference")
    elif source is not None:
        _check_not_the_student(trainer, source, "reference_model")
        reference = FrozenModel(source, role="reference")
        check_vocabulary_sizes(trainer.tokenizer, reference.vocab_size, "reference")
    else:
        return _initial_student(trainer, initial_student)
    _prepare(trainer, reference)
    return reference


def default_reference(args: "SGOPDConfig", reference_model: Any) -> bool:
    """Whether the reference is the initial student and is used at all."""
    return args.needs_reference and reference_model is None and args.reference_model_name_or_path is None


def _initial_student(trainer: Any, initial_student: PreTrainedModel | None) -> Reference | None:
    adapters = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", None)
    if trainer.reuses_trl_reference:
        return None
    if adapters is not None:
        name = REFERENCE_ADAPTER if REFERENCE_ADAPTER in adapters else None
        size = trainer.model.config.get_text_config().vocab_size
        return AdapterReference(trainer.student_scoring, trainer.accelerator, name, size)
    if initial_student is not None:
        reference = FrozenModel(initial_student, role="reference", name="initial student")
    else:
        path = get_config_model_id(trainer.model.config)
        init_kwargs = dict(trainer.args.model_init_kwargs or {}) | dict(trainer.args.reference_model_init_kwargs or {})
        reference = _load(FrozenModel, trainer, path, "reference", init_kwargs.pop("revision", None), init_kwargs)
    _prepare(trainer, reference)
    return reference


def _load(kind: type[FrozenModel], trainer: Any, name: str, role: str, revision: Any, init_kwargs: Any) -> Any:
    options = {"trust_remote_code": trainer.args.trust_remote_code} | dict(init_kwargs or {})
    return kind.from_pretrained(name, role=role, like=trainer.model, revision=revision, init_kwargs=options)


def _tokenizer_beside(trainer: Any, teacher: AdapterTeacher) -> Any:
    """The tokenizer in an adapter's folder, or None: on the student's base, the base's own is the student's."""
    trusted = trainer.args.trust_remote_code
    try:
        return AutoTokenizer.from_pretrained(teacher.path, revision=teacher.revision, trust_remote_code=trusted)
    except (OSError, ValueError):
        return None


def _tokenizer_served(trainer: Any, teacher: ServerTeacher) -> Any:
    """The tokenizer of the model that a server is said to have, or None: its name there may be any."""
    name, args = teacher.expected, trainer.args
    if name is None or not (Path(name).is_dir() or "/" in name):
        return None
    revision = args.teacher_model_revision
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError):
        return None


def _tokenizer(trainer: Any, name: str, revision: str | None) -> Any:
    """A model's tokenizer; an adapter without one of its own has its base's."""
    trusted = trainer.args.trust_remote_code
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trusted)
    except (OSError, ValueError):
        if not is_adapter(name, revision):
            raise
    config = adapter_config(name, revision)
    base = config.base_model_name_or_path
    return AutoTokenizer.from_pretrained(base, revision=config.revision, trust_remote_code=trusted)


def _prepare(trainer: Any, model: FrozenModel) -> None:
    model.prepare(
        trainer.accelerator, temperature=trainer.temperature, cast_lm_head_to_fp32=trainer.args.cast_lm_head_to_fp32
    )


def _check_not_the_student(trainer: Any, model: Any, argument: str) -> None:
    own = set(map(id, trainer.model.parameters()))
    if any(id(parameter) in own for parameter in model.parameters()):
        raise SGOPDConfigError(
            f"`{argument}` must be another object than `model`, got the student's own weights. They would be frozen, "
            "or move with every update. Pass copy.deepcopy(model) or the model's path."
        )
