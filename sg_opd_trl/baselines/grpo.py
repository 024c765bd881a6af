"""GRPO as TRL has it: `trl.GRPOTrainer`, with files that are whole or not there."""

from collections.abc import Callable, Sequence
from typing import Any

from ..agreement import check_for_trl
from ..student_files import check_student
from ..trl_seam import RewardsTogether, is_prepared_later
from ..verifiers.bounded import bounded
from .checkpoints import KeptTrainer
from .config import PlainGRPOConfig


class PlainGRPOTrainer(KeptTrainer, RewardsTogether):
    """`trl.GRPOTrainer`, which keeps its checkpoints and its last finished step."""


def build_grpo_trainer(
    student: str,
    args: PlainGRPOConfig,
    reward_funcs: Sequence[Callable[..., Any]],
    train_dataset: Any,
    eval_dataset: Any,
    **loading: Any,
) -> PlainGRPOTrainer:
    """Build the trainer, and compare its student's log-probs with plain ones.

    Args:
        student: name or path.
        args: configuration.
        reward_funcs: TRL reward functions.
        train_dataset: rows with `prompt` and what the reward functions need.
        eval_dataset: the same, or None.
        **loading: further arguments for loading the student.

    Raises:
        CheckpointError: the student is half in its place.
    """
    check_student(student)
    functions = bounded(list(reward_funcs), args.verifier_timeout)
    trainer = PlainGRPOTrainer(
        student, functions, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **loading
    )
    # A student that is split when training starts cannot be run before.
    if not is_prepared_later(trainer.accelerator):
        check_for_trl(trainer.model, trainer.processing_class, role="student", method="grpo")
    return trainer
