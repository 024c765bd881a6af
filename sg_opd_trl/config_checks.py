"""Bounds and refused combinations of `SGOPDConfig`, checked before any model is loaded.

Every check returns messages of one form: setting, value, reason, way out.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import SGOPDConfigError
from .rollout_cache.location import wrong_rollouts_path
from .rollout_engine import engine_problems
from .teachers.remote.settings import server_problems

if TYPE_CHECKING:
    from .config import SGOPDConfig

# name -> (choices, what it is)
_CHOICES = {
    "disagree_mode": (
        ("interp", "interp_lambda", "preserve", "grpo", "cells"),
        "It is the equation of conflict tokens (Eq. 7).",
    ),
    "distillation_mode": (
        ("sampled_token", "topk_logits", "full_logits", "asymmetric"),
        "It is the loss of a token.",
    ),
    "neutral_mode": (("base", "conflict"), "It says where tokens without one of the two signs go (Eq. 4)."),
    "gate_signal": (("verifier", "random"), "It says what tells consensus from conflict (Eq. 4)."),
    "stability_norm": (("sequence", "batch", "none"), "It is the scope with a mean weight of one (Eq. 9)."),
    "drift_gate_mean": (("signed", "absolute"), "It is the mean of a block's drift (arXiv:2606.24084)."),
    "special_token_mask_scope": (("first", "all"), "It says which occurrences are masked (arXiv:2603.25562)."),
    "teacher_sampling_prompts": (("reserve", "share"), "It says where teacher prompts come from (Algorithm 1)."),
    "teacher_sft_phi": (("chord", "dft", "none"), "It is the token weight of the anchor (appendix C)."),
    "teacher_sft_reduction": (("token_mean", "seq_mean", "sum"), "It is the reduction of the anchor (Eq. 2)."),
    "vllm_importance_sampling_mode": (
        ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
        "It says what happens to tokens that vLLM and the student see differently.",
    ),
}

# name -> (lower bound, upper bound, lower bound included, upper bound included, what it is)
_RANGES = {
    "lambda_high": (0.0, math.inf, True, False, "It extrapolates from the reference through the teacher (Eq. 5)."),
    "lambda_base": (0.0, math.inf, True, False, "It extrapolates from the reference through the teacher (Eq. 5)."),
    "disagree_interp_beta": (0.0, math.inf, True, False, "It scales the teacher's signal on conflict tokens (Eq. 7)."),
    "gate_dead_zone": (0.0, math.inf, True, False, "It is a magnitude on |log pi_teacher - log pi_student|, in nats."),
    "stability_tau": (0.0, math.inf, False, False, "It is the log-ratio above which tokens are damped (Eq. 9)."),
    "iw_opd_gamma": (0.0, math.inf, True, False, "It is the extra weight of the first token (arXiv:2606.22600)."),
    "drift_gate_tau": (0.0, math.inf, False, False, "It is the decay per nat of drift (arXiv:2606.24084)."),
    "wrong_rollout_advantage": (
        -math.inf,
        0.0,
        False,
        True,
        "It makes the tokens of wrong rollouts less likely (arXiv:2608.31046).",
    ),
    "asymmetric_threshold": (-1.0, 1.0, True, True, "It is a difference of probabilities (AOPD)."),
    "asymmetric_forward_kl_scale": (0.0, math.inf, False, False, "It weighs the forward KL (AOPD)."),
    "teacher_sampling_ratio": (0.0, 1.0, False, False, "It is the share of teacher prompts among all prompts."),
    "teacher_sampling_phase1_end_frac": (0.0, 1.0, True, True, "It is a share of all steps."),
    "teacher_sampling_phase2_end_frac": (0.0, 1.0, True, True, "It is a share of all steps."),
    "teacher_sft_alpha_start": (
        0.0,
        math.inf,
        True,
        False,
        "It weighs the anchor against the student's loss (Eq. 3).",
    ),
    "teacher_sft_alpha_end": (0.0, math.inf, True, False, "It weighs the anchor against the student's loss (Eq. 3)."),
    "beta": (0.0, math.inf, True, False, "It weighs the KL penalty to the initial student."),
    "epsilon": (0.0, math.inf, True, False, "It is how far the probability ratio may fall below 1."),
    "epsilon_high": (0.0, math.inf, True, False, "It is how far the probability ratio may rise above 1."),
    "delta": (0.0, math.inf, False, False, "It bounds the probability ratio of negative advantages."),
    "top_p": (0.0, 1.0, False, True, "It is the share of probability that rollouts are drawn from."),
    "temperature": (0.0, math.inf, False, False, "It divides the logits of every model that is compared."),
    "vllm_importance_sampling_clip_max": (1.0, math.inf, True, False, "The ratio is 1 where vLLM and student agree."),
    "vllm_importance_sampling_clip_min": (0.0, 1.0, True, True, "The ratio is 1 where vLLM and student agree."),
}
_WAY_OUT = {
    "asymmetric_forward_kl_scale": "Set it to None for 1/K.",
    "stability_tau": "Set it to None to switch the weight off.",
    "drift_gate_tau": "Set it to None to switch the gate off.",
    "wrong_rollout_advantage": "Set it to None to leave wrong rollouts to the teacher.",
    "teacher_sampling_ratio": "Set teacher_sampling_enable=False for a run without teacher rollouts.",
    "gate_dead_zone": "Set it to 0 to let every non-zero log-ratio pass.",
}
_OPTIONAL = (
    "stability_tau",
    "drift_gate_tau",
    "wrong_rollout_advantage",
    "asymmetric_forward_kl_scale",
    "epsilon_high",
    "delta",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
)
# name -> (whether None is allowed, what it counts)
_COUNTS = {
    "distillation_topk": (True, "It counts the teacher's likeliest tokens at a position."),
    "teacher_num_generations": (False, "It counts the teacher's rollouts per prompt."),
    "teacher_max_completion_length": (True, "It counts the tokens of the longest teacher rollout."),
    "max_tokens_per_scoring_batch": (True, "It counts the tokens of one scoring forward."),
}


def check_config(config: "SGOPDConfig") -> None:
    """Check all settings of SG-OPD.

    Raises:
        SGOPDConfigError: lists every problem found, one per line.
    """
    problems = [
        *_wrong_choices(config),
        *_out_of_range(config),
        *_wrong_counts(config),
        *_wrong_cells(config),
        *_wrong_phases(config),
        *_wrong_separation(config),
        *wrong_rollouts_path(config),
        *server_problems(config),
        *engine_problems(config),
        *_wrong_blocks(config),
        *_wrong_special_tokens(config),
        *_refused(config),
        *_refused_controls(config),
        *_refused_modes(config),
    ]
    if problems:
        raise SGOPDConfigError("\n".join(problems))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _default(config: "SGOPDConfig", name: str) -> object:
    return type(config).__dataclass_fields__[name].default


def _wrong_choices(config: "SGOPDConfig") -> Iterator[str]:
    for name, (choices, reason) in _CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            shown = ", ".join(map(repr, choices))
            yield f"`{name}` must be one of {shown}, got {value!r}. {reason} Set it to {_default(config, name)!r}."


def _out_of_range(config: "SGOPDConfig") -> Iterator[str]:
    for name, (low, high, low_in, high_in, reason) in _RANGES.items():
        value = getattr(config, name)
        if value is None and name in _OPTIONAL:
            continue
        inside = (
            _is_number(value)
            and (value > low or (low_in and value == low))
            and (value < high or (high_in and value == high))
        )
        if not inside:
            interval = f"{'[' if low_in else '('}{low:g}, {high:g}{']' if high_in else ')'}"
            way_out = _WAY_OUT.get(name, f"Set it to {_default(config, name)}, the default.")
            yield f"`{name}` must be a number in {interval}, got {value!r}. {reason} {way_out}"


def _wrong_counts(config: "SGOPDConfig") -> Iterator[str]:
    for name, (optional, reason) in _COUNTS.items():
        value = getattr(config, name)
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            way_out = f"Set it to {_default(config, name)}, the default."
            yield f"`{name}` must be a whole number of at least 1, got {value!r}. {reason} {way_out}"


def _wrong_cells(config: "SGOPDConfig") -> Iterator[str]:
    cells = config.disagree_cell_lambdas
    valid = isinstance(cells, (list, tuple)) and len(cells) == 4
    if not valid or not all(_is_number(value) and 0 <= value < math.inf for value in cells):
        yield (
            f"`disagree_cell_lambdas` must be four finite numbers >= 0, got {cells!r}. They are the lambdas of the "
            "sign pairs (verifier, teacher) = ++, +-, -+, --. Set for example [1.5, 1.0, 1.0, 1.5]."
        )


def _wrong_phases(config: "SGOPDConfig") -> Iterator[str]:
    first, second = config.teacher_sampling_phase1_end_frac, config.teacher_sampling_phase2_end_frac
    if _is_number(first) and _is_number(second) and first > second:
        yield (
            f"`teacher_sampling_phase1_end_frac` must not exceed `teacher_sampling_phase2_end_frac`, got {first} and "
            f"{second}. Phase 2 anneals the anchor after phase 1. Set the second to at least {first}."
        )


def _wrong_separation(config: "SGOPDConfig") -> Iterator[str]:
    if not config.teacher_sampling_time_separated:
        return
    start = "`teacher_sampling_time_separated=True` is not supported with"
    if not config.teacher_sampling_enable:
        yield f"{start} teacher_sampling_enable=False: there is no anchor. Set teacher_sampling_enable=True."
    if config.teacher_sampling_prompts == "share":
        yield (
            f"{start} teacher_sampling_prompts='share': in stage 1 there are no student prompts to share. Set "
            "teacher_sampling_prompts='reserve'."
        )
    for name in ("teacher_sampling_phase1_end_frac", "teacher_sft_alpha_start"):
        if getattr(config, name) == 0:
            yield f"{start} {name}=0: stage 1 would train nothing. Set {name} above 0."


def _wrong_blocks(config: "SGOPDConfig") -> Iterator[str]:
    block: object = config.drift_gate_block
    size = int(block) if isinstance(block, str) and block.isascii() and block.isdigit() else block
    if block != "newline" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        yield (
            f"`drift_gate_block` must be 'newline' or a whole number of at least 1, got {block!r}. It is what the "
            "drift is averaged over (arXiv:2606.24084). Set it to 64, the default."
        )


def _wrong_special_tokens(config: "SGOPDConfig") -> Iterator[str]:
    strings: object = config.special_token_mask
    if strings is None:
        return
    listed = isinstance(strings, (list, tuple)) and bool(strings)
    if not listed or not all(isinstance(string, str) and string for string in strings):  # type: ignore[attr-defined]
        yield (
            f"`special_token_mask` must be a list of at least one non-empty string, got {strings!r}. It names the "
            "tokens that leave the loss. Set it to None to mask nothing."
        )


def _refused_controls(config: "SGOPDConfig") -> Iterator[str]:
    if config.gate_signal == "random" and not config.sign_gated_extrapolation:
        yield (
            "`gate_signal='random'` is not supported with sign_gated_extrapolation=False: without the gate there is "
            "no consensus to deal out. Set sign_gated_extrapolation=True, or gate_signal='verifier'."
        )


def _refused_modes(config: "SGOPDConfig") -> Iterator[str]:
    mode = config.distillation_mode
    if mode == "sampled_token":
        return
    if config.beta != 0:
        yield (
            f"`beta={config.beta}` is not supported with distillation_mode={mode!r}: TRL's KL penalty is of the "
            "sampled tokens, whose gradient gives way to that of the distributions. Set beta=0, or pull towards the "
            "reference with a lambda below 1."
        )
    if isinstance(config.delta, (int, float)) and config.delta < 1:
        yield (
            f"`delta={config.delta}` is not supported with distillation_mode={mode!r}: it would scale losses whose "
            "ratio is 1. Set delta to at least 1, or to None."
        )
    if mode != "asymmetric" and config.sign_gated_extrapolation and config.disagree_mode == "grpo":
        yield (
            f"`disagree_mode='grpo'` is not supported with distillation_mode={mode!r}: the verifier's advantage is of "
            "one token, it names no distribution to match. Set disagree_mode='interp', or "
            "distillation_mode='sampled_token'."
        )


def _refused(config: "SGOPDConfig") -> Iterator[str]:
    if config.loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo"):
        yield (
            f"`loss_type={config.loss_type!r}` is not supported: its weights were derived for one advantage per "
            "sequence, SG-OPD has one per token. Set loss_type to 'grpo', 'bnpo', 'dr_grpo' or 'dapo'."
        )
    if config.importance_sampling_level != "token":
        yield (
            f"`importance_sampling_level={config.importance_sampling_level!r}` is not supported: one ratio per "
            "sequence would mix tokens that the gate treats differently. Set importance_sampling_level='token'."
        )
    if config.off_policy_mask_threshold is not None:
        yield (
            f"`off_policy_mask_threshold={config.off_policy_mask_threshold}` is not supported: it drops whole "
            "sequences by the sign of one advantage. Set it to None; the rollout importance correction remains."
        )
    if config.multi_objective_aggregation != "sum_then_normalize":
        yield (
            f"`multi_objective_aggregation={config.multi_objective_aggregation!r}` is not supported: the teacher's "
            "advantages replace the mixed reward. Set multi_objective_aggregation='sum_then_normalize'."
        )
    yield from _refused_groups(config)


def _refused_groups(config: "SGOPDConfig") -> Iterator[str]:
    size = config.num_generations
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        yield (
            f"`num_generations={size!r}` is not supported: a group of one has no verifier advantage, and TRL takes "
            "none. Set num_generations to at least 2."
        )
    if config.scale_rewards not in ("group", "batch", "none", True, False):
        yield (
            f"`scale_rewards` must be one of 'group', 'batch', 'none', got {config.scale_rewards!r}. It scales the "
            "verifier's advantage. Set it to 'group'."
        )
