"""Everything that is refused or warned about before the first step.

In the order of a run: `check_arguments` before a model is loaded, `prepare_student` before anything changes the
student, `check_run` once TRL has set up models, data and tokenizer, `check_log_probs` once every model is there. What
concerns teacher and reference alone is checked where they are built, in `teachers.build`; single settings are checked
by the configuration.
"""

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import DistributedType
from datasets import IterableDataset
from torch import nn
from transformers import AutoTokenizer, TrainerCallback

from .agreement import Agreement, check_model, made_up_rows, plain_ids
from .config import SGOPDConfig, engine_problems, warn_of_unused
from .data import PROMPTS_RENDERED, TEACHER_PROMPT, check_dataset, datasets_of, first_prompts, longest_prompts
from .errors import SGOPDConfigError
from .models.batch import TokenBatch
from .models.context import bounds_of
from .models.forward import dropout_of, largest_dropout
from .models.internals import inner_model
from .models.sampling import check_generation_kwargs, own_settings
from .precision import check_trained_dtype, tell_lost_updates
from .random_state import forked_random_state
from .run import Run
from .student_files import check_student
from .teacher_sampling.callback import check_anchor_callbacks, is_anchor_callback
from .teachers.adapter import adapter_config, is_adapter
from .teachers.build import check_given_models, default_reference
from .teachers.local import ModelScorer
from .teachers.reference import (
    REFERENCE_ADAPTER,
    add_reference_adapter,
    begins_as_its_base,
    evaluating,
    is_its_base,
    save_without_reference,
    trained_base,
    trained_without_adapters,
)
from .teachers.routed import RoutedTeacher
from .trl_seam import (
    create_model_from_path,
    fused_forward,
    get_config_model_id,
    has_adapters_inside,
    has_adapters_of_another,
    head_in_use,
    is_prepared_later,
    is_sharded,
    own_forward,
    without_precision,
)

logger = logging.getLogger(__name__)


class PreparedRun(Run, Protocol):
    """A run that TRL has set up.

    Attributes:
        reward_funcs: reward functions and models, the verifier among them.
        processing_class: tokenizer, or the processor around it, which renders chats.
    """

    reward_funcs: Any
    processing_class: Any

    @property
    def is_multimodal(self) -> bool:
        """Whether the student takes images."""


# --- before a model is loaded ----------------------------------------------------------------------------------------
def default_config(model: Any) -> SGOPDConfig:
    """The configuration of a trainer that was given none, its output folder named after the student."""
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return SGOPDConfig(f"{Path(name).name or 'student'}-SG-OPD")


def check_arguments(
    args: Any,
    teacher_model: Any,
    reference_model: Any,
    callbacks: Iterable | None,
    tools: Any,
    rollout_func: Any,
    environment_factory: Any,
    train_dataset: Any,
) -> None:
    """Refuse what can be refused before a model is loaded.

    Raises:
        SGOPDConfigError: names the setting, its value, the reason and the way out.
    """
    if not isinstance(args, SGOPDConfig):
        raise SGOPDConfigError(
            f"`args` must be an SGOPDConfig, got {type(args).__name__}. The gate and the anchor read their settings "
            "from it. Build SGOPDConfig with the same arguments; it takes all of GRPOConfig's."
        )
    if args.remove_unused_columns:
        raise SGOPDConfigError(
            "`remove_unused_columns` must be False, got True. It leaves rows nothing but their prompt: the verifier's "
            "`solution` and every other column would be gone. Leave it out."
        )
    check_given_models(args, teacher_model, reference_model)
    kwargs: Any = args.generation_kwargs  # the configuration has read JSON text by now
    # A server compares the settings with its own names where it is bound.
    local_teacher_writes = args.teacher_sampling_enable and not args.teacher_model_server_url
    check_generation_kwargs(kwargs, use_vllm=args.use_vllm, local_teacher_writes=local_teacher_writes)
    check_anchor_callbacks([callback for callback in callbacks or [] if is_anchor_callback(callback)], args)
    if args.teacher_sampling_enable:
        _check_anchor(tools, rollout_func, environment_factory, args, train_dataset)


def _check_anchor(
    tools: Any, rollout_func: Any, environment_factory: Any, args: SGOPDConfig, train_dataset: Any
) -> None:
    given = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
    for name, value in given.items():
        if value:
            raise SGOPDConfigError(
                f"`teacher_sampling_enable=True` is not supported with `{name}`, got both. The teacher's rollouts are "
                "single turns, the verifier would judge them by the end of an interaction that never took place. Set "
                "teacher_sampling_enable=False; gate and teacher signal work as usual."
            )
    if isinstance(train_dataset, IterableDataset) and args.teacher_sampling_prompts == "reserve":
        raise SGOPDConfigError(
            "`teacher_sampling_prompts='reserve'` is not supported with an iterable data set: its rows cannot be "
            "drawn by number. Set teacher_sampling_prompts='share', or load the data set without streaming."
        )


def check_prompt_room(config: Any, longest_prompt: int | None, source: str) -> None:
    """Refuse a rollout engine without room for a prompt and its completion; nothing if the prompt is not known.

    Raises:
        SGOPDConfigError: names the length that is needed.
    """
    for problem in engine_problems(config, longest_prompt, source) if longest_prompt is not None else ():
        raise SGOPDConfigError(problem)


# --- before anything changes the student -----------------------------------------------------------------------------
def load_adapter_student(
    model: Any, processing_class: Any, args: SGOPDConfig, peft_config: Any, quantization_config: Any
) -> tuple[Any, Any, Any]:
    """Load a student given as the path of an adapter, what a LoRA run saves: its base, and the adapter to be trained.

    TRL's own loading takes full models alone.

    Returns:
        Student and tokenizer as they are given, or those of the adapter, and how TRL is to quantize what it loads;
        without a tokenizer of its own, TRL looks for the base's.

    Raises:
        CheckpointError: the student, or the base of its adapter, is half in its place.
        SGOPDConfigError: a second adapter is asked for, or the adapter does not name its base.
    """
    options: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # no JSON text by now
    revision = options.pop("revision", None)
    if isinstance(model, str):
        check_student(model)
    if not isinstance(model, str) or not _is_adapter(model, revision):
        return model, processing_class, quantization_config
    if peft_config is not None:
        raise SGOPDConfigError(
            f"`peft_config` must be left out where `model` is an adapter, got both (adapter {model!r}). That adapter "
            "is what is trained on. Leave it out (`use_peft: false`), or merge the adapter into its base first "
            "(`merge_and_unload` of PEFT)."
        )
    config = adapter_config(model, revision, role="student")
    if config.base_model_name_or_path is None:
        raise SGOPDConfigError(
            f"`model` must name its base where it is an adapter, got none in that of {model!r}. Without it there is "
            "nothing to load it into. Set base_model_name_or_path in its adapter_config.json, or give a merged model."
        )
    from peft import PeftModel

    options.setdefault("trust_remote_code", args.trust_remote_code)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    # Ranks hold a whole model each.
    if args.world_size > 1:
        options["device_map"] = None
    base = create_model_from_path(config.base_model_name_or_path, revision=config.revision, **options)
    student = PeftModel.from_pretrained(base, model, revision=revision, config=config, is_trainable=True)
    return student, processing_class or _tokenizer_of_adapter(model, revision, args), None


def check_full_student(model: str, revision: str | None, method: str) -> None:
    """Refuse an adapter as the student of a method whose trainer is TRL's own, which loads full models alone.

    Raises:
        SGOPDConfigError: names the adapter and the way out.
    """
    if _is_adapter(model, revision):
        raise SGOPDConfigError(
            f"`model_name_or_path` must be a full model with `method: {method}`, got the adapter {model!r}. Only "
            "`method: sg_opd` goes on from an adapter. Merge it into its base first (`merge_and_unload` of PEFT)."
        )


def _is_adapter(path: str, revision: str | None) -> bool:
    try:
        return is_adapter(path, revision)
    except OSError:
        # Neither a folder nor a Hub id: whoever loads the model says so.
        return False


def _tokenizer_of_adapter(path: str, revision: str | None, args: SGOPDConfig) -> Any:
    options = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    try:
        # Sides as TRL loads it.
        return AutoTokenizer.from_pretrained(path, truncation_side="left", padding_side="left", **options)
    except (OSError, ValueError):
        return None


def release_student(model: Any) -> None:
    """Free a student given as an object from what an earlier run has put around it.

    Raises:
        SGOPDConfigError: its layers carry the adapter of a PEFT model that was made around it.
    """
    if isinstance(model, str):
        return
    if has_adapters_of_another(model) and not has_adapters_inside(model):
        raise SGOPDConfigError(
            f"`model` must be a model of its own, got a {type(model).__name__} around which a PeftModel was made, by "
            "an earlier trainer with `peft_config` perhaps. That adapter would be overwritten or trained along. Give "
            "the model's path, load it again, or go on with the PeftModel itself and no `peft_config`."
        )
    without_precision(model)
    own_forward(model)


def prepare_student(model: Any, args: SGOPDConfig, reference_model: Any, peft_config: Any) -> Any:
    """Keep the student's initial state where the reference will need it, before anything changes the student.

    Returns:
        A deep copy of a student given as a plain model; None where a path, an adapter or TRL's reference serves.

    Raises:
        SGOPDConfigError: a state that could not be had back.
    """
    _check_can_be_reloaded(model, args, peft_config)
    if isinstance(model, str) or peft_config is not None or not default_reference(args, reference_model):
        return None
    # TRL keeps a reference for its KL penalty, which is the initial student as long as it is not synced.
    if args.beta != 0.0 and not args.sync_ref_model:
        return None
    if hasattr(model, "peft_config"):
        add_reference_adapter(model)
        return None
    return copy.deepcopy(model)


def _check_can_be_reloaded(model: Any, args: SGOPDConfig, peft_config: Any) -> None:
    """TRL loads its own reference for the KL penalty from the student's path."""
    plain = not isinstance(model, str) and peft_config is None and not hasattr(model, "peft_config")
    if args.beta != 0.0 and plain and not get_config_model_id(model.config):
        raise SGOPDConfigError(
            f"`beta={args.beta}` is not supported with a student given as a model without a path: TRL loads the "
            "initial student, which the KL penalty needs, from there. Pass `model` as a path, or set beta=0."
        )


def keep_initial_adapters(run: "PreparedRun", reference_model: Any) -> None:
    """Keep a frozen copy of adapters that do not begin as nothing, where the initial student is a reference.

    Switched off they would leave another model than the one that was given. TRL's KL penalty finds the copy too.
    """
    student = run.accelerator.unwrap_model(run.model)
    if not _goes_back_to_its_base(run, student, reference_model) or REFERENCE_ADAPTER in student.peft_config:
        return
    with run.accelerator.autocast():
        later = is_prepared_later(run.accelerator)
        same = begins_as_its_base(student) if later else is_its_base(student)
    if not same:
        add_reference_adapter(student)
        save_without_reference(student)


def check_base_stays(run: "PreparedRun", reference_model: Any) -> None:
    """Refuse a student that trains more than adapters, where it is to be the initial student without them.

    Raises:
        SGOPDConfigError: names a parameter that is trained and would move the reference.
    """
    args, student = run.args, run.accelerator.unwrap_model(run.model)
    if not _goes_back_to_its_base(run, student, reference_model):
        return
    with run.accelerator.autocast():
        later = is_prepared_later(run.accelerator)
        moving = trained_base(student) if later else trained_without_adapters(student)
    if moving is not None:
        penalty = " and beta=0" if args.beta != 0.0 else ""
        raise SGOPDConfigError(
            f"`model` must train nothing but adapters where the initial student is the reference, got {moving!r}, "
            "which is still there with adapters switched off: the reference would move with every update. Set "
            f"bias='none' in the LoRA configuration or freeze it, or set `reference_model` to the student's path"
            f"{penalty}."
        )


def _goes_back_to_its_base(run: "PreparedRun", student: Any, reference_model: Any) -> bool:
    wanted = default_reference(run.args, reference_model) or run.args.beta != 0.0
    return wanted and hasattr(student, "peft_config")


# --- once TRL has set up everything ----------------------------------------------------------------------------------
def check_run(run: PreparedRun) -> None:
    """Check student, data and settings against one another.

    Raises:
        DataError: a data set without what the run needs.
        SGOPDConfigError: a student that cannot be trained so, or prompts without room in the rollout engine.
    """
    args: Any = run.args  # TRL has filled in by now what its fields leave open
    student = run.accelerator.unwrap_model(run.model)
    _check_student(student)
    check_is_trained(run)
    warn_of_unused(args)
    if run.is_multimodal:
        raise SGOPDConfigError(
            f"`model` must be a text model, got {type(run.model).__name__}. Image inputs are not scored by the "
            "teacher. Use trl.GRPOTrainer, or a text-only student."
        )
    for name, dataset in datasets_of(run):
        # Evaluation takes an incomplete batch as it is.
        prompts = args.generation_batch_size // args.num_generations if name == "train_dataset" else 1
        check_dataset(
            dataset,
            reward_funcs=run.reward_funcs,
            processing_class=run.processing_class,
            prompts_per_generation_batch=prompts,
            name=name,
        )
    check_rollout_engine(run)
    # Not a check, but it has its place here: the reference's adapter exists by now, the teacher's does not yet.
    if hasattr(student, "peft_config") and REFERENCE_ADAPTER in student.peft_config:
        save_without_reference(student)
    tell_lost_updates(student, args, run.accelerator)
    _settle_dropout(args, student)
    _warn_of_own_settings(args, student)
    warn_of_a_gate_without_drift(args)
    if args.max_skipped_steps and run.accelerator.distributed_type == DistributedType.DEEPSPEED:
        logger.warning(
            "`max_skipped_steps=%d` has no effect with DeepSpeed, which takes a step before its gradient can be "
            "looked at: the first loss or gradient that is not finite ends the run. Launch with DDP or FSDP if steps "
            "are to be skipped, or set max_skipped_steps=0.",
            args.max_skipped_steps,
        )


def _check_student(model: Any) -> None:
    """Refuse adapters that TRL cannot switch, and weights that are too coarse to be trained.

    Raises:
        SGOPDConfigError: an adapter loaded into a plain model, or float16 weights that are trained.
    """
    check_trained_dtype(model)
    if has_adapters_inside(model):
        raise SGOPDConfigError(
            f"`model` must be a PeftModel where it has adapters, got a {type(model).__name__} with adapters loaded "
            "into it. They cannot be switched off for the reference. Load it with "
            "peft.PeftModel.from_pretrained(base, path, is_trainable=True)."
        )


def check_is_trained(run: Run) -> None:
    """Refuse a student without a parameter to train.

    Raises:
        SGOPDConfigError: says how that comes about.
    """
    if not any(parameter.requires_grad for parameter in run.model.parameters()):
        raise SGOPDConfigError(
            f"`model` must have a parameter that is trained, got a {type(run.model).__name__} with none. A "
            "model that is the teacher or the reference of another run is frozen by it. Give its path, or a copy: "
            "`copy.deepcopy(model).requires_grad_(True)`."
        )


def check_rollout_engine(run: Run) -> None:
    """Hold the first prompts of the data set against the engine's context.

    Raises:
        SGOPDConfigError: they do not fit.
    """
    # An environment writes its own prompts, which nobody knows yet.
    if not run.args.use_vllm or run.environment_factories:
        return
    prompts = run.tokenize_prompts(first_prompts(run.train_dataset))
    longest = max(map(len, prompts), default=0)
    check_prompt_room(run.args, longest, f"the longest of the first {PROMPTS_RENDERED} prompts")


def warn_of_a_gate_without_drift(args: Any) -> None:
    """Where each generation batch is used up in one update, the policy is still the one that wrote it."""
    block = args.steps_per_generation * args.num_iterations
    if args.drift_gate_tau is not None and args.gradient_accumulation_steps % block == 0:
        logger.warning(
            "`drift_gate_tau=%s` does nothing with num_iterations=%d and steps_per_generation=%d: each rollout is "
            "used in one update, before the policy could drift. Set num_iterations=2.",
            args.drift_gate_tau,
            args.num_iterations,
            args.steps_per_generation,
        )


def _warn_of_own_settings(args: Any, student: Any) -> None:
    """What the student's files say of sampling is for a chat with it, and nobody else in the run would heed it."""
    own = own_settings(student, args.generation_kwargs)
    if own:
        logger.warning(
            "The student's generation_config sets %s. Rollouts and evaluation leave that out: teacher, vLLM and "
            "log-probs know nothing of it. What training is to sample by, set in `generation_kwargs`.",
            ", ".join(f"{name}={value!r}" for name, value in own.items()),
        )


def _settle_dropout(args: SGOPDConfig, student: Any) -> None:
    """Dropout is on while the student writes, and moves its log-probs at random, with them the sign of a2 (Eq. 4)."""
    if args.disable_dropout:
        _disable_dropout(student)
        return
    dropout = largest_dropout(student)
    if not dropout:
        return
    gated = ", and with them the sign the gate looks at" if args.sign_gated_extrapolation else ""
    logger.warning(
        "The student has dropout of up to %.2g: in training it is on while rollouts are written, which then are not "
        "those of the model that is scored and saved, and changes the student's log-probs at random%s. Set "
        "disable_dropout=True.",
        dropout,
        gated,
    )


def _disable_dropout(model: nn.Module) -> None:
    """What TRL leaves on: it knows the modules of torch, and most attention has its dropout as a number."""
    for module in model.modules():
        for name in dropout_of(module):
            setattr(module, name, 0.0)


# --- once every model is there ---------------------------------------------------------------------------------------
class ScoringRun(Run, Protocol):
    """A run whose models are built.

    Attributes:
        teacher: one, or several by name.
        reference: of the extrapolation, or None.
        ref_model: TRL's own reference of the KL penalty, or None.
        agreements: what `check_log_probs` found.
        aux_loss_enabled: whether TRL adds the loss of the student's routers.
        router_aux_loss_coef: its weight.
    """

    teacher: Any
    reference: Any
    ref_model: Any
    agreements: list[Agreement]
    aux_loss_enabled: bool
    router_aux_loss_coef: float

    def add_callback(self, callback: Any) -> None:
        """Have a callback told of what happens in the run."""


def check_log_probs(run: ScoringRun) -> None:
    """Have student, teachers and reference score made-up rows in the run's layouts, against each row alone.

    What was found is kept in `run.agreements`. A student that is sharded or moved to its device when training starts
    is checked then.

    Raises:
        SGOPDConfigError: a model whose rows depend on one another in every layout.
    """
    run.agreements = []
    if is_prepared_later(run.accelerator):
        run.add_callback(_CheckOnceSharded(run))
    else:
        run.agreements = _check_models(run)


class _CheckOnceSharded(TrainerCallback):
    def __init__(self, run: ScoringRun) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._run.agreements:
            self._run.agreements = _check_models(self._run)


def _check_models(run: ScoringRun) -> list[Agreement]:
    accelerator = run.accelerator
    device, agreements = accelerator.device, []

    def over_ranks(difference: float) -> float:
        return float(accelerator.gather(torch.tensor([difference], device=device)).max())

    longest: int | None = None
    for role, writes, lent in _models_that_score(run):
        with lent as model:
            config = inner_model(model).config
            # Rendering prompts takes longer than scoring rows, and few models ask how long rows can be.
            if longest is None and bounds_of(config):
                longest = _longest_row(run)
            ids = plain_ids(run.tokenizer, config.get_text_config().vocab_size)
            rows = made_up_rows(config, ids, longest or 0, device, run.tokenizer.pad_token_id)
            found = check_model(
                model,
                rows,
                role=role,
                temperature=run.temperature,
                writes=writes,
                autocast=accelerator.autocast,
                agree=over_ranks if accelerator.num_processes > 1 else float,
            )
            if role == "student":
                _check_who_writes(run, found)
                _warn_of_training_mode(run, model, rows, found.tolerance)
                if run.aux_loss_enabled:
                    _check_auxiliary_loss(run, model, rows)
        agreements.append(found)
    return agreements


def _check_who_writes(run: ScoringRun, student: Agreement) -> None:
    """Only this package's own sampling takes prompts of one length at a time.

    Raises:
        SGOPDConfigError: TRL's own loop would write for a student that must not see padding.
    """
    continuous: Any = run.args.use_transformers_continuous_batching
    setting = "tools" if run.tools else "use_transformers_continuous_batching" if continuous else None
    if setting is not None and not student.layouts.written_together:
        raise SGOPDConfigError(
            f"`{setting}` is not supported with the student {student.model}, got both. It does not continue prompts "
            "of unequal length together as it does each alone, and TRL's own loop, which writes then, would. "
            f"Leave `{setting}` out, use another student, or write rollouts with vLLM (use_vllm=True)."
        )


def _warn_of_training_mode(run: ScoringRun, model: Any, rows: TokenBatch, tolerance: float) -> None:
    """Measured, since it has many names: router jitter, layer drop, whatever a model does in training alone."""
    if largest_dropout(model):
        return  # which has been told
    width = rows.completion_ids.size(1)
    with forked_random_state(run.accelerator.device), run.accelerator.autocast():
        evaluated = fused_forward(model, *rows.joined(), width).logps
        model.train()
        try:
            trained = fused_forward(model, *rows.joined(), width).logps
        finally:
            model.eval()
    difference = float((trained - evaluated)[rows.completion_mask != 0].abs().mean())
    if not difference <= tolerance:
        logger.warning(
            "The student (%s) gives other log-probs in training than in evaluation, by %.2g nats on average "
            "(rounding: up to %.2g), without dropout: rollouts and log-probs of a step are not those of the model "
            "that is scored and saved. Set to 0 in its configuration what is random, such as `router_jitter_noise`.",
            type(run.accelerator.unwrap_model(model)).__name__,
            difference,
            tolerance,
        )


def _check_auxiliary_loss(run: ScoringRun, model: Any, rows: TokenBatch) -> None:
    """TRL balances the routers of every student whose configuration knows of router logits, and cannot for some.

    Raises:
        SGOPDConfigError: the loss cannot be computed.
    """
    try:
        with run.accelerator.autocast():
            fused_forward(model, *rows.joined(), rows.completion_ids.size(1), auxiliary_loss=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the code of one architecture among many raises
        name = type(inner_model(model)).__name__
        raise SGOPDConfigError(
            f"`router_aux_loss_coef` must be 0 with a student of the class {name}, got {run.router_aux_loss_coef} "
            f"(unset, it is the model's own): its auxiliary loss ends in {type(error).__name__}: {error}. TRL "
            "computes it as Mixtral's is, with names that this model's configuration lacks. Set "
            "router_aux_loss_coef=0; nothing balances the experts then."
        ) from error


def _models_that_score(run: ScoringRun) -> Iterator[tuple[str, bool, AbstractContextManager[Any]]]:
    """Every model in this process that gives log-probs: its role, whether it writes, and what lends it, in evaluation.

    A model that is sharded writes with its shards gathered, which only generation itself does.
    """
    args, whole = run.args, not is_sharded(run.accelerator)
    yield "student", whole and not args.use_vllm and run.rollout_func is None, _student_without_dropout(run)
    if run.ref_model is not None:
        yield "reference", False, _evaluated(run.ref_model)
    parts = run.teacher.distinct if isinstance(run.teacher, RoutedTeacher) else [run.teacher]
    for scorer in (*parts, run.reference):
        # Servers and teachers of the caller's own score as they do.
        if isinstance(scorer, ModelScorer):
            writes = whole and args.teacher_sampling_enable and hasattr(scorer, "generate")
            yield scorer.role, writes, _lent(scorer)


@contextmanager
def _student_without_dropout(run: ScoringRun) -> Iterator[Any]:
    with run.student_scoring() as model, evaluating(model), head_in_use(run.fused_head):
        yield model


@contextmanager
def _evaluated(model: Any) -> Iterator[Any]:
    with evaluating(model):
        yield model


@contextmanager
def _lent(scorer: ModelScorer) -> Iterator[Any]:
    # A model that several runs share has the temperature of the one that was made last, unless it is said.
    with scorer.lent(), head_in_use(scorer.fused_head):
        yield scorer.model


def _longest_row(run: ScoringRun) -> int:
    """Tokens that a row of the run can have, as far as its longest prompts tell."""
    longest = 0
    for _, dataset in datasets_of(run):
        for column in ("prompt", TEACHER_PROMPT) if dataset is not None else ():
            prompts = longest_prompts(dataset, column)
            longest = max([longest, *map(len, run.tokenize_prompts(prompts) if prompts else ())])
    return longest + run.args.longest_completion
