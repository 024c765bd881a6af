"""Settings of a run -> the trainer of its method."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sg_opd_trl.cli.parsing import TrainSettings


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
    build = {"sg_opd": _sg_opd, "grpo": _grpo, "sft": _sft, "seqkd": _sft, "gkd": _gkd}[settings.script.method]
    trainer = build(
        settings,
        list(reward_funcs),
        train_dataset,
        eval_dataset,
        {
            "quantization_config": get_quantization_config(settings.model),
            "peft_config": get_peft_config(settings.model),
        },
    )
    if not settings.training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(CompactProgressCallback())
    return trainer


def _sg_opd(settings: "TrainSettings", reward_funcs: list, train: Any, test: Any, loading: dict) -> Any:
    from sg_opd_trl.trainer import SGOPDTrainer

    return SGOPDTrainer(
        settings.student, reward_funcs, settings.training, train_dataset=train, eval_dataset=test, **loading
    )


def _grpo(settings: "TrainSettings", reward_funcs: list, train: Any, test: Any, loading: dict) -> Any:
    from trl import GRPOTrainer

    return GRPOTrainer(
        settings.student, reward_funcs, settings.training, train_dataset=train, eval_dataset=test, **loading
    )


def _sft(settings: "TrainSettings", reward_funcs: list, train: Any, test: Any, loading: dict) -> Any:
    from sg_opd_trl.baselines.sft import build_sft_trainer

    return build_sft_trainer(settings.student, settings.training, reward_funcs, train, **loading)


def _gkd(settings: "TrainSettings", reward_funcs: list, train: Any, test: Any, loading: dict) -> Any:
    from sg_opd_trl.baselines.gkd import build_gkd_trainer

    return build_gkd_trainer(settings.student, settings.training, train, **loading)


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
