"""The trainer's arguments -> its teacher and its reference: decided first, then built, then checked."""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from ..errors import SGOPDConfigError
from ..models.residual import weights_dtype
from ..precision import is_quantized
from ..scrubbing import scrubbed
from ..trl_seam import get_config_model_id, has_adapters_of_another
from .adapter import (
    AdapterTeacher,
    BaseTeacher,
    LendingRun,
    adapter_config,
    fits_student,
    is_adapter,
    is_base_of,
    load_with_base,
)
from .base import Teacher
from .fit import RenderingRun, check_fits_student, check_vocabulary_sizes
from .local import FrozenModel, LocalTeacher, ModelScorer
from .offload import check_can_offload, check_offloaded
from .reference import REFERENCE_ADAPTER, AdapterReference, Reference
from .routed import RoutedTeacher, check_teacher_columns
from .server import ServerTeacher
from .urls import read_servers

if TYPE_CHECKING:
    from ..run import SGOPDConfig

logger = logging.getLogger(__name__)

# The one loading option that is for a server: `sg-opd serve-teacher` starts it so.
_SERVED_OPTIONS = {"dtype"}
# What the trainer will ask of an object that is given as a teacher.
_TEACHER_NAMES = (*Teacher.__annotations__, "score", "generate", "stop_generating")


class BuildingRun(RenderingRun, LendingRun, Protocol):
    """A run whose teacher and reference are being built.

    Attributes:
        reuses_trl_reference: whether TRL's own reference of the KL penalty is the initial student that is wanted.
        tokenizers: receives those of teachers and reference by what messages call them, None where one is not known.
    """

    reuses_trl_reference: bool
    tokenizers: dict[str, Any]


# --- the teacher -----------------------------------------------------------------------------------------------------
def build_teacher(run: BuildingRun, teacher_model: Any, teacher_processing_class: Any) -> Teacher | RoutedTeacher:
    """The teacher given to the trainer or named in the configuration, ready to score.

    Args:
        run: whose student sets dtype, attention and temperature.
        teacher_model: a path or Hub id, a model, a teacher, a mapping from `teacher_id` to any of these, or None for
            `teacher_model_name_or_path` and `teacher_model_server_url`.
        teacher_processing_class: tokenizer of teachers given as models, or a mapping from `teacher_id` to it; None
            skips the token-by-token check.

    Raises:
        SGOPDConfigError: there is no teacher, there are two, or it is the student itself.
        DataError: the data set does not say which row has which teacher.
        TeacherError: its tokens are not the student's.
    """
    given = resolve_teacher(run.args, teacher_model)
    if run.args.teacher_offload:
        check_can_offload(run.accelerator)
    if not isinstance(given, Mapping):
        check_teacher_columns(run, None)
        return _build_one(run, given, teacher_processing_class, "teacher")
    by_label = {str(label): part for label, part in given.items()}
    # Before anything is loaded: several teachers take minutes, a wrong column is seen at once.
    check_teacher_columns(run, list(by_label))
    tokenizers = teacher_processing_class
    if not isinstance(tokenizers, Mapping):
        tokenizers = dict.fromkeys(by_label, teacher_processing_class)
    _check_labels(tokenizers, by_label)
    built: dict[Any, Teacher] = {}
    for label, part in by_label.items():
        # Names that share a path or a model share the teacher.
        key = part if isinstance(part, str) else id(part)
        if key not in built:
            built[key] = _build_one(run, part, tokenizers.get(label), f"teacher {label}")
    return RoutedTeacher(
        {label: built[part if isinstance(part, str) else id(part)] for label, part in by_label.items()}
    )


def resolve_teacher(args: "SGOPDConfig", teacher_model: Any) -> Any:
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


def _build_one(run: BuildingRun, given: Any, tokenizer: Any, role: str) -> Teacher:
    """A teacher from a path, a model or a teacher, ready to score, its tokens checked as far as they are known."""
    teacher: Any = _of_its_own(given)
    if isinstance(given, str):
        teacher = _load_teacher(run, given)
    elif isinstance(given, nn.Module):
        # Before it is frozen: the student would be.
        _check_not_the_student(run, given, "teacher_model")
        teacher = LocalTeacher(teacher)
    if isinstance(teacher, ModelScorer):
        # Of several, messages and reports name the one.
        teacher.role = role
    if tokenizer is None:
        tokenizer = _tokenizer_of_teacher(run, given)
    run.tokenizers[role] = tokenizer
    _make_ready(run, teacher, tokenizer, role)
    if tokenizer is not None:
        check_fits_student(run, tokenizer, role)
    elif not isinstance(teacher, AdapterTeacher | ServerTeacher):
        # These two have checked what can be known when they were bound.
        check_vocabulary_sizes(run.tokenizer, teacher.vocab_size, role)
    if isinstance(teacher, LocalTeacher | ServerTeacher):
        _in_use.add(teacher)
    return teacher


_in_use: WeakSet[Any] = WeakSet()


def _of_its_own(given: Any) -> Any:
    """For a teacher object that another run has: the same weights or server, with settings and counts of its own."""
    if not isinstance(given, LocalTeacher | ServerTeacher) or given not in _in_use:
        return given
    teacher = copy.copy(given)
    teacher.tokens_scored = teacher.tokens_generated = 0
    return teacher


def _load_teacher(run: BuildingRun, path: str) -> LocalTeacher:
    args: Any = run.args  # its JSON strings are dictionaries by now
    revision, init_kwargs = args.teacher_model_revision, args.teacher_model_init_kwargs
    if not init_kwargs and is_base_of(path, revision, _student(run), args):
        logger.log(
            logging.WARNING if is_quantized(_student(run)) else logging.INFO,
            "The teacher %s is the base of the student: it shares the student's weights, as they are loaded there%s. "
            "Give `teacher_model_init_kwargs` (a dtype, say) to load it once more.",
            path,
            ", in fewer bits" if is_quantized(_student(run)) else "",
        )
        return BaseTeacher()
    if not is_adapter(path, revision):
        return _load(LocalTeacher, run, path, "teacher", revision, init_kwargs, on_host=args.teacher_offload)
    # Loading options are for a model of its own.
    if not init_kwargs and fits_student(path, revision, _student(run)):
        logger.info("The teacher %s is an adapter on the student's base: it shares the student's weights.", path)
        return AdapterTeacher(path, revision=revision)
    options = {"trust_remote_code": args.trust_remote_code} | dict(init_kwargs or {})
    return load_with_base(path, like=run.model, revision=revision, init_kwargs=options, on_host=args.teacher_offload)


def _make_ready(run: BuildingRun, teacher: Any, tokenizer: Any, role: str) -> None:
    if isinstance(teacher, AdapterTeacher):
        teacher.bind(run)
    elif isinstance(teacher, ServerTeacher):
        teacher.bind(run, tokenizer)
    elif isinstance(teacher, LocalTeacher):
        # A teacher that the caller has made of the student's own weights.
        _check_not_the_student(run, teacher.model, "teacher_model")
        _prepare(run, teacher, **({"on_device": False} if run.args.teacher_offload else {}))
    else:
        _check_methods(teacher, role)


def check_built(args: "SGOPDConfig", teacher: Teacher | RoutedTeacher, reference: Reference | None) -> None:
    """Refuse `teacher_offload` without a teacher that it moves, or with one that must stay.

    Raises:
        SGOPDConfigError: names the teacher.
    """
    if args.teacher_offload:
        several = {f"teacher {label}": one for label, one in getattr(teacher, "teachers", {}).items()}
        check_offloaded(several or {"teacher": teacher}, reference)


# --- the reference ---------------------------------------------------------------------------------------------------
def build_reference(
    run: BuildingRun, reference_model: Any, initial_student: PreTrainedModel | None
) -> Reference | None:
    """The reference of the extrapolation, or None where no route uses one or TRL's own reference serves.

    Args:
        run: whose student is the default reference.
        reference_model: a path or Hub id, a model, or None for `reference_model_name_or_path` or the initial student.
        initial_student: copy of a student that exists in memory only, made before anything changed it.

    Raises:
        SGOPDConfigError: it is the student itself.
        TeacherError: its tokens are not the student's.
    """
    args = run.args
    if not args.needs_reference:
        return None
    given = args.reference_model_name_or_path if reference_model is None else reference_model
    reference: FrozenModel
    if isinstance(given, str):
        revision = args.reference_model_revision
        reference = _load(FrozenModel, run, given, "reference", revision, args.reference_model_init_kwargs)
        run.tokenizers["reference"] = _tokenizer(run, given, revision)
        check_fits_student(run, run.tokenizers["reference"], "reference")
    elif given is not None:
        run.tokenizers["reference"] = None
        # Before it is frozen: the student would be.
        _check_not_the_student(run, given, "reference_model")
        reference = FrozenModel(given, role="reference")
        check_vocabulary_sizes(run.tokenizer, reference.vocab_size, "reference")
    else:
        return _initial_student(run, initial_student)
    _prepare(run, reference)
    return reference


def default_reference(args: "SGOPDConfig", reference_model: Any) -> bool:
    """Whether the reference is the initial student and is used at all."""
    return args.needs_reference and reference_model is None and args.reference_model_name_or_path is None


def _initial_student(run: BuildingRun, initial_student: PreTrainedModel | None) -> Reference | None:
    """The cheapest way to the student as it was: TRL's, its adapters switched, the copy, or its path again."""
    if run.reuses_trl_reference:
        return None
    student = _student(run)
    if hasattr(student, "peft_config"):
        # Without a copy of its adapter the initial student is the base: a new adapter begins as nothing.
        name = REFERENCE_ADAPTER if REFERENCE_ADAPTER in student.peft_config else None
        size = run.model.config.get_text_config().vocab_size
        return AdapterReference(run.student_scoring, run.accelerator, name, size, run.fused_head)
    if initial_student is not None:
        reference = FrozenModel(initial_student, role="reference", name="initial student")
        reference.is_ours = True
    else:
        args: Any = run.args  # its JSON strings are dictionaries by now
        path = get_config_model_id(run.model.config)
        init_kwargs = dict(args.model_init_kwargs or {}) | dict(args.reference_model_init_kwargs or {})
        reference = _load(FrozenModel, run, path, "reference", init_kwargs.pop("revision", None), init_kwargs)
    _prepare(run, reference)
    return reference


# --- models and their tokenizers -------------------------------------------------------------------------------------
def _load(
    kind: type[FrozenModel],
    run: BuildingRun,
    name: str,
    role: str,
    revision: Any,
    init_kwargs: Any,
    on_host: bool = False,
) -> Any:
    options = {"trust_remote_code": run.args.trust_remote_code} | dict(init_kwargs or {})
    return kind.from_pretrained(
        name, role=role, like=run.model, revision=revision, init_kwargs=options, on_host=on_host
    )


def _prepare(run: BuildingRun, model: FrozenModel, **placing: Any) -> None:
    model.prepare(
        run.accelerator,
        temperature=run.temperature,
        cast_lm_head_to_fp32=run.args.cast_lm_head_to_fp32,
        student_dtype=weights_dtype(_student(run)),
        **placing,
    )


def _student(run: BuildingRun) -> Any:
    return run.accelerator.unwrap_model(run.model)


def _tokenizer_of_teacher(run: BuildingRun, given: Any) -> Any:
    """A teacher's own tokenizer as far as it can be found; None where it cannot."""
    if isinstance(given, str):
        return _tokenizer(run, given, run.args.teacher_model_revision)
    if isinstance(given, BaseTeacher):
        return run.tokenizer
    if isinstance(given, AdapterTeacher):
        # Without one in its folder it has the base's, which is the student's.
        return _tokenizer_if_any(run, given.path, given.revision)
    if isinstance(given, ServerTeacher) and given.expected is not None:
        # What a server calls its model may be any name; only a folder or a Hub id is looked up.
        name = given.expected
        if Path(name).is_dir() or "/" in name:
            return _tokenizer_if_any(run, name, run.args.teacher_model_revision)
    return None


def _tokenizer(run: BuildingRun, name: str, revision: str | None) -> Any:
    """A model's tokenizer; an adapter without one of its own has its base's."""
    trusted = run.args.trust_remote_code
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trusted)
    except (OSError, ValueError):
        if not is_adapter(name, revision):
            raise
    config = adapter_config(name, revision)
    base = config.base_model_name_or_path
    return AutoTokenizer.from_pretrained(base, revision=config.revision, trust_remote_code=trusted)


def _tokenizer_if_any(run: BuildingRun, name: str, revision: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=run.args.trust_remote_code)
    except (OSError, ValueError):
        return None


# --- refused before a model is loaded --------------------------------------------------------------------------------
def check_given_models(args: "SGOPDConfig", teacher_model: Any, reference_model: Any) -> None:
    """Refuse no teacher, two of a kind, loading options that nothing is loaded with, and a reference without a use.

    Raises:
        SGOPDConfigError: names what is given, the option, or the lambdas that leave the reference without a use.
    """
    _check_mapping("teacher_model", teacher_model, paths_only=False)
    check_teacher_names(args.teacher_model_name_or_path)
    _check_given_once("teacher", teacher_model, args.teacher_model_name_or_path, args.teacher_model_server_url)
    _check_given_once("reference", reference_model, args.reference_model_name_or_path)
    _check_servers(args, teacher_model)
    for role, given in (("teacher", teacher_model), ("reference", reference_model)):
        _check_loading_options(role, given, args)
    given = args.reference_model_name_or_path if reference_model is None else "reference_model"
    if given is not None and not args.needs_reference:
        raise SGOPDConfigError(
            f"A reference must have a use, got {given!r} with every lambda equal to 1: the extrapolation term is zero "
            "and the reference would never be run. Leave the reference out, or set lambda_base or lambda_high."
        )


def check_teacher_names(names: Any) -> None:
    """Refuse names of teachers that are no path, Hub id, or mapping to such.

    Raises:
        SGOPDConfigError: a list, for instance, or a mapping without a teacher.
    """
    listed = isinstance(names, str) and names.lstrip().startswith("[")
    if listed or not isinstance(names, (str, Mapping, NoneType)):
        raise SGOPDConfigError(
            f"`teacher_model_name_or_path` must be a path, a Hub id, or a mapping from names in the column "
            f"`teacher_id` to these, got {str(names)[:200]!r}. Which rows each of a list would score is not "
            "said. Set for example {'math': 'path/of/one', 'code': 'path/of/another'}."
        )
    _check_mapping("teacher_model_name_or_path", names, paths_only=True)


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


def _check_given_once(role: str, given: Any, named: Any, url: Any = None) -> None:
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


def _check_loading_options(role: str, given: Any, args: "SGOPDConfig") -> None:
    revision, init_kwargs = getattr(args, f"{role}_model_revision"), getattr(args, f"{role}_model_init_kwargs")
    bits = next((name for name in ("load_in_4bit", "load_in_8bit") if name in (init_kwargs or ())), None)
    if bits is not None:
        raise SGOPDConfigError(
            f"`{role}_model_init_kwargs` must not hold {bits}, got {scrubbed(init_kwargs)!r}. Models of transformers "
            f"no longer take it. Set quantization_config: {{quant_method: bitsandbytes, {bits}: true}} in its place."
        )
    if given is not None and not _names_a_path(given) and (revision or init_kwargs):
        name, value = ("revision", revision) if revision else ("init_kwargs", init_kwargs)
        raise SGOPDConfigError(
            f"`{role}_model_{name}` must go with a path, got {scrubbed(value)!r} for a {role} given as a model. "
            f"It is loaded already, the option would do nothing. Leave it out, or give the {role}'s path."
        )
    if role == "reference" and revision and given is None and args.reference_model_name_or_path is None:
        raise SGOPDConfigError(
            f"`reference_model_revision` must go with a reference of its own, got {revision!r} with the initial "
            "student as the reference. It would do nothing. Leave it out, or set reference_model_name_or_path."
        )


def _names_a_path(given: Any) -> bool:
    return any(isinstance(part, str) for part in (given.values() if isinstance(given, Mapping) else [given]))


# --- refused while they are built ------------------------------------------------------------------------------------
def _check_labels(tokenizers: Mapping, teachers: Mapping) -> None:
    odd = sorted(map(str, tokenizers.keys() - teachers.keys()))
    if odd:
        raise SGOPDConfigError(
            f"`teacher_processing_class` must have the names of the teachers {sorted(teachers)}, got {odd}. They "
            "would be used by nobody. Correct them."
        )


def _check_methods(teacher: Any, role: str) -> None:
    lacking = [name for name in _TEACHER_NAMES if not hasattr(teacher, name)]
    if lacking:
        raise SGOPDConfigError(
            f"The {role} must be a path, a Hub id, a model or a `sg_opd_trl.teachers.Teacher`, got "
            f"{type(teacher).__name__} without {lacking}. It could not be asked. Pass one of these."
        )


def _check_not_the_student(run: BuildingRun, model: Any, argument: str) -> None:
    own = set(map(id, run.model.parameters()))
    if any(id(parameter) in own for parameter in model.parameters()):
        raise SGOPDConfigError(
            f"`{argument}` must be another object than `model`, got the student's own weights. They would be frozen, "
            "or move with every update. Pass copy.deepcopy(model) or the model's path."
        )
    if has_adapters_of_another(model):
        raise SGOPDConfigError(
            f"`{argument}` must be a model of its own, got a {type(model).__name__} around which a PeftModel was "
            "made, by another trainer with `peft_config` perhaps. It would score with that adapter, which is trained. "
            "Give the model's path, or load it again."
        )
