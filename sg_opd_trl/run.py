"""What a part of the package may ask of a training run, and whether a subclass decides something itself."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    # Parts below the configuration name its type from here, so that they do not have to import it.
    from .config import SGOPDConfig as SGOPDConfig


class Run(Protocol):
    """The run as its parts see it; `SGOPDTrainer` is one. A part that needs more says so in a Protocol beside it.

    Attributes:
        args: the configuration.
        accelerator: of accelerate: devices, ranks, collectives.
        model: the student, wrapped as the training loop has it.
        state: of transformers: steps done and steps in all.
        train_dataset: rows with a `prompt`.
        eval_dataset: the same for evaluation, a mapping of several, or None.
        temperature: of the student's rollouts and of all log-probs.
        fused_head: what TRL's fused head is made of in this run, the temperature among it.
        tools: functions that the student may call while it writes; empty or None without.
        rollout_func: the caller's own way to make rollouts, or None.
        environment_factories: makers of the environments that the student acts in, or None; these may own the data.
    """

    args: "SGOPDConfig"
    accelerator: Any
    model: Any
    state: Any
    train_dataset: Any
    eval_dataset: Any
    temperature: float
    fused_head: Any
    tools: Any
    rollout_func: Any
    environment_factories: Any

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer, also where the processing class wraps it."""

    @property
    def mode(self) -> str:
        """`train` or `eval`."""

    def tokenize_prompts(self, prompts: list) -> list[list[int]]:
        """Token ids of prompts, rendered exactly as for the student's rollouts."""

    def student_scoring(self) -> AbstractContextManager[Any]:
        """The student for scoring without gradient: gradient checkpointing off, otherwise as it is."""


def inherits(kind: type, base: type, *names: str) -> bool:
    """Whether a class has these methods from `base` as they are there."""
    return all(getattr(kind, name) is getattr(base, name) for name in names)
