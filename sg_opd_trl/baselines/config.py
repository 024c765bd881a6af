"""Configurations of SFT on teacher rollouts and of SeqKD, and the checks that all baselines share."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl import GRPOConfig, SFTConfig

from ..config import engine_problems
from ..errors import SGOPDConfigError
from ..precision import precision_problems, settle_bf16
from ..run_folder import FolderFields, folder_problems
from ..verifiers.bounded import RewardFields, reward_problems

_TOKENIZED = "Rows are token ids before TRL's trainer sees them, it would have no effect or change them."
ORDER = "Rows come in the order in which SG-OPD visits their prompts."

# Settings that TRL has and a baseline leaves at their default, each with the reason that the error gives.
FIXED = {
    "assistant_only_loss": _TOKENIZED,
    "chat_template_path": _TOKENIZED,
    "dataset_kwargs": _TOKENIZED,
    "dataset_text_field": _TOKENIZED,
    "eos_token": _TOKENIZED,
    "max_length": "A row that is cut would be another row; `max_prompt_tokens` and the rollout's length bound it.",
    "truncation_mode": "Nothing is cut.",
    "packing": "Steps would no longer have equal rows.",
    "eval_packing": "Nothing is evaluated while training.",
    "train_sampling_strategy": ORDER,
    "eval_strategy": "There are no rollouts for held-out rows; `sg-opd evaluate` measures students of all methods.",
}
_FIXED_SFT = {"completion_only_loss": "The loss is on the completion, the prompt is masked."}


@dataclass
class PairedFields(FolderFields):
    """Fields of every baseline; a base to stand before TRL's configuration, whose defaults these replace.

    Students are compared pair by pair: rows keep the order and the length that SG-OPD's have.
    """

    max_length: int | None = field(default=None, metadata={"help": "Not used: rows are never cut."})
    train_sampling_strategy: str = field(default="sequential", metadata={"help": f"'sequential'. {ORDER}"})
    shuffle_dataset: bool = field(
        default=True, metadata={"help": "Whether prompts are permuted, as `SGOPDTrainer` permutes them."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `teacher_model_name_or_path`."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Passed on to the chat template when prompts are rendered."}
    )


@dataclass
class _TeacherSFTFields(RewardFields, PairedFields, SFTConfig):
    """What SFT on sampled and on greedy teacher outputs share."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]  # TRL's is not a ClassVar
        *SFTConfig._VALID_DICT_FIELDS,
        "teacher_model_init_kwargs",
        "chat_template_kwargs",
    ]

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher model, a local folder or a Hub id."}
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `from_pretrained` of the teacher. The student's dtype and attention "
            "implementation are used unless given here."
        },
    )
    max_completion_length: int = field(default=256, metadata={"help": "Longest teacher rollout in tokens."})
    teacher_sampling_filter_correct: bool = field(
        default=True,
        metadata={
            "help": "Train only on teacher rollouts the verifier judges right; each other one is replaced by a repeat "
            "of a right one of the same step (our choice)."
        },
    )
    verifier_reward_func: str | None = field(
        default=None, metadata={"help": "Name of the reward function that is the verifier. Default: the first."}
    )
    rollout_batch_size: int = field(
        default=128, metadata={"help": "Teacher rollouts that one process generates at once."}
    )

    def __post_init__(self) -> None:
        raise_problems(
            [
                *moved(self, FIXED | _FIXED_SFT),
                *no_teacher(self),
                *not_positive(self, "max_completion_length", "rollout_batch_size"),
                *reward_problems(self),
                *precision_problems(self),
                *folder_problems(self),
            ]
        )
        settle_bf16(self)
        super().__post_init__()


@dataclass
class TeacherSFTConfig(_TeacherSFTFields):
    """Configuration of `method: sft`: `trl.SFTConfig`, and how the teacher's rollouts are sampled.

    Raises:
        SGOPDConfigError: no teacher, a value out of range, or a setting of TRL that would break the pairing.
    """

    num_generations: int = field(
        default=8, metadata={"help": "Teacher rollouts per prompt, so that a step has as many prompts as SG-OPD's."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the teacher's rollouts."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the teacher's rollouts, 1 is off."})

    def __post_init__(self) -> None:
        raise_problems(
            [
                *not_positive(self, "num_generations"),
                *outside(self, "temperature", math.inf, "At 0 there is `method: seqkd`."),
                *outside(self, "top_p", 1.0, "It is the share of probability that rollouts are drawn from."),
            ]
        )
        super().__post_init__()


@dataclass
class SeqKDConfig(_TeacherSFTFields):
    """Configuration of `method: seqkd`: `trl.SFTConfig` with a teacher, whose greedy outputs are the targets.

    Raises:
        SGOPDConfigError: no teacher, a value out of range, or a setting of TRL that would break the pairing.
    """


@dataclass
class PlainGRPOConfig(RewardFields, FolderFields, GRPOConfig):
    """Configuration of `method: grpo`: `trl.GRPOConfig` as it is, on machines without bfloat16 too.

    Raises:
        SGOPDConfigError: a precision or an engine is asked for that cannot be had on the machine, or settings of the
            folder exclude one another or name nothing.
    """

    def __post_init__(self) -> None:
        problems = [precision_problems(self), folder_problems(self), reward_problems(self), engine_problems(self)]
        raise_problems([problem for kind in problems for problem in kind])
        settle_bf16(self)
        super().__post_init__()


def raise_problems(problems: list[str]) -> None:
    """Raise all problems as one error, if there are any.

    Raises:
        SGOPDConfigError: one problem per line.
    """
    if problems:
        raise SGOPDConfigError("\n".join(problems))


def moved(config: Any, fixed: dict[str, str]) -> Iterator[str]:
    """Settings that a baseline leaves at their default and that are not."""
    for name, reason in fixed.items():
        default = type(config).__dataclass_fields__[name].default
        value = getattr(config, name)
        if value != default:
            yield f"`{name}` must be {default!r} in a baseline, got {value!r}. {reason} Leave it out."


def no_teacher(config: Any) -> Iterator[str]:
    """A missing teacher."""
    if config.teacher_model_name_or_path is None:
        yield (
            "`teacher_model_name_or_path` must be set, got None. The baseline learns from a teacher. Set it to a "
            "folder, a Hub id or `builtin/arithmetic-teacher`."
        )


def not_positive(config: Any, *names: str) -> Iterator[str]:
    """Counts below 1."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            default = type(config).__dataclass_fields__[name].default
            yield f"`{name}` must be a whole number of at least 1, got {value!r}. It is a count. Set it to {default}."


def outside(config: Any, name: str, high: float, reason: str) -> Iterator[str]:
    """A number outside (0, high]."""
    value = getattr(config, name)
    if not (0 < value <= high and value < math.inf):
        bounds = f"(0, {high:g}{')' if math.isinf(high) else ']'}"
        yield f"`{name}` must be a number in {bounds}, got {value!r}. {reason} Set it to 1, the default."
