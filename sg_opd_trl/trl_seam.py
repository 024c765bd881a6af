"""The private steps of TRL's GRPO trainer as hooks with public names."""

import copy
import datetime
import decimal
import functools
import json
import logging
import pickle
import shutil
import time
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOTrainer
from trl.chat_template_utils import parse_response  # noqa: F401
from trl.data_utils import is_conversational  # noqa: F401
from trl.distributed import DistributedBackend
from trl.models import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer
from trl.trainer import utils as trl_utils
from trl.trainer.utils import (  # noqa: F401
    FusedCausalLMOutput,
    add_fused_lm_head,
    get_callable_name,
    get_config_model_id,
    is_async_callable,
    maybe_gather_lm_head_ctx,
)

from .checkpoints import ASIDE, check_room, complete, told_of_a_full_disk
from .data import flat_prompt, without_images
from .errors import RankError, SGOPDConfigError
from .evaluation_shares import EvenShares
from .hub import check_may_write, is_of_the_hub, not_pushed, tell_if_failed, tell_of_a_checkpoint, unusable, upload_run
from .models.context import check_rows_fit
from .models.experts import without_router_logits
from .models.forward import (
    ForwardOutput,
    HeadRequest,
    layouts_of,
    packed_forward,
    padded_forward,
    padding_behind,
    prefixes_to_share,
    should_pack,
)
from .models.generate import generate_completions
from .models.head import OutputHead
from .models.internals import inner_model
from .models.sampling import END_TOKENS, end_tokens, without_own_settings
from .own_rollouts import checked_rollouts
from .precision import is_quantized
from .random_state import forked_random_state
from .saved_card import without_local_base
from .skipped_steps import check_weights_are_finite, own_part
from .student_files import check_student, written_aside

logger = logging.getLogger(__name__)


# --- one forward -----------------------------------------------------------------------------------------------------
def fused_forward(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    request: HeadRequest | None = None,
    *,
    auxiliary_loss: bool = False,
) -> ForwardOutput:
    """One forward of a model with TRL's fused head: what every log-prob of this package comes from.

    It says what TRL's own trainer would of the same rows of text, packed where that is exact and saves work, with what
    prompts have in common run once (`prefixes_to_share`); in half precision a row has the same positions in every
    layout (`padding_behind`). Gradient and autocast are the caller's.

    Args:
        model: plain or wrapped, prepared by `add_fused_head` or by TRL; with `add_head_output` where it is to answer a
            request.
        input_ids: `(B, P + T)` token ids; the tokens of a row have no padding between them.
        attention_mask: `(B, P + T)`, 1 = token, 0 = padding.
        completion_length: T, the columns at the end whose tokens are scored.
        request: what to compute from the hidden states in the same forward.
        auxiliary_loss: have a mixture of experts return how unevenly it is used, over padded rows as in TRL.

    Raises:
        SGOPDConfigError: a row that is longer than the model's table of positions, or so long that its frequencies
            would be those of the longest row beside it.
    """
    check_rows_fit(model, attention_mask)
    layouts = layouts_of(model).of(attention_mask)
    rows, device = (input_ids, attention_mask, completion_length), input_ids.device
    with compact_head(device):
        if layouts.packed and not auxiliary_loss:
            prefixes = prefixes_to_share(model, *rows)
            if prefixes is not None or should_pack(model, attention_mask):
                return packed_forward(model, *rows, request, prefixes)
        behind = padding_behind(model, device, layouts)
        return padded_forward(model, *rows, request, auxiliary_loss=auxiliary_loss, flush_left=behind)


# Columns of the vocabulary that are projected at once on the CPU.
_CPU_TILE_WIDTH = 1024


@contextmanager
def compact_head(device: torch.device) -> Iterator[None]:
    """Have TRL's fused head project only the positions that count on the CPU too, in tiles that fit its caches.

    TRL asks one function whether the device runs Triton, and projects fewer positions only there, because some other
    devices compile anew for every shape. The CPU does not. Its tiles are as wide as a GPU likes them; the CPU runs the
    same sums about twice as fast, and in a thirtieth of the memory, when a tile stays in the cache.
    """
    if device.type != "cpu":
        yield
        return
    original = trl_utils._use_triton, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl_utils._use_triton = lambda device: device.type == "cpu" or original[0](device)
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = _CPU_TILE_WIDTH
    try:
        yield
    finally:
        trl_utils._use_triton, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = original


# --- a head that answers requests ------------------------------------------------------------------------------------
class HeadSettings(NamedTuple):
    """What TRL makes a fused head of: the numerics of one run.

    Attributes:
        temperature: the logits are divided by it.
        full_precision: whether the projection runs in float32.
        entropy: whether entropies are computed too.
    """

    temperature: float
    full_precision: bool = False
    entropy: bool = False


# A call says whose numerics it wants: a model that several runs share would give all of them those of the last one.
# Not an argument of the forward, as TRL calls it too.
_head_in_use: ContextVar[HeadSettings | None] = ContextVar("head in use", default=None)


@contextmanager
def head_in_use(settings: HeadSettings) -> Iterator[None]:
    """Have models with a fused head use this one for the block; outside they use the one they were given last."""
    token = _head_in_use.set(settings)
    try:
        yield
    finally:
        _head_in_use.reset(token)


def add_fused_head(model: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool) -> HeadSettings:
    """Give a frozen model TRL's fused head: log-probs at the student's temperature, logits never built.

    The same model may be given several, each of which stays; returns what names this one.
    """
    base = inner_model(model)
    if not _answers(base):
        _answer_requests(base)
    base.sg_opd_head = HeadSettings(temperature, cast_lm_head_to_fp32)
    return base.sg_opd_head


def add_head_output(model: nn.Module) -> None:
    """Let a model that TRL has given a fused head answer a `HeadRequest` in its forward, the argument `head_output`.

    The answer is part of what the forward returns: replicas and shards take their gradients from there.
    """
    base = inner_model(model)
    if _answers(base):
        return
    fused: Any = vars(base)["forward"].__func__
    made_of = _closure(fused)
    settings = HeadSettings(
        made_of["temperature"], made_of["cast_lm_head_to_fp32"], entropy="entropy" in made_of["outputs"]
    )
    _answer_requests(base)
    base.sg_opd_heads[settings] = fused
    base.sg_opd_head = settings


def _answers(base: Any) -> bool:
    # On the function, not on the model: whoever gives the model a fused head anew also drops ours.
    return hasattr(getattr(vars(base).get("forward"), "__func__", None), "answers_requests")


def _answer_requests(base: Any) -> None:
    """Put our forward in the place of all that TRL and accelerate have put over the model's own.

    It finds everything in the model that it is called on, so that a deep copy runs the copy's weights: TRL's holds on
    to the forward of the model that it was made for.
    """
    base.sg_opd_plain_forward = _plain_forward(base)
    base.sg_opd_heads = dict(vars(base).get("sg_opd_heads", {}))

    # The original signature: `generate` validates its arguments against it.
    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, head_output: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            _bind_cast_head(self)
            return self.sg_opd_plain_forward(*args, **kwargs)
        settings = _head_in_use.get() or self.sg_opd_head
        fused = _fused_function(self, settings)
        if head_output is None:
            return fused(self, *args, fused_lm_head=True, **kwargs)
        with _last_hidden_state(getattr(self, _closure(fused)["backbone_attr"])) as states:
            outputs = fused(self, *args, fused_lm_head=True, **kwargs)
        head = output_head(self, settings)
        # The head projects what predicts something. Labels that TRL shifts itself leave the last position without one.
        hidden_states = states[0] if "shift_labels" in kwargs else states[0][:, :-1]
        with head.gathered(head.weight, head.bias):
            answer = head_output(hidden_states.to(head.weight.device), head, outputs.log_probs)
        return HeadCausalLMOutput(**outputs, head_output=answer)

    forward.answers_requests = True  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)


def _fused_function(base: Any, settings: HeadSettings) -> Callable:
    """TRL's fused forward of these settings, as a function of the model."""
    if settings not in base.sg_opd_heads:
        ours = base.forward
        outputs = ("log_probs", "entropy") if settings.entropy else ("log_probs",)
        temperature, full_precision, _ = settings
        add_fused_lm_head(base, temperature, cast_lm_head_to_fp32=full_precision, outputs=outputs)
        base.sg_opd_heads[settings] = base.forward.__func__
        base.forward = ours
    return base.sg_opd_heads[settings]


def _closure(function: Any) -> dict[str, Any]:
    """What a function holds on to, by name."""
    if not isinstance(function, types.FunctionType):
        return {}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells}


@dataclass
class HeadCausalLMOutput(FusedCausalLMOutput):
    """What a model with a fused head returns, and what was computed from its hidden states beside that."""

    head_output: tuple[Tensor, ...] | None = None


def output_head(model: nn.Module, settings: HeadSettings) -> OutputHead:
    """The output head of a model with a fused head as it is now, computing what the fused head computes."""
    base = inner_model(model)
    made_of, layer = _closure(_fused_function(base, settings)), base.get_output_embeddings()
    weight, bias = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in (layer.weight, layer.bias))
    return OutputHead(
        weight,
        bias,
        temperature=settings.temperature,
        scale=made_of["logit_scale"],
        softcap=made_of["final_logit_softcapping"],
        full_precision=settings.full_precision,
        gathered=maybe_gather_lm_head_ctx,
    )


@contextmanager
def _last_hidden_state(backbone: nn.Module) -> Iterator[list[Tensor]]:
    states: list[Tensor] = []
    hook = backbone.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    try:
        yield states
    finally:
        hook.remove()


# --- whose weights a forward runs ------------------------------------------------------------------------------------
def own_forward(model: nn.Module) -> None:
    """Have a model that was copied from one in a trainer run its own weights.

    TRL's trainers put a forward into the instance that holds on to the one it replaces. `copy.deepcopy` takes it
    along, and the copy would score with its own weights and generate with the original's.
    """
    for base in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        _bind_cast_head(base)
        forward = _beneath_heads(base)
        if "forward" in vars(base) and not _answers(base) and getattr(forward, "__self__", base) is not base:
            base.forward = _plain_forward(base)


def without_precision(model: nn.Module) -> None:
    """Take away what accelerate has put around a model's forward for the precision of an earlier run.

    Here precision belongs to the call (`accelerator.autocast()`): the next run may have another.
    """
    for module in model.modules():
        inside = vars(module)
        inside.pop("_is_accelerate_prepared", None)
        if "_original_forward" in inside:
            module.forward = inside.pop("_original_forward")


def _plain_forward(base: Any) -> Callable:
    """The model's forward as it was loaded, called on this very model."""
    forward = _beneath_heads(base)
    if isinstance(forward, functools.partial):  # accelerate's, for a model that is spread over devices
        return functools.partial(forward.func, base, *forward.args[1:], **forward.keywords)
    return types.MethodType(getattr(forward, "__func__", forward), base)


def _beneath_heads(base: Any) -> Any:
    forward = vars(base).get("forward", type(base).forward)
    while True:
        function = getattr(forward, "__func__", forward)
        if hasattr(function, "answers_requests"):
            return base.sg_opd_plain_forward
        held = _closure(function)
        if {"original_forward", "backbone_attr"} <= held.keys():  # TRL's fused head
            forward = held["original_forward"]
        elif isinstance(held.get("model_forward"), ConvertOutputsToFp32):  # accelerate's precision
            forward = held["model_forward"].model_forward.__wrapped__
        else:
            return forward


def _bind_cast_head(base: Any) -> None:
    """Have the output head that TRL computes in float32 compute its own, in a copy too."""
    layer = base.get_output_embeddings()
    function: Any = vars(layer).get("forward") if layer is not None else None
    held = _closure(function)
    if held.get("lm_head", layer) is layer:
        return
    cells = tuple(types.CellType(layer if name == "lm_head" else value) for name, value in held.items())
    layer.forward = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)


def has_adapters_inside(model: nn.Module) -> bool:
    """Whether transformers has loaded adapters into a plain model, without PEFT's wrapper that can switch them."""
    return isinstance(model, PreTrainedModel) and model._hf_peft_config_loaded


def has_adapters_of_another(model: Any) -> bool:
    """Whether a plain model is the base of a PEFT model that was made around it, and carries its adapters."""
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "peft_config"):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Unloading takes the layers out, and leaves the attribute.
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


# --- models whose weights never change -------------------------------------------------------------------------------
def is_sharded(accelerator: Any) -> bool:
    """Whether a forward of a prepared frozen model is a collective operation."""
    backend = DistributedBackend(accelerator)
    return backend.is_fsdp or backend.is_zero3


def is_prepared_later(accelerator: Any) -> bool:
    """Whether the student is moved to its device, or split, only when training starts."""
    return places_models_itself(accelerator)


def places_models_itself(accelerator: Any) -> bool:
    """Whether FSDP or DeepSpeed decides where the weights of every model are."""
    return DistributedBackend(accelerator).is_fsdp or accelerator.state.deepspeed_plugin is not None


def agree_on_calls(accelerator: Any, calls: int) -> int:
    """How often every rank must run a frozen model: the largest number of forwards that any of them needs.

    A forward of a sharded model is a collective operation, so that ranks with fewer forwards of their own must add
    some; elsewhere each rank runs its own, and nobody is asked.
    """
    if not is_sharded(accelerator):
        return calls
    return int(accelerator.gather(torch.tensor([calls], device=accelerator.device)).max())


def create_model_from_path(path: str, **options: Any) -> Any:
    """A causal language model by path or Hub id, as TRL loads it.

    Args:
        path: or Hub id.
        **options: of `from_pretrained`.

    Raises:
        CheckpointError: a student that is half in its place.
    """
    check_student(path)
    return trl_utils.create_model_from_path(path, **options)


def prepare_frozen_model(model: PreTrainedModel, accelerator: Any, *, on_device: bool = True) -> Any:
    """Place a frozen model as TRL places its own reference model: DeepSpeed, FSDP or plain.

    One that is teacher and reference of a run is wrapped once. A plain one may be left where it is.
    """
    owner, placed = vars(model).get("sg_opd_placed", (None, None))
    if owner is None or owner() is not accelerator:
        without_precision(model)
        placed = _placed(model, accelerator, on_device)
        without_precision(model)
        # In the model, not in a table beside it: both are freed together.
        vars(model)["sg_opd_placed"] = weakref.ref(accelerator), placed
    return placed


def _placed(model: PreTrainedModel, accelerator: Any, on_device: bool) -> Any:
    backend = DistributedBackend(accelerator)
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(model, accelerator)
    if backend.is_fsdp:
        return prepare_fsdp(model, accelerator)
    # None leaves the decision to accelerate.
    return accelerator.prepare_model(model, device_placement=None if on_device else False, evaluation_mode=True)


@contextmanager
def model_for_generation(
    model: nn.Module, accelerator: Any, gradient_checkpointing_kwargs: dict | None = None
) -> Iterator[PreTrainedModel]:
    """A model unwrapped for `generate`, without gradient, its shards gathered where that is needed.

    Gradient checkpointing, which these arguments are of, is off for the block.
    """
    backend = DistributedBackend(accelerator)
    gathered = backend.summon_full_params(model, recurse=False) if backend.is_fsdp else nullcontext()
    unwrapping = unwrap_model_for_generation(
        model, accelerator, gradient_checkpointing_kwargs=gradient_checkpointing_kwargs
    )
    with unwrapping as unwrapped, torch.no_grad(), gathered:
        yield unwrapped


# --- a loop that goes on from its last step --------------------------------------------------------------------------
def is_over(loop: Any) -> bool:
    """Whether a training loop of transformers has done all its steps."""
    return loop.state.global_step >= loop.state.max_steps


STATE_FILE = "sg_opd_state.json"
ROLLOUTS_FILE = "sg_opd_rollouts_{}.pt"
"""Of each rank, in a checkpoint inside a generation batch: what is left of its rollouts, with their scores."""
# Rows of the data set are in it: what their columns may hold besides numbers and texts, and torch would not read.
_VALUES_OF_ROWS: list[Any] = [
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    decimal.Decimal,
]

OnCompletions = Callable[[Sequence[list[int]], Sequence[int], Sequence[list[int]]], None]
"""`(prompts of all rows, numbers of rows that are written, their completions)`; a row may be named twice."""
PolicyOutput = tuple[Tensor, Tensor | None, Tensor | None]
"""Log-probs and entropies of the completions, `(B, T)` each, and the auxiliary loss of mixtures of experts."""


@dataclass(frozen=True)
class WrittenBatch:
    """A generation batch of all ranks as TRL keeps it for its logs, the same on every rank.

    Attributes:
        completions: texts, or lists of messages; the rollouts of a prompt stand in a row.
        rewards: of each of them by the name of the reward function, NaN where that abstained.
        longest: tokens of the longest one, its end token included.
        cut_off: share of those without an end token.
    """

    completions: Sequence[Any]
    rewards: dict[str, Sequence[float]]
    longest: float
    cut_off: float


@contextmanager
def _gathering_by(accelerator: Any) -> Iterator[None]:
    """Have TRL gather rewards by the accelerator, as it gathers everything else, and not past it.

    What the accelerator does before it gathers is to be done here too: reward functions fail on single ranks.
    """
    original = grpo_trainer.gather
    grpo_trainer.gather = accelerator.gather
    try:
        yield
    finally:
        grpo_trainer.gather = original


class HubSeam:
    """A base to stand before a trainer of transformers or TRL."""

    # Of the trainer.
    args: Any
    state: Any
    control: Any
    callback_handler: Any
    hub_model_id: Any
    is_world_process_zero: Callable[[], bool]
    _finish_current_push: Callable[[], None]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository of the run, see `transformers.Trainer.init_hf_repo`.

        Raises:
            SGOPDConfigError: the Hub cannot be reached or refuses it.
        """
        try:
            super().init_hf_repo(token, private)  # type: ignore[misc]
        except Exception as error:
            raise unusable(error) from error
        if self.is_world_process_zero():
            check_may_write(self.hub_model_id, token=self.args.hub_token if token is None else token)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save and push, see `transformers.Trainer.push_to_hub`.

        Raises:
            PushError: the Hub did not take it; says what is where, and the command that pushes again.
        """
        try:
            return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            if is_of_the_hub(error):
                raise not_pushed(str(self.hub_model_id or self.args.hub_model_id), self.args, error) from error
            raise

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        before = self._push_jobs()
        try:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
        except Exception as error:
            if not is_of_the_hub(error):
                raise
            tell_of_a_checkpoint(error)
        for job in self._push_jobs():
            if job not in before:
                job.add_done_callback(tell_if_failed)

    def push_folder(self) -> str | None:
        """Push the folder of the run as it is, with the student, its card and its reports.

        Transformers' own push would save the student and write its card once more.

        Returns:
            Address of the commit; None on a process that does not push.

        Raises:
            PushError: the Hub did not take it; says what is where, and the command that pushes again.
        """
        if not self.is_world_process_zero():
            return None
        try:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self._finish_current_push()
            return upload_run(str(self.hub_model_id), self.args)
        # The run is whole: whatever fails from here on is the push.
        except Exception as error:
            raise not_pushed(str(self.hub_model_id or self.args.hub_model_id), self.args, error) from error

    def _push_jobs(self) -> list[Any]:
        # Only the process that pushes has the attribute.
        pushing = getattr(self, "push_in_progress", None)
        return [] if pushing is None else list(pushing.jobs)


def _nothing() -> None:
    """A process that trains alone exchanges nothing."""


@contextmanager
def _swept(folder: Path, *, own: bool) -> Iterator[None]:
    """Have nothing left of a checkpoint that another rank could not write its part of."""
    try:
        yield
    except RankError:
        if own:
            shutil.rmtree(folder, ignore_errors=True)
        raise


class WholeFiles(HubSeam, Trainer):
    """A trainer of transformers whose checkpoints and students are whole or not there; it stands before TRL's own.

    A checkpoint is written aside and completed as `checkpoints.py` has it, a student put in its place as
    `student_files.py` has it, and neither is written with weights that are not finite. A run that goes on from its
    last step trains none. It is a `SavedRun`, whose last finished step can be kept whatever ends it.
    """

    args: Any
    model: Any

    nothing_left = False
    """Whether training ends before its first step: the run that it goes on from has finished."""

    before_exchange: Callable[[], None] = staticmethod(_nothing)
    """Is called before ranks exchange what the accelerator does not see."""

    beside_checkpoint: Callable[[Path], None] | None = None
    """Writes more into the folder of a checkpoint before that is completed; all ranks call it."""

    _written_aside: Path | None = None

    def rollouts_state(self) -> dict[str, Any]:
        """Where the run is among rollouts that last longer than a step; by itself it has none."""
        return {}

    def restore_rollouts(self, state: dict[str, Any]) -> None:
        """Go on from there."""

    def write_beside(self, folder: Path) -> None:
        """Write what transformers does not into the folder of a checkpoint; all ranks call it."""
        if self.beside_checkpoint is not None:
            # It may gather what it writes: a rank that could not write its part says so first.
            self.before_exchange()
            self.beside_checkpoint(folder)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the current step, as the training loop does."""
        self._save_checkpoint(self.model, trial=None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Transformers gathers losses past the accelerator.
        self.before_exchange()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.nothing_left or is_over(self):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student, see `transformers.Trainer.save_model`; it is put in its place once all of it is whole.

        Raises:
            NonFiniteError: weights that are NaN or infinite; nothing is written.
            CheckpointError: the disk is full; what was there is as it was.
        """
        if self._written_aside is not None:  # a part of a checkpoint
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir)
        # Scripts may call it on the first rank alone, where all have the same weights.
        together = is_sharded(self.accelerator) or self.is_deepspeed_enabled
        self._check_weights(self.model, f"The student in {folder}", together=together)
        with written_aside(folder, self._size_of_weights(), own=self.args.should_save) as aside:
            if together:
                self.accelerator.wait_for_everyone()
            super().save_model(str(aside), _internal_call=True)
            if together:
                self.accelerator.wait_for_everyone()
            if self.args.should_save:
                without_local_base(aside)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, name = Path(super()._get_output_dir(trial=trial)), f"checkpoint-{self.state.global_step}"
        aside, place = folder / ASIDE / name, folder / name
        size, own = self._size_of_checkpoint(), self.args.should_save
        self._check_weights(model, f"The checkpoint of step {self.state.global_step}", together=True)
        if own:
            shutil.rmtree(aside.parent, ignore_errors=True)
            # Before any rank writes: a slower one would take what is written for what is missing.
            check_room(aside.parent, size)
        self.accelerator.wait_for_everyone()
        with _swept(aside.parent, own=own), told_of_a_full_disk(aside.parent, size, own=own):
            # Transformers asks for the run's folder, and gets the one beside it.
            self._written_aside = aside.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._written_aside = None
            if self.state.best_model_checkpoint == str(aside):
                self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
            self.write_beside(aside)
            # Every rank has written its part.
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                without_local_base(aside)
                complete(aside, place)
        if self.args.should_save:
            shutil.rmtree(aside.parent, ignore_errors=True)
            # Only now: until the new one is whole, the old ones are all there is.
            kept, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), save_total_limit=kept, best_model_checkpoint=best, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))

    def _check_weights(self, model: nn.Module, where: str, *, together: bool) -> None:
        run: Any = self  # of which no more is asked than every trainer has
        check_weights_are_finite(run, model, where, together)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._written_aside is None else str(self._written_aside)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # What is uploaded in the background must not be renamed meanwhile: it is pushed from its place.
        if self._written_aside is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _size_of_checkpoint(self) -> int:
        """Bytes of weights and optimizer state, as far as this process holds them."""
        weights = self._size_of_weights()
        if self.args.save_only_model or self.optimizer is None or self.accelerator.state.deepspeed_plugin is not None:
            return weights
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return weights + sum(x.numel() * x.element_size() for x in states if isinstance(x, Tensor))

    def _size_of_weights(self) -> int:
        student = self.accelerator.unwrap_model(self.model)
        # Of a student with adapters these alone are saved.
        saved = [p for p in student.parameters() if p.requires_grad or not hasattr(student, "peft_config")]
        return sum(p.numel() * p.element_size() for p in saved)


def save_student(trainer: WholeFiles, folder: Path) -> None:
    """Write the student and push nothing: transformers would push it before its card and logs are written."""
    trainer.save_model(str(folder), _internal_call=True)


class RewardsTogether(GRPOTrainer):
    """`GRPOTrainer` that gathers rewards as it gathers all else, so that no rank waits for one that has failed."""

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        with _gathering_by(self.accelerator):
            return super()._calculate_rewards(*args, **kwargs)


def keep_base_weights(engine: Any) -> None:
    """Have an engine that is given the student's weights with adapters merged leave those below as they were.

    TRL merges them, hands the weights over and takes them out again, which is off by a rounding each time, and adds
    up. With the base the reference would move, and what the saved adapters stand on.

    Args:
        engine: TRL's `VLLMGeneration`, changed in place.

    Raises:
        SGOPDConfigError: a base in four or eight bits, whose packed weights TRL would hand over.
    """
    if is_quantized(engine.model):
        raise SGOPDConfigError(
            "`use_vllm` must be False with a student in four or eight bits, got True. TRL hands vLLM the packed "
            "weights, and merging adapters into them rounds the base anew each time. Leave use_vllm out, or load the "
            "student in bfloat16 (with use_peft: true, without load_in_4bit)."
        )
    if not hasattr(engine.model, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = engine._iter_named_params
    layers = [module for module in engine.model.modules() if isinstance(module, BaseTunerLayer)]

    def merged_for_a_while() -> Iterator[tuple[str, Tensor]]:
        weights = [own_part(weight.data) for layer in layers for weight in layer.get_base_layer().parameters()]
        # In the host's memory: there are as many as there is model.
        before = [weight.to("cpu", copy=True) for weight in weights]
        try:
            yield from merged()
        finally:
            if any(layer.merged for layer in layers):
                engine.model.unmerge_adapter()
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)

    engine._iter_named_params = merged_for_a_while


class GRPOSeam(WholeFiles, GRPOTrainer):
    """`GRPOTrainer` with public hooks where it takes its private steps; by itself it trains as its parent does.

    TRL's step, and where a subclass comes in:

    | TRL | hook |
    |---|---|
    | prompts -> completions | `needs_rollouts`, `making_rollouts`, `on_completions` |
    | completions -> rewards of all ranks | `on_rewards` |
    | the scored generation batch of this rank | `on_rollouts` |
    | its old-policy and reference log-probs | `score_for_trl` |
    | shuffled and split into micro-batches | `on_slices` |
    | a micro-batch on its way into the loss | `on_micro_batch` |
    | the policy's one forward inside the loss | `policy_forward` |
    | the gradient before the optimizer's step | `on_grad_norm` |
    | a checkpoint written, and read again | `checkpoint_state`, `check_checkpoint_state` |
    | callbacks made anew from their checkpoint | `lasting_callbacks` |
    """

    args: Any
    model: Any
    _buffered_inputs: Any
    _batch_in_loss: dict | None

    on_completions: OnCompletions | None = None
    """Is told of completions while others are still written, and of all of them before they are judged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._batch_in_loss = None
        self._evaluated_as = "eval"
        self._train_sampler: Any = None
        super().__init__(*args, **kwargs)
        self.fused_head = HeadSettings(self.temperature, self.args.cast_lm_head_to_fp32, entropy=True)
        if self.rollout_func is not None:
            size = self.accelerator.unwrap_model(self.model).config.get_text_config().vocab_size
            self.rollout_func = checked_rollouts(self.rollout_func, self.eos_token_ids[0], size)
        if not self.use_vllm and END_TOKENS in (self.args.generation_kwargs or {}):
            self._end_at(end_tokens(self.generation_kwargs[END_TOKENS], self._tokenizer))
        if self.use_vllm:
            keep_base_weights(self.vllm_generation)

    def _end_at(self, ids: list[int]) -> None:
        """Have these ids end a completion: TRL lets the settings sample by other end tokens than it cuts at.

        The student keeps them in its generation config, so that whoever loads it ends where its training did.
        """
        student = self.accelerator.unwrap_model(self.model)
        self.eos_token_ids = self.generation_config.eos_token_id = self.generation_kwargs[END_TOKENS] = ids
        student.generation_config.eos_token_id = ids

    # --- hooks ---------------------------------------------------------------------------------------------------
    @property
    def needs_rollouts(self) -> bool:
        """Whether the next micro-batch is made of rollouts; otherwise the loss gets an empty one."""
        return True

    def making_rollouts(self, examples: list[dict]) -> AbstractContextManager[None]:
        """Surrounds the making of this rank's generation batch, from prompts to `on_rollouts`."""
        return nullcontext()

    def on_rewards(self, rewards: Tensor) -> None:
        """Called with the rewards of all ranks, `(rows of all ranks, reward functions)`, NaN where abstained."""

    def on_rollouts(self, rollouts: dict, examples: list[dict]) -> dict:
        """Called with this rank's scored generation batch, before it is shuffled and split; returns what is used."""
        return rollouts

    def score_for_trl(self, model: Any, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
        """Log-probs `(B, completion_length)` of the old policy or TRL's own reference, without gradient."""
        return self.run_policy(model, input_ids, attention_mask, completion_length).logps

    def on_slices(self, slices: list[dict]) -> list[dict]:
        """Called with a new generation batch, shuffled and split into micro-batches; returns what is buffered."""
        return slices

    def on_micro_batch(self, inputs: dict) -> dict:
        """Called with the micro-batch that the loss is about to see; returns what is used."""
        return inputs

    def policy_forward(self, model: Any, batch: dict) -> PolicyOutput:
        """The policy's forward inside TRL's loss.

        TRL reads `batch["advantages"]` and the other entries of the loss after this call, so that they may be
        written here, from the log-probs that the loss is about to use.

        Args:
            model: the student as the training loop wraps it.
            batch: the micro-batch.

        Returns:
            What TRL's loss goes on with, for the rows and columns of the batch.
        """
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        width = batch["completion_ids"].size(1)
        output = self.run_policy(model, ids, mask, width, auxiliary_loss=self.aux_loss_enabled)
        return output.logps, output.entropies, output.auxiliary_loss

    def on_grad_norm(self, grad_norm: Any) -> Any:
        """Called with the norm of the gradient, before the optimizer's step unless DeepSpeed has taken it already.

        Returns:
            The norm that is logged.
        """
        return grad_norm

    def checkpoint_state(self) -> dict:
        """JSON-ready facts that go into every checkpoint."""
        return {}

    def check_checkpoint_state(self, state: dict) -> None:
        """Called with the facts of the checkpoint that training resumes from."""

    def lasting_callbacks(self) -> list[Any]:
        """Callbacks whose instances go on in a resumed run, with their attributes in its checkpoint."""
        return []

    def rollouts_state(self) -> dict[str, Any]:
        """Where the run is among its rollouts: the number of micro-batches so far, and the slices still in use."""
        return {"step": self._step, "slices": self._buffered_inputs}

    def restore_rollouts(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._step, self._buffered_inputs = state["step"], state["slices"]

    # --- what a subclass may use ---------------------------------------------------------------------------------
    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer, also where the processing class wraps it."""
        return self._tokenizer

    @property
    def tags(self) -> list[str]:
        """Tags of the model card."""
        return self._tag_names

    @property
    def citation(self) -> str:
        """BibTeX entry of the paper."""
        return self._paper["citation"]

    @property
    def event_loop(self) -> Any:
        """TRL's running loop for async reward functions, None without any."""
        return self.async_loop if self._has_async_funcs else None

    @property
    def is_multimodal(self) -> bool:
        """Whether the student takes images."""
        return self._is_vlm

    @property
    def mode(self) -> str:
        """`train` or `eval`, as TRL tells them apart."""
        return "train" if self.model.training else "eval"

    @property
    def sharded(self) -> bool:
        """Whether frozen models are sharded, so that all ranks must run them the same number of times."""
        return is_sharded(self.accelerator)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the wall time of a block to one part of the step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def report_metric(self, mode: str, name: str, value: float) -> None:
        """Log a value with TRL's own metrics; values of one logging window are averaged."""
        self._metrics[mode][name].append(value)

    def last_batch(self) -> WrittenBatch:
        """The training generation batch that was written last; to be asked for before another one is."""
        logs: Any = self._logs
        metrics = self._metrics["train"]
        return WrittenBatch(
            completions=list(logs["completion"]),
            rewards={name: list(rewards) for name, rewards in logs["rewards"].items()},
            longest=metrics["completions/max_length"][-1],
            cut_off=metrics["completions/clipped_ratio"][-1],
        )

    def suppress_tokens(self, ids: list[int]) -> None:
        """Have the student never sample these ids; vLLM does its own sampling and is not told."""
        wanted = sorted({*ids, *(self.generation_config.suppress_tokens or ())})
        self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = wanted

    @property
    def micro_batches_per_rollout(self) -> int:
        """Micro-batches that are trained on one generation batch, repetitions included."""
        return int(self.args.steps_per_generation * self.num_iterations)

    def tokenize_prompts(self, prompts: list) -> list[list[int]]:
        """Token ids of prompts, rendered exactly as for the student's rollouts."""
        return self._tokenize_prompts(prompts)[0]

    def window_entries(self, name: str) -> Tensor:
        """One entry of all buffered rows of the current optimizer step on this rank, `(rows, ...)`."""
        slices = min(self.current_gradient_accumulation_steps, self.args.steps_per_generation)
        first = self._step % self.args.steps_per_generation
        wanted = [(first + i) % self.args.steps_per_generation for i in range(slices)]
        return torch.cat([self._buffered_inputs[i][name] for i in wanted])

    def rollouts_aside(self, examples: list[dict]) -> dict:
        """A scored generation batch as in training, of which nothing stays: no metric, no table, no count, no draw.

        Args:
            examples: rows of the data set, each as often as a group has rollouts.
        """
        books: list[dict] = [self._metrics, self._logs, self.seconds]
        before, seen, training = copy.deepcopy(books), self.state.num_input_tokens_seen, self.model.training
        self.model.train()
        try:
            with forked_random_state(self.accelerator.device):
                return self._generate_and_score_completions(examples)
        finally:
            self.model.train(training)
            self.state.num_input_tokens_seen = seen
            for book, kept in zip(books, before, strict=True):
                book.clear()
                book.update(kept)

    @contextmanager
    def student_scoring(self) -> Iterator[Any]:
        """The student for scoring without gradient: gradient checkpointing off, otherwise as it is."""
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            yield self.model

    def student_writing(self) -> AbstractContextManager[Any]:
        """The student unwrapped for `generate_completions`, without gradient."""
        return model_for_generation(self.model_wrapped, self.accelerator, self.args.gradient_checkpointing_kwargs)

    def run_policy(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_length: int,
        request: HeadRequest | None = None,
        *,
        auxiliary_loss: bool = False,
    ) -> ForwardOutput:
        """One forward of the student, in the run's precision and with gradient where that is on.

        Args:
            model: the student as the training loop wraps it.
            input_ids: `(B, P + T)`, prompts padded on the left, completions on the right.
            attention_mask: `(B, P + T)`, 1 = token.
            completion_length: T.
            request: what to compute from the hidden states beside the log-probs.
            auxiliary_loss: whether the load-balancing loss of a mixture of experts is wanted.
        """
        with self.accelerator.autocast(), head_in_use(self.fused_head):
            return fused_forward(
                model, input_ids, attention_mask, completion_length, request, auxiliary_loss=auxiliary_loss
            )

    # --- TRL's private steps -------------------------------------------------------------------------------------
    def _compute_loss(self, model: nn.Module, inputs: dict) -> Tensor:
        # TRL hands its forward tensors; `policy_forward` needs the whole micro-batch that they are from.
        self._batch_in_loss = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._batch_in_loss = None

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> PolicyOutput:
        if self._batch_in_loss is not None:
            return self.policy_forward(model, self._batch_in_loss)
        wants_more = torch.is_grad_enabled() or kwargs.get("compute_entropy") or kwargs.get("compute_aux_loss")
        if wants_more or args or kwargs.get("pixel_values") is not None:
            with head_in_use(self.fused_head):
                return super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
                )
        # TRL scores the old policy and its own reference. The batch size that it names is for memory alone:
        # `score_for_trl` has a budget of its own.
        return self.score_for_trl(model, input_ids, attention_mask, logits_to_keep), None, None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; metrics of several sets are told apart by their names, `eval_NAME_reward`, as their losses are."""
        before, self._evaluated_as = self._evaluated_as, metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluated_as = before

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The loader of an evaluation set, as in `transformers.Trainer`; ranks share its rows, none is read twice."""
        loader: Any = super().get_eval_dataloader(eval_dataset)
        dealt = loader.batch_sampler
        if isinstance(dealt, BatchSamplerShard) and not (dealt.drop_last or dealt.split_batches):
            # As transformers has accelerate hand through a sampler that knows of ranks.
            if not isinstance(dealt.batch_sampler, EvenShares):
                dealt.batch_sampler = EvenShares(
                    dealt.batch_sampler.sampler,
                    batch_size=self.args.per_device_eval_batch_size,
                    group_size=int(self.num_generations_eval or 1),
                    rank=self.accelerator.process_index,
                    ranks=self.accelerator.num_processes,
                )
            dealt.num_processes, dealt.process_index, dealt.even_batches = 1, 0, False
        # It would cut the losses of the last batch to what is left over of the data set, in prompts for rows.
        loader._drop_last = True
        return loader

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with TRL's metrics of this window; TRL calls those of every evaluation set `eval_...`."""
        evaluated = self._evaluated_as.removeprefix("eval_")
        if self.mode == "eval" and evaluated != self._evaluated_as:
            metrics = self._metrics["eval"]
            for name in list(metrics):
                metrics[f"{evaluated}_{name}"] = metrics.pop(name)
        super().log(logs, start_time)

    def _tokenize_prompts(self, prompts: list) -> Any:
        # Templates of text models take a content that is no string for empty, or render its source.
        return super()._tokenize_prompts(prompts if self.is_multimodal else [flat_prompt(x) for x in prompts])

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        other = self.use_vllm or self.use_transformers_continuous_batching or self.is_multimodal or self.sharded
        # With tools TRL writes turn by turn.
        if other or self.tools:
            student = self.accelerator.unwrap_model(self.model)
            with without_own_settings(student), without_router_logits(student):
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            told = None if self.on_completions is None else partial(self.on_completions, prompt_ids)
            return generate_completions(model, prompt_ids, self.generation_config, on_ended=told), None

    def _generate(self, prompts: list) -> Any:
        with self.timed("rollout"):
            written = super()._generate(prompts)
        if self.on_completions is not None:
            prompt_ids, completion_ids = written[:2]
            self.on_completions(prompt_ids, range(len(completion_ids)), completion_ids)
        return written

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        with self.timed("verify"), _gathering_by(self.accelerator):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            self.on_rewards(rewards)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        if not self.is_multimodal:
            # TRL hands whatever stands in such a column to a vision model.
            inputs = [without_images(example) for example in inputs]
        with self.making_rollouts(inputs):
            return self.on_rollouts(super()._generate_and_score_completions(inputs), inputs)

    def _prepare_inputs(self, generation_batch: Any) -> dict:
        inputs = self._prepared(generation_batch) if self.needs_rollouts else {}
        # Wrapped models send their buffers, or shards, around in the forward that follows.
        self.before_exchange()
        return inputs

    def _prepared(self, generation_batch: Any) -> dict:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before:
            # A new generation batch: what the hook returns is what this and the next micro-batches are taken from.
            self._buffered_inputs = self.on_slices(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return self.on_micro_batch(inputs)

    def load_student(self, folder: Path) -> None:
        """Give the student the weights that were saved in a folder."""
        check_student(folder)
        self._load_from_checkpoint(str(folder))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.on_grad_norm(grad_norm)

    def write_beside(self, folder: Path) -> None:
        """Write the facts of the run and the rollouts in use too."""
        super().write_beside(folder)
        if self.args.should_save:
            (folder / STATE_FILE).write_text(json.dumps(self.checkpoint_state(), indent=2), encoding="utf-8")
        self._save_rollouts(folder)

    def _save_rollouts(self, folder: Path) -> None:
        state = self.rollouts_state()
        # On the boundary of a generation batch there is nothing left of it.
        if state["step"] % self.micro_batches_per_rollout == 0 or self.args.save_only_model:
            return
        path, unreadable = folder / self._rollouts_file, ""
        torch.save(state, path)
        # Whether a resumed run can read it is seen now, and not then.
        try:
            self._read_rollouts(path, "meta")
        except pickle.UnpicklingError as error:
            unreadable = str(error)
        # All ranks or none: they would go on at different places.
        if int(self.accelerator.gather(torch.tensor([bool(unreadable)], device=self.accelerator.device)).sum()):
            path.unlink()
            logger.warning(
                "Rows of the data set hold values that a checkpoint cannot keep: a run that goes on from step %d has "
                "new rollouts in place of those that were in use. Turn such columns (times with a zone, say) into "
                "text or numbers. %s",
                self.state.global_step,
                unreadable,
            )

    def _read_rollouts(self, path: Path, device: Any) -> dict[str, Any]:
        with torch.serialization.safe_globals(_VALUES_OF_ROWS):
            return torch.load(path, map_location=device, weights_only=True)

    @property
    def _rollouts_file(self) -> str:
        return ROLLOUTS_FILE.format(self.accelerator.process_index)

    def _init_training_state(
        self,
        max_steps: Any,
        num_update_steps_per_epoch: Any,
        num_train_epochs: Any,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        # What a `train()` before this one in the same process has left belongs to it.
        self.restore_rollouts({"step": 0, "slices": None})
        epochs, steps = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # TRL's sampler draws a permutation per epoch from one generator, and would begin with that of the first.
        for _ in range(epochs if self._train_sampler is not None and not self.args.ignore_data_skip else 0):
            next(iter(self._train_sampler), None)
        return epochs, steps

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _load_callback_state(self) -> None:
        # Transformers would make them anew from arguments that a subclass need not export, and lose its own.
        lasting, states = self.lasting_callbacks(), self._stored_callbacks()
        for callback in lasting:
            stored = states.pop(type(callback).__name__, None)
            if stored is not None and self.args.restore_callback_states_from_checkpoint:
                last = stored[-1] if isinstance(stored, list) else stored
                vars(callback).update(last.get("attributes", {}))
        super()._load_callback_state()
        # A checkpoint is written over the entries that are there, also for one that the loaded checkpoint lacks.
        states |= {type(callback).__name__: callback.state() for callback in lasting}

    def _stored_callbacks(self) -> dict[str, Any]:
        # By name in a run and in its checkpoints, whatever transformers declares.
        states: Any = self.state.stateful_callbacks
        return states

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / STATE_FILE).is_file():
            self.check_checkpoint_state(json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8")))
        if checkpoint is not None and (Path(checkpoint) / self._rollouts_file).is_file():
            path = Path(checkpoint) / self._rollouts_file
            device = self.accelerator.device
            # Of several ranks on CPUs each has one with a number, to which torch does not load.
            self.restore_rollouts(self._read_rollouts(path, "cpu" if device.type == "cpu" else device))
