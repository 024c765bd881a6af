"""`SGOPDConfig`: the settings of SG-OPD on top of `trl.GRPOConfig`.

The fields live in `config_fields`, one file per group; each one's meaning is written once, in its `help`, with its
source. Bounds and refused combinations live in `config_checks`.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from trl import GRPOConfig

from .core import RouteReferences, routes_need_reference
from .errors import SGOPDConfigError
from .teacher_sampling.stored.location import wrong_rollouts_path
from .teachers.urls import MAX_RETRIES, TIMEOUT, server_problems
from .teachers.urls import parsed as parsed_servers

logger = logging.getLogger(__name__)


def defaults_of(config_class: type) -> dict[str, Any]:
    """The default of every field of a dataclass; `MISSING` where it has none."""
    return {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(config_class)
    }


@dataclass
class TeacherFields:
    """Who teaches, and against what the teacher is extrapolated."""

    teacher_model_name_or_path: dict | str | None = field(
        default=None,
        metadata={
            "help": "Teacher model, a local folder or a Hub id, unless `teacher_model` is given to the trainer. A "
            "mapping from names to these gives several teachers: each row of the data set is taught by the one that "
            "its column `teacher_id` names (G-OPD, arXiv:2602.12125). A PEFT adapter on the base of a student that is "
            "trained with LoRA shares the student's weights."
        },
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `teacher_model_name_or_path`, of all of them."}
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `from_pretrained` of the teacher, of all of them. The student's dtype and "
            "attention implementation are used unless given here (our choice). With `teacher_model_server_url` only "
            "`dtype`, for `sg-opd serve-teacher`."
        },
    )
    teacher_model_server_url: dict | str | list | None = field(
        default=None,
        metadata={
            "help": "URL of a vLLM server that has the teacher, such as http://localhost:8000; a list of URLs for "
            "replicas of it; or a mapping from names in the column `teacher_id` to either. "
            "`teacher_model_name_or_path` then says which model the server must have. `sg-opd serve-teacher` starts "
            "one (our choice)."
        },
    )
    teacher_request_timeout: float = field(
        default=TIMEOUT,
        metadata={
            "help": "Seconds that a request to a teacher server may take, its retries included, before the run ends "
            "with an error (our choice)."
        },
    )
    teacher_max_retries: int = field(
        default=MAX_RETRIES,
        metadata={
            "help": "How often a request that failed on all replicas of a teacher is sent again, after 0.5, 2, 8, 32, "
            "128 ... seconds as far as `teacher_request_timeout` allows (our choice)."
        },
    )

    reference_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Reference model of the extrapolation. Default: the student's initial weights (paper, section 3). "
            "The teacher's base model before RL gives G-OPD's reward correction (arXiv:2602.12125)."
        },
    )
    reference_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `reference_model_name_or_path`."}
    )
    reference_model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `from_pretrained` of the reference."}
    )


@dataclass
class GateFields:
    """The sign-consistency gate and its routes."""

    sign_gated_extrapolation: bool = field(
        default=True,
        metadata={
            "help": "Whether the verifier gates the extrapolation per token (paper, Eq. 4-8). Off: every token gets "
            "A(lambda_base); lambda_base 1 is OPD, 1.25 is ExOPD."
        },
    )
    lambda_high: float = field(
        default=1.8, metadata={"help": "Extrapolation on consensus tokens (paper, Eq. 6 and appendix C: 1.8)."}
    )
    lambda_base: float = field(
        default=1.0,
        metadata={"help": "Extrapolation on neutral tokens, and on all tokens without the gate (paper, Algorithm 1)."},
    )
    disagree_mode: str = field(
        default="interp",
        metadata={
            "help": "Advantage of conflict tokens: 'interp' beta*a2 (paper, Eq. 7), 'interp_lambda' A(beta) (our "
            "choice, the other reading of 'interp'), 'preserve' A(lambda_base), 'grpo' the verifier's advantage, "
            "'cells' A(lambda) with one lambda per pair of signs (paper, appendix H)."
        },
    )
    disagree_interp_beta: float = field(
        default=1.0, metadata={"help": "beta of 'interp' and 'interp_lambda' (paper, Eq. 7; best run: 1.0)."}
    )
    disagree_cell_lambdas: list[float] = field(
        default_factory=lambda: [1.5, 1.0, 1.0, 1.5],
        metadata={
            "help": "Lambdas of 'cells' for the signs (verifier, teacher) = ++, +-, -+, -- (our choice; the paper's "
            "appendix H prints none)."
        },
    )
    neutral_mode: str = field(
        default="base",
        metadata={
            "help": "Neutral tokens (one of the two signals is zero): 'base' gives A(lambda_base) (paper, Figure 7), "
            "'conflict' treats them as conflict tokens (Eq. 4 to the letter)."
        },
    )
    gate_dead_zone: float = field(
        default=1e-4,
        metadata={
            "help": "Teacher log-ratios up to this absolute value, in nats, count as zero (our choice). 1e-4 removes "
            "float32 noise; about 0.03 removes the sign flips of bfloat16 models, at the price of more neutral tokens."
        },
    )
    verifier_reward_func: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function whose verdicts (1, 0 or None) gate the teacher. Default: the first "
            "(our choice)."
        },
    )
    gate_signal: str = field(
        default="verifier",
        metadata={
            "help": "What tells consensus from conflict: the 'verifier' (paper, Eq. 4), or 'random', a control (our "
            "choice): as many consensus tokens in each micro-batch, dealt out at random among those that are not "
            "neutral."
        },
    )
    wrong_rollout_advantage: float | None = field(
        default=None,
        metadata={
            "help": "Advantage of every token of a wrong rollout in place of the teacher's, 0 or below, e.g. -1: a "
            "control (arXiv:2608.31046). Such rollouts are not scored by the teacher. None leaves them to the teacher "
            "(our choice)."
        },
    )


@dataclass
class WeightFields:
    """Non-negative weights of tokens, and tokens that count for nothing."""

    stability_tau: float | None = field(
        default=5.0,
        metadata={
            "help": "tau of the stability weight min(1, tau/abs(a2)) (paper, Eq. 9, which prints no value: 5.0 is our "
            "choice); of the losses that match distributions too. None switches the weight off, as the methods of "
            "other papers have it."
        },
    )
    stability_norm: str = field(
        default="sequence",
        metadata={
            "help": "Scope over which the stability weight has mean one: 'sequence' (our choice), 'batch' (the global "
            "generation batch, one more policy forward) or 'none'."
        },
    )
    iw_opd_gamma: float = field(
        default=0.0,
        metadata={
            "help": "gamma of the prefix importance weight, which runs from 1 + gamma at the first token down to 1 as "
            "the prefix uses up the rollout's abs(a2) (IW-OPD, arXiv:2606.22600, whose value is 0.5). 0 switches the "
            "weight off (our choice)."
        },
    )
    drift_gate_tau: float | None = field(
        default=None,
        metadata={
            "help": "tau of the drift gate exp(-tau*abs(mean drift of a block)) (arXiv:2606.24084, known at second "
            "hand and without a value: try 1, 5, 20). Needs more than one update per rollout. None switches the gate "
            "off (our choice)."
        },
    )
    drift_gate_block: str = field(
        default="64",
        metadata={
            "help": "Blocks of the drift gate: a number of tokens, or 'newline' for spans that end with each token "
            "with a newline in it (both arXiv:2606.24084)."
        },
    )
    drift_gate_mean: str = field(
        default="signed",
        metadata={
            "help": "Mean of the drift over a block: 'signed' (arXiv:2606.24084), in which opposite drifts cancel, or "
            "'absolute' (our choice)."
        },
    )
    special_token_mask: list[str] | None = field(
        default=None,
        metadata={
            "help": "Strings whose tokens leave the student's loss and its denominators, for teachers with another "
            "chat template, e.g. '<think>' and '<|im_end|>' (arXiv:2603.25562). Each token of a string counts on its "
            "own, as the tokenizer writes it at the start of a text. None masks nothing (our choice)."
        },
    )
    special_token_mask_scope: str = field(
        default="first",
        metadata={
            "help": "Which occurrences `special_token_mask` leaves out: the 'first' of each token in each rollout "
            "(arXiv:2603.25562, its code), or 'all' (our choice)."
        },
    )

    @property
    def drift_block_size(self) -> int | None:
        """Tokens of one block of the drift gate; None for spans that end with a newline."""
        return None if self.drift_gate_block == "newline" else int(self.drift_gate_block)


@dataclass
class ObjectiveFields:
    """What is distilled at each token."""

    distillation_mode: str = field(
        default="sampled_token",
        metadata={
            "help": "Loss of a token: 'sampled_token' (policy gradient with the teacher's log-ratio of the sampled "
            "token; paper, Eq. 10), 'topk_logits' (reverse KL on the teacher's top-K tokens, renormalised there; "
            "arXiv:2603.25562), 'full_logits' (reverse KL over the whole vocabulary, to teacher^lambda * "
            "reference^(1-lambda); arXiv:2602.12125) or 'asymmetric' (AOPD: forward KL on the teacher's top-K tokens "
            "where the teacher likes the sampled token less, policy gradient elsewhere)."
        },
    )
    distillation_topk: int | None = field(
        default=None,
        metadata={
            "help": "K of 'topk_logits' and 'asymmetric', the teacher's likeliest tokens at each position. Default: "
            "32 (arXiv:2603.25562), and 10 with 'asymmetric' (AOPD)."
        },
    )
    asymmetric_threshold: float = field(
        default=0.0,
        metadata={
            "help": "Probability of the teacher minus that of the student up to which 'asymmetric' takes the forward "
            "KL (AOPD, arXiv:2605.06387: 0). -1 is the policy gradient on all tokens but certain ones, 1 the forward "
            "KL on all."
        },
    )
    asymmetric_forward_kl_scale: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the forward KL of 'asymmetric'. Default: 1/K (AOPD, arXiv:2605.06387, at second hand)."
        },
    )


@dataclass
class AnchorFields:
    """Phased teacher sampling."""

    teacher_sampling_enable: bool = field(
        default=True,
        metadata={"help": "Whether verified teacher rollouts join as a cross-entropy anchor (paper, Eq. 2-3)."},
    )
    teacher_sampling_ratio: float = field(
        default=0.125, metadata={"help": "rho: share of teacher prompts among all prompts (paper, appendix H: 0.125)."}
    )
    teacher_sampling_prompts: str = field(
        default="reserve",
        metadata={
            "help": "Where teacher prompts come from: 'reserve' draws them from their own permutation of the training "
            "set (paper, Algorithm 1), 'share' takes them from the student's prompts of the same step."
        },
    )
    teacher_num_generations: int = field(
        default=1, metadata={"help": "Teacher rollouts per teacher prompt (paper, Eq. 2 is singular: 1)."}
    )
    teacher_sampling_filter_correct: bool = field(
        default=True, metadata={"help": "Keep only teacher rollouts the verifier judges right (paper, section 5.3)."}
    )
    teacher_sampling_phase1_end_frac: float = field(
        default=0.30,
        metadata={"help": "End of phase 1 (constant alpha) as a share of all steps (paper: step 30 of 100)."},
    )
    teacher_sampling_phase2_end_frac: float = field(
        default=0.35,
        metadata={"help": "End of phase 2 (cosine to alpha_end), then no anchor (paper: step 35 of 100)."},
    )
    teacher_sampling_time_separated: bool = field(
        default=False,
        metadata={
            "help": "Separate anchor and student in time: only the anchor trains until the end of phase 1, without "
            "any student rollout, only the student's loss after it; as many teacher rollouts as otherwise (paper, "
            "Table 3e, TimeSep; the boundary is our choice)."
        },
    )
    teacher_sft_alpha_start: float = field(
        default=0.2, metadata={"help": "alpha of the anchor in phase 1 (paper, Eq. 3; 0.2 is printed in Table 3)."}
    )
    teacher_sft_alpha_end: float = field(
        default=0.0, metadata={"help": "alpha at the end of phase 2 (paper, Eq. 3 prints no value: our choice)."}
    )
    teacher_sft_phi: str = field(
        default="chord",
        metadata={
            "help": "Token weight of the anchor: 'chord' p(1-p) (arXiv:2508.11408; paper, appendix C), 'dft' p "
            "(arXiv:2508.05629) or 'none'. Detached, unit mean per rollout."
        },
    )
    teacher_sft_reduction: str = field(
        default="token_mean",
        metadata={
            "help": "Reduction of the anchor over the step's kept teacher rollouts: 'token_mean' (our choice), "
            "'seq_mean' or 'sum' (paper, Eq. 2 to the letter)."
        },
    )
    teacher_max_completion_length: int | None = field(
        default=None,
        metadata={"help": "Longest teacher rollout in tokens. Default: `max_completion_length` (paper: 14336)."},
    )
    teacher_rollouts_path: str | None = field(
        default=None,
        metadata={
            "help": "Where teacher rollouts are kept and read instead of generated again: a local folder, which the "
            "run creates and adds to, or the id of a Hub data set (`user/name`, `user/name@revision`), which is only "
            "read. Default: every run generates its own (our choice)."
        },
    )


@dataclass
class RunningFields:
    """How a run is carried out."""

    max_tokens_per_scoring_batch: int | None = field(
        default=None,
        metadata={
            "help": "Token budget, padding included, of one teacher or reference forward. Default: what one training "
            "micro-batch of full length holds (our choice)."
        },
    )
    eval_with_teacher: bool = field(
        default=False,
        metadata={"help": "Score the evaluation rollouts with the teacher too. Off: TRL's metrics only (our choice)."},
    )


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


def engine_problems(config: Any, longest_prompt: int = 1, source: str = "a prompt of one token") -> Iterator[str]:
    """What is wrong with a colocated engine's context: a prompt with a full completion must fit in.

    Args:
        config: of the run.
        longest_prompt: in tokens.
        source: where that length comes from, for the message.
    """
    # Other methods have no rollouts; in server mode the context is the server's own.
    if not getattr(config, "use_vllm", False) or config.vllm_mode != "colocate":
        return
    room, needed = config.vllm_max_model_length, longest_prompt + (config.max_completion_length or 0)
    if room is not None and needed > room:
        yield (
            f"`vllm_max_model_length` must be at least {needed}, got {room}: {source} and `max_completion_length` "
            f"take {needed} tokens. vLLM would cut completions short and refuse longer prompts. Raise it, or lower "
            "`max_completion_length` or `max_prompt_tokens`."
        )


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


@dataclass
class SGOPDConfig(RunningFields, AnchorFields, ObjectiveFields, WeightFields, GateFields, TeacherFields, GRPOConfig):
    """Configuration of `SGOPDTrainer`.

    All of `trl.GRPOConfig`, with the defaults of the paper's recipe (arXiv:2606.09304, appendix C), plus the teacher,
    the reference, the sign-consistency gate (Eq. 4-8), the stability weight (Eq. 9) and phased teacher sampling
    (Eq. 2-3).

    Raises:
        SGOPDConfigError: a value out of range or NaN, or a combination that is not supported; all of them are listed.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]  # TRL's is not a ClassVar
        *GRPOConfig._VALID_DICT_FIELDS,
        "teacher_model_name_or_path",
        "teacher_model_init_kwargs",
        "reference_model_init_kwargs",
    ]

    # --- TRL's own fields, with the paper's values ---------------------------------------------------------------
    learning_rate: float = field(
        default=1e-5, metadata={"help": "Initial learning rate of AdamW. Paper, appendix C: 1e-5."}
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Learning-rate schedule. Paper, appendix C: constant, no warm-up."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW. Paper, appendix C: 0.01."})
    loss_type: str = field(
        default="grpo",
        metadata={
            "help": "Reduction of the per-token loss: 'grpo' (mean over sequences of the mean over tokens; paper, "
            "Eq. 10), 'bnpo', 'dr_grpo' or 'dapo'."
        },
    )
    delta: float | None = field(
        default=3.0,
        metadata={"help": "Upper bound of the probability ratio (dual clip). The paper's code base uses 3.0."},
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={
            "help": "Rollout importance correction, see `trl.GRPOConfig`. Paper, appendix C: per token, truncated."
        },
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=5.0, metadata={"help": "Cap of the rollout importance ratio. Paper, appendix C: 5.0, no lower bound."}
    )

    def __post_init__(self) -> None:
        self.teacher_model_server_url = parsed_servers(self.teacher_model_server_url)
        check_config(self)
        super().__post_init__()

    @property
    def needs_reference(self) -> bool:
        """Whether any route has a lambda other than 1, so that a reference model is used at all."""
        return any(self.open_routes)

    @property
    def open_routes(self) -> RouteReferences:
        """Whether consensus, conflict and neutral tokens use the reference (design: only used forwards)."""
        return routes_need_reference(sign_gated=self.sign_gated_extrapolation, **self.route_settings)

    @property
    def route_settings(self) -> dict[str, Any]:
        """What the routing functions of `core` take beside their tensors."""
        return {
            "lambda_high": self.lambda_high,
            "lambda_base": self.lambda_base,
            "disagree_mode": self.disagree_mode,
            "disagree_interp_beta": self.disagree_interp_beta,
            "neutral_mode": self.neutral_mode,
            "cell_lambdas": tuple(self.disagree_cell_lambdas),
        }

    @property
    def support_size(self) -> int:
        """K, the teacher's likeliest tokens at a position: as set, or as the mode's paper has it."""
        return self.distillation_topk or (10 if self.distillation_mode == "asymmetric" else 32)

    @property
    def teacher_completion_length(self) -> int:
        """Longest teacher rollout in tokens."""
        return self.teacher_max_completion_length or self.max_completion_length or 0
