"""The methods of `sg-opd train`: for each, its configuration, its trainer, and what it took from the teacher.

A method is one entry of `METHODS`. Classes are imported once a method is chosen: TRL's trainers take seconds to
import, and its experimental ones warn.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..baselines.teacher import TeacherUse


@dataclass(frozen=True)
class Method:
    """One value of `method`.

    Attributes:
        config: `module:class` of the trainer's configuration.
        build: name of the student, configuration, reward functions, training rows, evaluation rows (or None) and
            further arguments for loading the student -> trainer.
        teacher_use: what this process of such a trainer has taken from its teacher so far.
    """

    config: str
    build: Callable[[str, Any, list[Callable[..., Any]], Any, Any, dict[str, Any]], Any]
    teacher_use: Callable[[Any], "TeacherUse"]

    @property
    def config_class(self) -> Any:
        """The configuration class, imported now."""
        module, _, name = self.config.partition(":")
        return getattr(importlib.import_module(module), name)


def _build_sg_opd(student: str, args: Any, reward_funcs: list, train: Any, test: Any, loading: dict) -> Any:
    from ..trainer import SGOPDTrainer

    return SGOPDTrainer(student, reward_funcs, args, train_dataset=train, eval_dataset=test, **loading)


def _sg_opd_use(trainer: Any) -> "TeacherUse":
    from ..baselines.teacher import TeacherUse

    # Seconds stay 0: the teacher works inside the steps, whose time the run counts anyway.
    reused = 0 if trainer.rollout_cache is None else trainer.rollout_cache.tokens_reused
    return TeacherUse(trainer.teacher.tokens_scored, trainer.teacher.tokens_generated, reused)


def _build_grpo(student: str, args: Any, reward_funcs: list, train: Any, test: Any, loading: dict) -> Any:
    from ..baselines.grpo import build_grpo_trainer

    return build_grpo_trainer(student, args, reward_funcs, train, test, **loading)


def _no_use(trainer: Any) -> "TeacherUse":
    from ..baselines.teacher import TeacherUse

    return TeacherUse()


def _build_sft(student: str, args: Any, reward_funcs: list, train: Any, test: Any, loading: dict) -> Any:
    from ..baselines.sft import build_sft_trainer

    return build_sft_trainer(student, args, reward_funcs, train, **loading)


def _build_gkd(student: str, args: Any, reward_funcs: list, train: Any, test: Any, loading: dict) -> Any:
    from ..baselines.gkd import build_gkd_trainer

    return build_gkd_trainer(student, args, train, **loading)


def _baseline_use(trainer: Any) -> "TeacherUse":
    return trainer.teacher_use


METHODS = {
    "sg_opd": Method("sg_opd_trl.config:SGOPDConfig", _build_sg_opd, _sg_opd_use),
    "grpo": Method("sg_opd_trl.baselines.config:PlainGRPOConfig", _build_grpo, _no_use),
    "sft": Method("sg_opd_trl.baselines.config:TeacherSFTConfig", _build_sft, _baseline_use),
    "seqkd": Method("sg_opd_trl.baselines.config:SeqKDConfig", _build_sft, _baseline_use),
    "gkd": Method("sg_opd_trl.baselines.gkd:OnPolicyGKDConfig", _build_gkd, _baseline_use),
}
"""Name -> method; the first is the default."""
