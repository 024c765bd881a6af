"""The trainer's arguments -> its teacher and its reference, checked before anything is trained."""

from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedModel

from ..errors import SGOPDConfigError
from ..trl_seam import get_config_model_id
from .compatibility import check_tokenizers, check_vocabulary_sizes
from .frozen import FrozenModel
from .local import LocalTeacher
from .reference import REFERENCE_ADAPTER, AdapterReference, Reference

if TYPE_CHECKING:
    from ..config import SGOPDConfig


def build_teacher(trainer: Any, teacher_model: Any, teacher_processing_class: Any) -> LocalTeacher:
    """The teacher given to the trainer or named in the configuration.

    Args:
        trainer: whose student sets dtype, attention and temperature.
        teacher_model: a path or Hub id, a model, or None to use `teacher_model_name_or_path`.
        teacher_processing_class: tokenizer of a teacher given as a model; None skips the token-by-token check.

    Raises:
        SGOPDConfigError: there is no teacher, there are two, or it is the student itself.
        TeacherError: its tokens are not the student's.
    """
    args = trainer.args
    source = args.teacher_model_name_or_path if teacher_model is None else teacher_model
    teacher: LocalTeacher
    if isinstance(source, str):
        teacher = _load(
            LocalTeacher, trainer, source, "teacher", args.teacher_model_revision, args.teacher_model_init_kwargs
        )
        if teacher_processing_class is None:
            teacher_processing_class = _tokenizer(trainer, source, args.teacher_model_revision)
    else:
        _check_not_the_student(trainer, source, "teacher_model")
        teacher = LocalTeacher(source)
    if teacher_processing_class is None:
        check_vocabulary_sizes(trainer.tokenizer, teacher.vocab_size, "teacher")
    else:
        check_tokenizers(trainer.tokenizer, teacher_processing_class, "teacher")
    _prepare(trainer, teacher)
    return teacher


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
        check_tokenizers(trainer.tokenizer, _tokenizer(trainer, source, args.reference_model_revision), "reference")
    elif source is not None:
        _check_not_the_student(trainer, source, "reference_model")
        reference = FrozenModel(source, role="reference")
        check_vocabulary_sizes(trainer.tokenizer, reference.vocab_size, "reference")
    else:
        return _initial_student(trainer, initial_student)
    _prepare(trainer, reference)
    return reference


def check_sources(args: "SGOPDConfig", teacher_model: Any, reference_model: Any) -> None:
    """Refuse no teacher, two of a kind, loading options that nothing is loaded with, and a reference without a use.

    Raises:
        SGOPDConfigError: names the sources, the option, or the lambdas that leave the reference without a use.
    """
    _check_one_source("teacher", teacher_model, args.teacher_model_name_or_path, required=True)
    _check_one_source("reference", reference_model, args.reference_model_name_or_path, required=False)
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
    if given is not None and not isinstance(given, str) and (revision or init_kwargs):
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


def default_reference(args: "SGOPDConfig", reference_model: Any) -> bool:
    """Whether the reference is the initial student and is used at all."""
    return args.needs_reference and reference_model is None and args.reference_model_name_or_path is None


def _initial_student(trainer: Any, initial_student: PreTrainedModel | None) -> Reference | None:
    adapters = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", None)
    if trainer.reuses_trl_reference:
        return None
    if adapters is not None:
        name = REFERENCE_ADAPTER if REFERENCE_ADAPTER in adapters else None
        return AdapterReference(trainer.student_scoring, trainer.accelerator, name)
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


def _tokenizer(trainer: Any, name: str, revision: str | None) -> Any:
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trainer.args.trust_remote_code)


def _prepare(trainer: Any, model: FrozenModel) -> None:
    model.prepare(
        trainer.accelerator, temperature=trainer.temperature, cast_lm_head_to_fp32=trainer.args.cast_lm_head_to_fp32
    )


def _check_one_source(role: str, given: Any, named: str | None, *, required: bool) -> None:
    if given is not None and named is not None and given != named:
        raise SGOPDConfigError(
            f"The {role} must be given once, got `{role}_model` and `{role}_model_name_or_path={named!r}`. Which one "
            "is meant is not clear. Leave one of them out."
        )
    if required and given is None and named is None:
        raise SGOPDConfigError(
            f"A {role} must be given, got None. Distillation needs one. Pass `{role}_model` to the trainer or set "
            f"`{role}_model_name_or_path`; for reinforcement learning without a {role} use trl.GRPOTrainer."
        )


def _check_not_the_student(trainer: Any, model: Any, argument: str) -> None:
    own = set(map(id, trainer.model.parameters()))
    if any(id(parameter) in own for parameter in model.parameters()):
        raise SGOPDConfigError(
            f"`{argument}` must be another object than `model`, got the student's own weights. They would be frozen, "
            "or move with every update. Pass copy.deepcopy(model) or the model's path."
        )
