"""Configuration of GKD on the student's rollouts. Apart from the others: TRL warns where its trainer is imported."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from trl.experimental.gkd import GKDConfig

from .config import FIXED, ORDER, moved, no_teacher, not_positive, outside, raise_problems

_FIXED_GKD = {
    "completion_only_loss": "The loss is on the student's own rollout.",
    "lmbda": "All rows are the student's own rollouts; there are no other completions.",
    "seq_kd": "All rows are the student's own rollouts.",
    "loss_type": "The loss is the generalized Jensen-Shannon divergence.",
    "label_smoothing_factor": "The loss has no labels to smooth.",
    "padding_free": "Prompts are padded for generation.",
}


@dataclass
class OnPolicyGKDConfig(GKDConfig):
    """Configuration of `method: gkd`: `trl.experimental.gkd.GKDConfig`, all rows the student's own rollouts.

    Raises:
        SGOPDConfigError: no teacher, a value out of range, or a setting of TRL that would break the pairing.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]  # TRL's is not a ClassVar
        *GKDConfig._VALID_DICT_FIELDS,
        "chat_template_kwargs",
    ]

    max_length: int | None = field(default=None, metadata={"help": "Not used: rows are never cut."})
    train_sampling_strategy: str = field(default="sequential", metadata={"help": f"'sequential'. {ORDER}"})
    shuffle_dataset: bool = field(
        default=True, metadata={"help": "Whether prompts are permuted, as `SGOPDTrainer` permutes them."}
    )
    lmbda: float = field(default=1.0, metadata={"help": "1: all rows are the student's own rollouts."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the student's rollouts."})
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `teacher_model_name_or_path`."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Passed on to the chat template when prompts are rendered."}
    )
    num_generations: int = field(
        default=8, metadata={"help": "Rollouts per prompt, so that a step has as many prompts as SG-OPD's."}
    )

    def __post_init__(self) -> None:
        raise_problems(
            [
                *moved(self, FIXED | _FIXED_GKD),
                *no_teacher(self),
                *not_positive(self, "max_new_tokens", "num_generations"),
                *outside(self, "temperature", math.inf, "It divides the logits that rollouts are drawn from."),
            ]
        )
        super().__post_init__()

    @property
    def max_completion_length(self) -> int:
        """Longest rollout, under the name that the other methods have for it."""
        return self.max_new_tokens
