"""What a part of the package may ask of a training run, and whether a subclass decides something itself."""

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .config import SGOPDConfig


class Run(Protocol):
    """The run as its parts see it; `SGOPDTrainer` is one.

    Attributes:
        args: the configuration.
        accelerator: of accelerate: devices, ranks, collectives.
        model: the student, wrapped as the training loop has it.
        state: of transformers: steps done and steps in all.
        train_dataset: rows with a `prompt`.
        eval_dataset: the same for evaluation, a mapping of several, or None.
    """

    args: "SGOPDConfig"
    accelerator: Any
    model: Any
    state: Any
    train_dataset: Any
    eval_dataset: Any

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer, also where the processing class wraps it."""

    @property
    def mode(self) -> str:
        """`train` or `eval`."""

    def tokenize_prompts(self, prompts: list) -> list[list[int]]:
        """Token ids of prompts, rendered exactly as for the student's rollouts."""


def inherits(kind: type, base: type, *names: str) -> bool:
    """Whether a class has these methods from `base` as they are there."""
    return all(getattr(kind, name) is getattr(base, name) for name in names)
