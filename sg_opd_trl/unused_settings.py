"""Settings of parts that are switched off: without effect, but legal, since a flag may switch a recipe's part off."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .defaults import defaults_of

if TYPE_CHECKING:
    from .config import SGOPDConfig

logger = logging.getLogger(__name__)

_GATE = ("lambda_high", "disagree_mode", "neutral_mode", "gate_dead_zone")
_DRIFT_GATE = ("drift_gate_block", "drift_gate_mean")
_ASYMMETRIC = ("asymmetric_threshold", "asymmetric_forward_kl_scale")
_ANCHOR = (
    *("teacher_sampling_ratio", "teacher_sampling_prompts", "teacher_num_generations", "teacher_sft_phi"),
    *("teacher_sampling_filter_correct", "teacher_sampling_phase1_end_frac", "teacher_sampling_phase2_end_frac"),
    *("teacher_sft_alpha_start", "teacher_sft_alpha_end", "teacher_sft_reduction"),
    *("teacher_max_completion_length", "teacher_rollouts_path"),
)


def unused_settings(config: "SGOPDConfig") -> dict[str, str]:
    """Settings that differ from their default and that nothing of this run reads.

    Returns:
        name -> the setting that switches its part off, with its value.
    """
    defaults = defaults_of(type(config))
    return {
        name: switch
        for switch, names in _switched_off(config)
        for name in names
        if getattr(config, name) != defaults[name]
    }


def _switched_off(config: "SGOPDConfig") -> Iterator[tuple[str, tuple[str, ...]]]:
    gated, mode = config.sign_gated_extrapolation, config.disagree_mode
    if not gated:
        yield "sign_gated_extrapolation=False", (*_GATE, "disagree_interp_beta", "disagree_cell_lambdas")
    else:
        shown = f"disagree_mode={mode!r}"
        yield shown, ("disagree_cell_lambdas",) if mode != "cells" else ("lambda_high",)
        yield shown, ("disagree_interp_beta",) if mode not in ("interp", "interp_lambda") else ()
    if config.stability_tau is None:
        yield "stability_tau=None", ("stability_norm",)
    if config.drift_gate_tau is None:
        yield "drift_gate_tau=None", _DRIFT_GATE
    if config.special_token_mask is None:
        yield "special_token_mask=None", ("special_token_mask_scope",)
    shown = f"distillation_mode={config.distillation_mode!r}"
    yield shown, _ASYMMETRIC if config.distillation_mode != "asymmetric" else ()
    yield shown, ("distillation_topk",) if config.distillation_mode in ("sampled_token", "full_logits") else ()
    if not config.teacher_sampling_enable:
        yield "teacher_sampling_enable=False", _ANCHOR


def warn_of_unused(config: "SGOPDConfig") -> None:
    """Name the settings that have no effect on this run."""
    found = unused_settings(config)
    if found:
        shown = ", ".join(f"{name}={getattr(config, name)!r} ({switch})" for name, switch in found.items())
        logger.warning("These settings have no effect, each because of the one behind it: %s.", shown)
