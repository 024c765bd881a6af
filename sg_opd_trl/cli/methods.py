"""The methods of `sg-opd train`: for each, its configuration, its trainer, and what it took from the teacher.

A method is one entry of `METHODS`. Classes are imported once a method is chosen: TRL's trainers take seconds to
import, and its experimental ones warn.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sg_opd_trl.baselines.teacher import TeacherUse
    from sg_opd_trl.cli.parsing import TrainSettings


@dataclass(frozen=True)
class Method:
    """One value of `method`.

    Attributes:
        config: `module:class` of the trainer's configuration.
        build: settings, reward functions, training rows, evaluation rows (or None) and how to load the student ->
            trainer.
        teacher_use: what this process of such a trainer has taken from its teacher so far.
    """

    config: str
    build: Callable[["TrainSettings", list[Callable[..., Any]], Any, Any, dict[str, Any]], Any]
    teacher_use: Callable[[Any], "TeacherUse"]

    @property
    def config_class(self) -> Any:
        """The configuration class, imported now."""
        module, _, name = self.config.partition(":")
        return getattr(importlib.import_module(module), name)


def build_trainer(
    settings: "TrainSettings", reward_funcs: Sequence[Callable[..., Any]], train_dataset: Any, eval_dataset: Any
) -> Any:
    """The trainer of the run's method.

    Args:
        settings: of the run, names resolved.
        reward_funcs: TRL reward functions.
        train_dataset: rows with `prompt` and what the reward functions need.
        eval_dataset: the same, or None.

    Returns:
        `SGOPDTrainer`, or TRL's own: `GRPOTrainer`, `SFTTrainer` with `method: sft` and `seqkd`, `GKDTrainer`.
    """
    from transformers import ProgressCallback
    from trl import get_peft_config, get_quantization_config

    from sg_opd_trl.reporting.progress import CompactProgressCallback

    settings.training.model_init_kwargs = _model_init_kwargs(settings)
    loading = {
        "quantization_config": get_quantization_config(settings.model),
        "peft_config": get_peft_config(settings.model),
    }
    build = METHODS[settings.script.method].build
    trainer = build(settings, list(reward_funcs), train_dataset, eval_dataset, loading)
    if not settings.training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(CompactProgressCallback())
    return trainer


def _build_sg_opd(settings: "TrainSettings", reward_funcs: list, train: Any, test: Any, loading: dict) -> Any:
    from sg_opd_trl.trainer import SGOPDTrainer

    return SGOPDTrainer(
        settings.student, reward_funcs, settings.training, train_dataset=train, eval_dataset=test, **loading
    )


def _sg_opd_use(trainer: Any) -> "TeacherUse":
    from sg_opd_trl.baselines.teacher import TeacherUse

    # Seconds stay 0: the teacher works inside the steps, whose time the run counts anyway.
    reused = 0 if trainer.rollout_cache is None else trainer.rollout_cache.tokens_reused
    return TeacherUse(trainer.teacher.tokens_scored, trainer.teacher.tokens_generated, reused)


def _build_grpo(settings: "TrainSettings", reward_funcs: list, train: Any, test: Any, loading: dict) -> Any:
    from trl import GRPOTrainer

    return GRPOTrainer(
        settings.student, reward_funcs, settings.training, train_dataset=train, eval_dataset=test, **loading
    )


def _no_use(trainer: Any) -> "TeacherUse":
    from sg_opd_trl.baselines.teacher import TeacherUse

    return TeacherUse()


def _build_sft(settings: "TrainSettings", reward_funcs: list, train: Any, test: Any, loading: dict) -> Any:
    from sg_opd_trl.baselines.sft import build_sft_trainer

    return build_sft_trainer(settings.student, settings.training, reward_funcs, train, **loading)


def _build_gkd(settings: "TrainSettings", reward_funcs: list, train: Any, test: Any, loading: dict) -> Any:
    from sg_opd_trl.baselines.gkd import build_gkd_trainer

    return build_gkd_trainer(settings.student, settings.training, train, **loading)


def _baseline_use(trainer: Any) -> "TeacherUse":
    return trainer.teacher_use


METHODS = {
    "sg_opd": Method("sg_opd_trl.config:SGOPDConfig", _build_sg_opd, _sg_opd_use),
    "grpo": Method("trl:GRPOConfig", _build_grpo, _no_use),
    "sft": Method("sg_opd_trl.baselines.config:TeacherSFTConfig", _build_sft, _baseline_use),
    "seqkd": Method("sg_opd_trl.baselines.config:SeqKDConfig", _build_sft, _baseline_use),
    "gkd": Method("sg_opd_trl.baselines.gkd:OnPolicyGKDConfig", _build_gkd, _baseline_use),
}
"""Name -> method; the first is the default."""


def _model_init_kwargs(settings: "TrainSettings") -> dict[str, Any]:
    """The student's loading arguments; those of `model_init_kwargs` win over the model's own fields."""
    given = settings.training.model_init_kwargs
    return {
        "revision": settings.model.model_revision,
        "trust_remote_code": settings.training.trust_remote_code,
        "attn_implementation": settings.model.attn_implementation,
        "dtype": settings.model.dtype,
        **(given if isinstance(given, dict) else {}),
    }
