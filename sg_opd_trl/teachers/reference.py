"""The reference: what the trainer needs of one, and the student's own first adapter state as one.

The latter takes no second copy of the student in memory. The reference is the zero of the extrapolation (lR in
A(lambda) = lT - lS + (lambda - 1)(lT - lR)), so that it must be free of noise and of the student's updates.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import SGOPDConfigError
from ..models.batch import TokenBatch
from ..models.head import OutputHead
from .base import HiddenScores, SupportScores
from .local import ModelScorer

REFERENCE_ADAPTER = "ref"


class Reference(Protocol):
    """What the trainer asks of a reference: scores alone, of the same kinds as the teacher's.

    Attributes:
        identity: JSON-ready facts that tell this reference from another.
        vocab_size: rows of its embedding; it cannot score ids from there on.
    """

    identity: dict
    vocab_size: int

    @property
    def distillation_modes(self) -> frozenset[str]:
        """The values of `distillation_mode` that it can serve, see `Teacher.distillation_modes`."""

    def score(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Tensor:
        """Log-probs `(B, T)` float32 of the completions of the chosen rows, see `Teacher.score`."""

    def score_on_support(self, batch: TokenBatch, rows: Tensor, max_tokens: int, support_ids: Tensor) -> SupportScores:
        """Log-probs of the completions' own tokens, and of the teacher's `support_ids` `(B, T, K)`."""

    def score_hidden(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> HiddenScores:
        """The hidden states that predict the completions, see `Teacher.score_hidden`."""

    def output_heads(self) -> list[OutputHead]:
        """The one head that turns the hidden states of `score_hidden` into logits."""


class AdapterReference(ModelScorer):
    """The student with its adapters switched off, or with a frozen copy of its first adapter.

    Args:
        student_scoring: context manager that lends the student for scoring.
        accelerator: of the trainer.
        adapter_name: the frozen copy, or None for no adapter at all.
        vocab_size: rows of the student's embedding.
        fused_head: the run's temperature and numerics.
    """

    def __init__(
        self,
        student_scoring: Callable[[], AbstractContextManager[PreTrainedModel]],
        accelerator: Any,
        adapter_name: str | None,
        vocab_size: int,
        fused_head: Any,
    ) -> None:
        self.student_scoring = student_scoring
        self.accelerator = accelerator
        self.adapter_name = adapter_name
        self.vocab_size = vocab_size
        self.fused_head = fused_head
        self.role = "reference"
        self.model = None
        self.identity: dict = {"name": "initial student", "adapter": adapter_name, "fingerprint": None}

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The initial student for the block: adapters switched, dropout off, no gradient."""
        with self.student_scoring() as model, evaluating(model), adapter_switched(model, self.adapter_name):
            self.model = model
            try:
                yield
            finally:
                self.model = None


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off for the block: noise in the reference would move every extrapolated advantage."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def adapter_switched(model: Any, adapter_name: str | None) -> Iterator[None]:
    """Activate an adapter, or none, and leave every parameter exactly as trainable as it was, inside the block too.

    PEFT makes the adapter it activates trainable and the others not. FSDP2 looks in a model's first forward at what of
    it is trained, and this may be that one.
    """
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    active = model.active_adapter

    def as_trainable_as_before() -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])

    try:
        if adapter_name is None:
            with model.disable_adapter():
                as_trainable_as_before()
                yield
        else:
            model.set_adapter(adapter_name, inference_mode=True)
            as_trainable_as_before()
            yield
    finally:
        if adapter_name is not None:
            model.set_adapter(active)
        as_trainable_as_before()


# --- whether the student without its adapters is the student as it was -----------------------------------------------
#: Ways to begin an adapter, `init_lora_weights` of PEFT, that leave the base's weights alone. Others take its first
#: state out of them, so that base and adapter together are the model that was loaded.
_BASE_STAYS = (True, False, "gaussian", "eva", "orthogonal")
#: Those that make nothing of the adapter's first state.
_BEGINS_AS_NOTHING = (True, "gaussian", "eva")


def changes_base(config: Any) -> bool:
    """Whether an adapter of this PEFT configuration changes weights of its base: at its start, or in training."""
    facts = vars(config)
    return facts.get("init_lora_weights", True) not in _BASE_STAYS or facts.get("bias", "none") != "none"


def trained_base(student: Any) -> str | None:
    """Name of a parameter that is trained and is no adapter's, so that switching adapters off leaves it; None if none.

    Biases that LoRA trains are among them, and layers that the caller has thawed.
    """
    adapters = set(student.peft_config)
    names = (name for name, parameter in student.named_parameters() if parameter.requires_grad)
    return next((name for name in names if not adapters & {*name.split(".")}), None)


def trained_without_adapters(student: Any) -> str | None:
    """Name of a trained parameter that is still in the forward once adapters are switched off; None if none is."""
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    with torch.enable_grad(), evaluating(student), adapter_switched(student, None):
        for parameter in trained.values():
            # Switching adapters off freezes them, and would hide one that is used all the same.
            parameter.requires_grad_(True)
        total = _logits(student).float().sum()
        used = torch.autograd.grad(total, list(trained.values()), allow_unused=True) if total.requires_grad else ()
    return next((name for name, gradient in zip(trained, used, strict=False) if gradient is not None), None)


@torch.no_grad()
def is_its_base(student: Any) -> bool:
    """Whether the student with its adapters, as they are now, is the student without them."""
    with evaluating(student):
        with_adapters = _logits(student)
        with adapter_switched(student, None):
            without = _logits(student)
    return torch.allclose(with_adapters.float(), without.float(), rtol=_ROUNDING, atol=_ROUNDING)


def begins_as_its_base(student: Any) -> bool:
    """The same from the adapters' configurations, where the student cannot be run yet."""
    return not any(
        config.is_prompt_learning or vars(config).get("init_lora_weights", True) not in _BEGINS_AS_NOTHING
        for config in student.peft_config.values()
    )


# A copy that is not needed costs little, a reference that is another model everything.
_ROUNDING = 1e-4


def _logits(student: Any) -> Tensor:
    size = student.config.get_text_config().vocab_size
    ids = torch.arange(1, 9, device=student.device).unsqueeze(0) % size
    logits = student(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    # Virtual tokens of an adapter add positions in front.
    return logits[:, -ids.size(1) :]


def add_reference_adapter(model: Any) -> None:
    """Keep a frozen copy of the student's adapter, as it is now, under the name `ref`.

    Raises:
        SGOPDConfigError: the student carries several active adapters, or one of another kind named `ref`.
    """
    names = list(model.active_adapters)
    active = names[0] if len(names) == 1 else REFERENCE_ADAPTER
    if active == REFERENCE_ADAPTER:
        raise SGOPDConfigError(
            f"`model` must carry one active adapter that is not named {REFERENCE_ADAPTER!r}, got {names}. Its first "
            "state is copied under that name as the reference. Rename or merge the adapters, or give "
            "`reference_model`."
        )
    if REFERENCE_ADAPTER not in model.peft_config:
        # Its weights are copied: begun as the first one was, it could take a part of the base's weights for itself.
        config = copy.copy(model.peft_config[active])
        if "init_lora_weights" in vars(config):
            config.init_lora_weights = True
        model.add_adapter(REFERENCE_ADAPTER, config)
        model.has_sg_opd_reference = True
    elif not hasattr(model, "has_sg_opd_reference"):
        raise SGOPDConfigError(
            f"`model` must have no adapter named {REFERENCE_ADAPTER!r} of its own, got {list(model.peft_config)}. "
            "The student's first state is copied under that name as the reference. Rename or delete that adapter, or "
            "give `reference_model`."
        )
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    # Also where the copy was there: a second trainer on the same student takes its present state.
    state = get_peft_model_state_dict(model, adapter_name=active)
    set_peft_model_state_dict(model, state, adapter_name=REFERENCE_ADAPTER)
    # PEFT adds adapters trainable.
    for name, parameter in model.named_parameters():
        if REFERENCE_ADAPTER in name.split("."):
            parameter.requires_grad_(False)


def save_without_reference(model: Any) -> None:
    """Keep the frozen copy out of checkpoints and pushes."""
    names = [name for name in model.peft_config if name != REFERENCE_ADAPTER]
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=names)
