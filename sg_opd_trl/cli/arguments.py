"""Script arguments of `sg-opd train`: what the trainer's configuration does not say.

Apart from `parsing`, because these classes need TRL, which takes seconds to import.
"""

from dataclasses import dataclass, field
from typing import NoReturn

from trl import ScriptArguments, TrlParser

from ..errors import SGOPDConfigError
from .methods import METHODS


@dataclass
class SGOPDScriptArguments(ScriptArguments):
    """Method, data set, reward functions and report of one training run, on top of `trl.ScriptArguments`.

    Raises:
        SGOPDConfigError: a count below 1, or no reward function.
    """

    method: str = field(
        default="sg_opd",
        metadata={
            "help": "'sg_opd' trains with `SGOPDTrainer`; the others with TRL's own trainers: 'grpo' without a "
            "teacher, 'sft' on its verified samples, 'seqkd' on its greedy outputs, 'gkd' on the student's rollouts "
            "with the generalized Jensen-Shannon divergence. Settings that a method lacks are unknown keys.",
            "choices": list(METHODS),
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["math_reward"],
        metadata={
            "help": "Reward functions: `math_reward`, `exact_match_reward`, or dotted import paths such as "
            "`my_package.rewards.my_reward`."
        },
    )
    question_column: str | None = field(
        default=None, metadata={"help": "Column that becomes the user's message. Default: the data set has `prompt`."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Column that becomes `solution`, the gold answer. Default: `solution`."}
    )
    instruction: str | None = field(
        default=None, metadata={"help": "Text appended to every user message on a new line."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message of every chat that has none."})
    min_difficulty: float | None = field(
        default=None, metadata={"help": "Rows whose difficulty is lower, or missing, are dropped."}
    )
    difficulty_column: str = field(default="difficulty", metadata={"help": "Column `min_difficulty` refers to."})
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "Rows with a longer prompt, chat template included, are dropped."}
    )
    eval_samples: int | None = field(
        default=None, metadata={"help": "Number of rows of the test split used for evaluation. Default: all."}
    )
    report: bool = field(default=True, metadata={"help": "Write `report.html` with the curves of the run."})

    def __post_init__(self) -> None:
        for name, value in (("max_prompt_tokens", self.max_prompt_tokens), ("eval_samples", self.eval_samples)):
            if value is not None and value < 1:
                raise SGOPDConfigError(
                    f"`{name}` must be at least 1, got {value}. It is a count. Leave it out for no limit."
                )
        if not self.reward_funcs:
            raise SGOPDConfigError(
                "`reward_funcs` must name at least one reward function, got none. The verifier is one of them. Set it "
                "to `math_reward`."
            )


class RunParser(TrlParser):
    """`trl.TrlParser` that raises instead of printing two hundred lines of usage and leaving the process."""

    def error(self, message: str) -> NoReturn:
        """Raises `SGOPDConfigError` instead of leaving the process."""
        raise SGOPDConfigError(f"The settings are not valid: {message}. `sg-opd train --help` lists all fields.")
