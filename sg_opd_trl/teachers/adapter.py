"""A teacher that is a PEFT adapter: on the student's own frozen base, or merged into a base of its own."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import SGOPDConfigError, TeacherError
from ..run import Run
from ..student_files import check_student
from ..trl_seam import get_config_model_id
from .local import LocalTeacher, fingerprint
from .reference import REFERENCE_ADAPTER, adapter_switched, changes_base, evaluating, trained_base

logger = logging.getLogger(__name__)

_NAME = "teacher"


class LendingRun(Run, Protocol):
    """A run whose student can be the base of a teacher.

    Attributes:
        model_wrapped: the student with all wrappers of the training loop, as `generate` takes it.
    """

    model_wrapped: Any


class AdapterTeacher(LocalTeacher):
    """A PEFT adapter on the student's own base: no second model in memory.

    The student must be trained with an adapter of its own on the same base. The teacher's adapter is frozen, stays out
    of the optimizer, of checkpoints and of pushes, and is active only while the teacher scores or generates.

    Args:
        path: folder or Hub id of the adapter.
        revision: branch, tag or commit of a Hub id.
        trust_base: take it on trust that the adapter was trained on the student's base where their names differ.
    """

    def __init__(self, path: str, *, revision: str | None = None, trust_base: bool = False) -> None:
        # No model of its own: `bind` lends it the student's.
        self.path = path
        self.revision = revision
        self.trust_base = trust_base
        self.role = "teacher"
        self.adapter_name: str | None = _NAME
        self.model = None
        self.vocab_size = 0
        self.identity = {"name": path, "fingerprint": None}
        self._lender: Any = None  # the run that `bind` was given

    def bind(self, run: LendingRun) -> None:
        """Load the adapter, frozen, into the run's student.

        Raises:
            SGOPDConfigError: a student without a frozen base, or with another one.
            TeacherError: an adapter that does not fit.
        """
        student = run.accelerator.unwrap_model(run.model)
        reason = self._obstacle(student)
        if reason is not None:
            raise SGOPDConfigError(
                f"AdapterTeacher({self.path!r}) must share a frozen base with the student, got {reason} Give the "
                "adapter's path as `teacher_model` to have it loaded with a base of its own, or train the student "
                "with LoRA on the adapter's base (`peft_config`; use_peft: true in a recipe)."
            )
        device = run.accelerator.device
        # Of several processes on a CPU the device is "cpu:0", which safetensors refuses.
        place = "cpu" if device.type == "cpu" else str(device)
        self.adapter_name = _load_into_student(student, self.path, self.revision, place)
        self.identity = {"name": self.path, "fingerprint": fingerprint(student, adapter=self.adapter_name)}
        self._borrow(run, student)

    def _borrow(self, run: LendingRun, student: Any) -> None:
        self.vocab_size = student.config.get_text_config().vocab_size
        self.accelerator, self.fused_head, self._head = run.accelerator, run.fused_head, None
        self._lender = run

    def _obstacle(self, student: Any) -> str | None:
        """Why the student cannot lend its base, or None."""
        reason = _trained_base(student)
        if reason is not None:
            return reason
        config = adapter_config(self.path, self.revision)
        if changes_base(config):
            return "an adapter that changes weights of its base, by `init_lora_weights` or `bias`."
        wanted, base = config.base_model_name_or_path, _base_name(student)
        if not self.trust_base and wanted and base and not _same_source(wanted, base):
            return f"an adapter of {wanted!r} and a student on {base!r}. If these are one model, pass trust_base=True."
        if not (wanted and base):
            logger.warning("That the adapter %r was trained on the student's base is taken on trust.", self.path)
        return None

    # --- lent by the student -------------------------------------------------------------------------------------
    @contextmanager
    def lent(self) -> Iterator[None]:
        """The student as the teacher for the block: its adapter active, dropout off, no gradient."""
        with (
            self._lender.student_scoring() as student,
            evaluating(student),
            adapter_switched(student, self.adapter_name),
        ):
            self.model = student
            try:
                yield
            finally:
                self.model = None

    @contextmanager
    def _generation(self, seed: int) -> Iterator[Any]:
        with self.lent():
            # Generation unwraps the model itself, and gathers its shards.
            self.model = self._lender.model_wrapped
            with super()._generation(seed) as model:
                yield model


class BaseTeacher(AdapterTeacher):
    """The student's own base, its adapters switched off: no second model in memory, in four bits where the base is.

    The student must be trained with an adapter that leaves its base alone. Where a recipe names the base as teacher it
    is this one. It teaches where it knows more than the student did: after a prompt of its own (`teacher_prompt`).
    """

    def __init__(self) -> None:
        super().__init__("")

    def bind(self, run: LendingRun) -> None:
        """Take the student's base.

        Raises:
            SGOPDConfigError: a student without a frozen base.
        """
        student = run.accelerator.unwrap_model(run.model)
        reason = _trained_base(student)
        if reason is not None:
            raise SGOPDConfigError(
                f"BaseTeacher must be the frozen base of the student, got {reason} Give a path as `teacher_model` to "
                "have it loaded beside the student, or train the student with LoRA (`peft_config`)."
            )
        self.adapter_name, self.path = None, _base_name(student)
        own = [*student.peft_config]
        self.identity = {"name": self.path, "fingerprint": fingerprint(student, left_out=own)}
        self._borrow(run, student)


def adapter_config(path: str, revision: str | None = None, *, role: str = "teacher") -> Any:
    """The adapter's PEFT configuration.

    Args:
        path: folder or Hub id of the adapter.
        revision: branch, tag or commit of a Hub id.
        role: what messages call its model.

    Raises:
        SGOPDConfigError: PEFT is not installed, or the adapter is a learned prompt.
        CheckpointError: the adapter, or its base, is half in its place.
    """
    check_student(path)
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise SGOPDConfigError(
            f"An adapter as {role} must have PEFT installed, got {path!r} without it. It loads the adapter. Install "
            "`peft`, or give a merged model."
        ) from error
    config = PeftConfig.from_pretrained(path, revision=revision)
    if config.is_prompt_learning:
        raise SGOPDConfigError(
            f"The {role}'s adapter must change weights, got {config.peft_type.value} in {path!r}. Its virtual tokens "
            "would shift every score by their number. Give a LoRA adapter, or a full model."
        )
    return config


def is_adapter(path: str, revision: str | None) -> bool:
    """Whether a folder or Hub id holds an adapter."""
    return find_adapter_config_file(path, revision=revision) is not None


def fits_student(path: str, revision: str | None, student: Any) -> bool:
    """Whether an adapter was trained on the base that the student keeps frozen."""
    config = adapter_config(path, revision)
    if _trained_base(student) is not None or changes_base(config) or config.base_model_name_or_path is None:
        return False
    kinds = {other.peft_type for other in student.peft_config.values()}
    return kinds == {config.peft_type} and _same_source(config.base_model_name_or_path, _base_name(student))


def is_base_of(path: str, revision: str | None, student: Any, args: Any) -> bool:
    """Whether a path, with its revision, is what the student keeps frozen below its adapter."""
    if _trained_base(student) is not None or not _same_source(path, _base_name(student)):
        return False
    return revision == (args.model_init_kwargs or {}).get("revision")


def load_with_base(
    path: str, *, like: PreTrainedModel, revision: str | None, init_kwargs: dict, on_host: bool = False
) -> LocalTeacher:
    """The adapter on a base of its own, merged into it unless the base is quantized.

    Args:
        path: folder or Hub id of the adapter.
        like: its dtype and attention implementation are used unless `init_kwargs` says otherwise.
        revision: of the adapter; the base's is in the adapter's configuration.
        init_kwargs: for `from_pretrained` of the base.
        on_host: leave its weights in host memory.

    Raises:
        TeacherError: an adapter that does not fit its base.
    """
    from peft import PeftModel

    config = adapter_config(path, revision)
    if config.base_model_name_or_path is None:
        raise TeacherError(
            f"The adapter {path!r} must name its base, got none in its configuration. Without it there is nothing to "
            "load it into. Set base_model_name_or_path in its adapter_config.json, or give a merged model."
        )
    base = LocalTeacher.from_pretrained(
        config.base_model_name_or_path,
        role="teacher",
        like=like,
        revision=config.revision,
        init_kwargs=init_kwargs,
        on_host=on_host,
    ).model
    try:
        place: Any = {"torch_device": "cpu"} if on_host else {}
        model = PeftModel.from_pretrained(base, path, revision=revision, config=config, **place)
        _check_loaded(path, model.load_adapter(path, "default", revision=revision, **place))
    except (ValueError, RuntimeError, KeyError) as error:
        if isinstance(error, TeacherError):
            raise
        raise _does_not_fit(path, str(error)) from error
    merged: Any = model if getattr(base, "is_quantized", False) else model.merge_and_unload()
    teacher = LocalTeacher(merged, name=path)
    teacher.is_ours = True
    return teacher


# --- the student's side ----------------------------------------------------------------------------------------------
def _trained_base(student: Any) -> str | None:
    """What moves the student's base, as the end of a sentence; None if nothing does."""
    if not hasattr(student, "peft_config"):
        return "a student whose own weights are trained: such a teacher would change with every update."
    trained = trained_base(student)
    if trained is not None:
        return f"a student that trains {trained!r} of its base: the teacher would change with it."
    if any(map(changes_base, student.peft_config.values())):
        return "a student whose own adapter changes weights of that base, by `init_lora_weights` or `bias`."
    return None


def _base_name(student: Any) -> str:
    return get_config_model_id(student.get_base_model().config)


def _same_source(left: str, right: str) -> bool:
    return left == right or (Path(left).exists() and Path(right).exists() and Path(left).samefile(right))


def _load_into_student(student: Any, path: str, revision: str | None, device: str) -> str:
    """Add the adapter, frozen and inactive, and keep it out of whatever is saved; returns its name."""
    if not hasattr(student, "sg_opd_teachers"):
        student.sg_opd_teachers = {}
    loaded: dict[tuple, str] = student.sg_opd_teachers
    if (path, revision) in loaded:
        # A notebook cell that is run again.
        student.delete_adapter(loaded.pop((path, revision)))
    name = next(name for name in _names() if name not in student.peft_config)
    trainable = {known: parameter.requires_grad for known, parameter in student.named_parameters()}
    try:
        _check_loaded(path, student.load_adapter(path, name, revision=revision, torch_device=device))
        _check_head(path, student)
    except (ValueError, RuntimeError, KeyError) as error:
        if name in student.peft_config:
            student.delete_adapter(name)
        if isinstance(error, TeacherError):
            raise
        raise _does_not_fit(path, str(error)) from error
    for known, parameter in student.named_parameters():
        parameter.requires_grad_(trainable.get(known, False))
    loaded[path, revision] = name
    hidden = {REFERENCE_ADAPTER, *loaded.values()}
    saved = [other for other in student.peft_config if other not in hidden]
    student.save_pretrained = partial(student.save_pretrained, selected_adapters=saved)
    return name


def _names() -> Iterator[str]:
    yield _NAME
    number = 1
    while True:
        number += 1
        yield f"{_NAME}_{number}"


def _check_loaded(path: str, result: Any) -> None:
    """PEFT passes over weights that the model has no place for, and leaves those that are missing at random."""
    odd = [*result.unexpected_keys, *result.missing_keys]
    if odd:
        raise _does_not_fit(path, f"{len(odd)} weights without a counterpart, the first {odd[0]!r}")


def _check_head(path: str, student: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(student.get_output_embeddings(), BaseTunerLayer):
        raise _does_not_fit(path, "it adapts the output head, whose plain weights the scores are computed with")


def _does_not_fit(path: str, reason: str) -> TeacherError:
    return TeacherError(
        f"The teacher's adapter {path!r} does not fit its base: {reason}. It would teach something else than it was "
        "trained for. Give the adapter's own base as the student's, or give a merged model as `teacher_model`."
    )
