"""`SGOPDConfig`: the settings of SG-OPD on top of `trl.GRPOConfig`, each written once.

A setting's default, bounds or choices, meaning, source, and what leaves it without effect stand in one place, its
field. What concerns several settings at once is a function below, one for each idea. All problems are collected before
any is raised, so that a recipe is mended in one go.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from trl import GRPOConfig, ModelConfig

from .core import (
    ANCHOR_REDUCTIONS,
    ANCHOR_WEIGHTS,
    COEF_SCHEDULES,
    DISAGREE_MODES,
    NEUTRAL_MODES,
    RouteReferences,
    disagree_mode_help,
    disagree_modes_using,
    modes_without_distribution,
    modes_without_forward_kl,
    routes_need_reference,
)
from .errors import SGOPDConfigError
from .precision import precision_problems, settle_bf16
from .run_folder import FolderFields, folder_problems
from .setting import AUTO, ON, NumberOrWord, Rule, Setting, declared, setting, unused, value_problems
from .teachers.urls import MAX_RETRIES, RETRIES_RULE, TIMEOUT, TIMEOUT_RULE, server_problems
from .teachers.urls import parsed as parsed_servers
from .verifiers.bounded import RewardFields

logger = logging.getLogger(__name__)

DISTILLATION_MODES = ("sampled_token", "topk_logits", "full_logits", "asymmetric")
"""What is distilled at each token; `objectives` has a class for each."""

# The parts that several settings belong to, for their `used_if`. A part that hangs on another names its own switch
# alone: `unused_settings` follows the chain up to what was turned off.
_GATE = {"sign_gated_extrapolation": ON}
_ANCHOR = {"teacher_sampling_enable": ON}
_DRIFT_GATE = {"drift_gate_tau": ON}
_ASYMMETRIC = {"distillation_mode": ("asymmetric",)}
_SERVER = {"teacher_model_server_url": ON}
_REFERENCE = {"needs_reference": (True,)}
_MOVING_COEFS = {"coefs_move": (True,)}

_COEFS = ("task_reward_coef", "teacher_kl_coef")

# What TRL leaves unchecked in fields of its own, and our losses could not take.
_TRL_RULES: Mapping[str, Rule] = {
    "beta": Rule(at_least=0, why="It weighs the KL penalty to the initial student."),
    "epsilon": Rule(at_least=0, why="It is how far the probability ratio may fall below 1."),
    "epsilon_high": Rule(at_least=0, why="It is how far the probability ratio may rise above 1."),
    "top_p": Rule(above=0, at_most=1, why="It is the share of probability that rollouts are drawn from."),
    "temperature": Rule(above=0, why="It divides the logits of every model that is compared."),
    "vllm_importance_sampling_clip_min": Rule(
        at_least=0, at_most=1, why="The ratio is 1 where vLLM and student agree."
    ),
}


@dataclass
class SGOPDConfig(RewardFields, FolderFields, GRPOConfig):
    """Configuration of `SGOPDTrainer`.

    All of `trl.GRPOConfig`, with the defaults of the paper's recipe (arXiv:2606.09304, appendix C), plus the teacher,
    the reference, the sign-consistency gate (Eq. 4-8), the stability weight (Eq. 9) and phased teacher sampling
    (Eq. 2-3).

    Raises:
        SGOPDConfigError: a value out of range or NaN, or a combination that is not supported; all of them are listed.
    """

    # TRL parses the JSON that a command line has for these.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]  # TRL's is not a ClassVar
        *GRPOConfig._VALID_DICT_FIELDS,
        "teacher_model_name_or_path",
        "teacher_model_init_kwargs",
        "reference_model_init_kwargs",
    ]

    # --- Teacher: who teaches ------------------------------------------------------------------------------------
    teacher_model_name_or_path: dict | str | None = setting(
        None,
        group="Teacher",
        help="Teacher model, a local folder or a Hub id, unless `teacher_model` is given to the trainer. A mapping "
        "from names to these gives several teachers: each row of the data set is taught by the one that its column "
        "`teacher_id` names (G-OPD, arXiv:2602.12125). A PEFT adapter on the base of a student that is trained with "
        "LoRA shares the student's weights.",
    )
    teacher_model_revision: str | None = setting(
        None, help="Branch, tag or commit of `teacher_model_name_or_path`, of all of them."
    )
    teacher_model_init_kwargs: dict | str | None = setting(
        None,
        help="Keyword arguments for `from_pretrained` of the teacher, of all of them. The student's dtype and "
        "attention implementation are used unless given here (our choice). With `teacher_model_server_url` only "
        "`dtype`, for `sg-opd serve-teacher`.",
    )
    teacher_offload: bool = setting(
        False,
        help="Keep the weights of local teachers in host memory, and bring one of them to the device for as long as "
        "it scores or writes: several take turns, and there is room for one. Costs a copy of its weights for each "
        "generation batch and each writing of teacher rollouts (our choice).",
    )
    teacher_model_server_url: dict | str | list | None = setting(
        None,
        off=None,
        help="URL of a vLLM server that has the teacher, such as http://localhost:8000; a list of URLs for replicas "
        "of it; or a mapping from names in the column `teacher_id` to either. `teacher_model_name_or_path` then says "
        "which model the server must have. `sg-opd serve-teacher` starts one (our choice).",
    )
    teacher_request_timeout: float = setting(
        TIMEOUT,
        rule=TIMEOUT_RULE,
        used_if=_SERVER,
        help="Seconds that a request to a teacher server may take, its retries included, before the run ends with an "
        "error (our choice).",
    )
    teacher_max_retries: int = setting(
        MAX_RETRIES,
        rule=RETRIES_RULE,
        used_if=_SERVER,
        help="How often a request that failed on all replicas of a teacher is sent again, after 0.5, 2, 8, 32, 128 "
        "... seconds as far as `teacher_request_timeout` allows (our choice).",
    )

    # --- Reference: against what the teacher is extrapolated -----------------------------------------------------
    reference_model_name_or_path: str | None = setting(
        None,
        group="Reference",
        used_if=_REFERENCE,
        help="Reference model of the extrapolation. Default: the student's initial weights (paper, section 3). The "
        "teacher's base model before RL gives G-OPD's reward correction (arXiv:2602.12125).",
    )
    reference_model_revision: str | None = setting(
        None, used_if=_REFERENCE, help="Branch, tag or commit of `reference_model_name_or_path`."
    )
    reference_model_init_kwargs: dict | str | None = setting(
        None, used_if=_REFERENCE, help="Keyword arguments for `from_pretrained` of the reference."
    )

    # --- Gate: where the verifier agrees with the teacher, where it does not, and the route of each --------------
    sign_gated_extrapolation: bool = setting(
        True,
        group="Gate",
        off=False,
        help="Whether the verifier gates the extrapolation per token (paper, Eq. 4-8). Off: every token gets "
        "A(lambda_base); lambda_base 1 is OPD, 1.25 is ExOPD.",
    )
    lambda_high: float = setting(
        1.8,
        at_least=0,
        why="It extrapolates from the reference through the teacher (Eq. 5).",
        used_if={"disagree_mode": disagree_modes_using("lambda_high")},
        help="Extrapolation on consensus tokens (paper, Eq. 6 and appendix C: 1.8).",
    )
    lambda_base: float = setting(
        1.0,
        at_least=0,
        why="It extrapolates from the reference through the teacher (Eq. 5).",
        used_if=(
            {"sign_gated_extrapolation": (False,)},
            {"disagree_mode": disagree_modes_using("lambda_base")},
            {"neutral_mode": ("base",)},
        ),
        help="Extrapolation on neutral tokens (unless `neutral_mode` is 'conflict'), on conflict tokens with "
        f"`disagree_mode` {' or '.join(map(repr, disagree_modes_using('lambda_base')))}, and on all tokens without "
        "the gate (paper, Algorithm 1).",
    )
    disagree_mode: str = setting(
        "interp",
        choices=DISAGREE_MODES,
        why="It is the equation of conflict tokens (Eq. 7).",
        used_if=_GATE,
        help=f"Advantage of conflict tokens: {disagree_mode_help()}.",
    )
    disagree_interp_beta: float = setting(
        1.0,
        at_least=0,
        why="It scales the teacher's signal on conflict tokens (Eq. 7).",
        used_if={"disagree_mode": disagree_modes_using("disagree_interp_beta")},
        help="beta of 'interp' and 'interp_lambda' (paper, Eq. 7; best run: 1.0).",
    )
    disagree_cell_lambdas: list[float] = setting(
        [1.5, 1.0, 1.0, 1.5],  # four of them, which `_wrong_cells` checks
        used_if={"disagree_mode": disagree_modes_using("cell_lambdas")},
        help="Lambdas of 'cells' for the signs (verifier, teacher) = ++, +-, -+, -- (our choice; the paper's appendix "
        "H prints none).",
    )
    neutral_mode: str = setting(
        "base",
        choices=NEUTRAL_MODES,
        why="It says where tokens without one of the two signs go (Eq. 4).",
        used_if=_GATE,
        help="Neutral tokens (one of the two signals is zero): 'base' gives A(lambda_base) (paper, Figure 7), "
        "'conflict' treats them as conflict tokens (Eq. 4 to the letter).",
    )
    gate_dead_zone: NumberOrWord = setting(
        1e-4,
        at_least=0,
        words=(AUTO,),
        why="It is a magnitude on |log pi_teacher - log pi_student|, in nats.",
        way_out="Set it to 0 to let every non-zero log-ratio pass.",
        used_if=_GATE,
        help="Teacher log-ratios up to this absolute value, in nats, count as zero (our choice). 1e-4 is above the "
        "rounding noise between a student and its frozen copies, in bfloat16 too. 'auto' measures the noise of this "
        "run before its first step and takes what 95 per cent of it stays below, at least 1e-4; a larger "
        "one makes many more tokens neutral (docs/methods.md has both).",
    )
    # Used without the gate too: the anchor's filter and the metrics of evaluation ask the verifier.
    verifier_reward_func: str | None = setting(
        None,
        help="Name of the reward function whose verdicts (1, 0 or None) gate the teacher. Default: the first (our "
        "choice).",
    )
    gate_signal: str = setting(
        "verifier",
        choices=("verifier", "random"),
        why="It says what tells consensus from conflict (Eq. 4).",
        used_if=_GATE,
        help="What tells consensus from conflict: the 'verifier' (paper, Eq. 4), or 'random', a control (our choice): "
        "as many consensus tokens in each micro-batch, dealt out at random among those that are not neutral.",
    )
    # Not part of the gate either: such rollouts lose the teacher's advantage, however that is routed.
    wrong_rollout_advantage: float | None = setting(
        None,
        at_most=0,
        off=None,
        why="It makes the tokens of wrong rollouts less likely (arXiv:2608.31046).",
        way_out="Set it to None to leave wrong rollouts to the teacher.",
        help="Advantage of every token of a wrong rollout in place of the teacher's, 0 or below, e.g. -1: a control "
        "(arXiv:2608.31046). Such rollouts are not scored by the teacher. None leaves them to the teacher (our "
        "choice).",
    )

    # --- Token weights: non-negative, and tokens that count for nothing ------------------------------------------
    stability_tau: float | None = setting(
        5.0,
        group="Token weights",
        above=0,
        off=None,
        why="It is the log-ratio above which tokens are damped (Eq. 9).",
        way_out="Set it to None to switch the weight off.",
        help="tau of the stability weight min(1, tau/abs(a2)) (paper, Eq. 9, which prints no value: 5.0 is our "
        "choice); of the losses that match distributions too. None switches the weight off, as the methods of other "
        "papers have it.",
    )
    stability_norm: str = setting(
        "sequence",
        choices=("sequence", "batch", "none"),
        why="It is the scope with a mean weight of one (Eq. 9).",
        used_if={"stability_tau": ON},
        help="Scope over which the stability weight has mean one: 'sequence' (our choice), 'batch' (the global "
        "generation batch, one more policy forward) or 'none'.",
    )
    iw_opd_gamma: float = setting(
        0.0,
        at_least=0,
        off=0.0,
        why="It is the extra weight of the first token (arXiv:2606.22600).",
        help="gamma of the prefix importance weight, which runs from 1 + gamma at the first token down to 1 as the "
        "prefix uses up the rollout's abs(a2) (IW-OPD, arXiv:2606.22600, whose value is 0.5). 0 switches the weight "
        "off (our choice).",
    )
    drift_gate_tau: float | None = setting(
        None,
        above=0,
        off=None,
        why="It is the decay per nat of drift (arXiv:2606.24084).",
        way_out="Set it to None to switch the gate off.",
        help="tau of the drift gate exp(-tau*abs(mean drift of a block)) (arXiv:2606.24084, known at second hand and "
        "without a value: try 1, 5, 20). Needs more than one update per rollout. None switches the gate off (our "
        "choice).",
    )
    drift_gate_block: str = setting(
        "64",  # a number or a word, which `_wrong_blocks` checks
        used_if=_DRIFT_GATE,
        help="Blocks of the drift gate: a number of tokens, or 'newline' for spans that end with each token with a "
        "newline in it (both arXiv:2606.24084).",
    )
    drift_gate_mean: str = setting(
        "signed",
        choices=("signed", "absolute"),
        why="It is the mean of a block's drift (arXiv:2606.24084).",
        used_if=_DRIFT_GATE,
        help="Mean of the drift over a block: 'signed' (arXiv:2606.24084), in which opposite drifts cancel, or "
        "'absolute' (our choice).",
    )
    special_token_mask: list[str] | None = setting(
        None,
        off=None,
        help="Strings whose tokens leave the student's loss and its denominators, for teachers with another chat "
        "template, e.g. '<think>' and '<|im_end|>' (arXiv:2603.25562). Each token of a string counts on its own, as "
        "the tokenizer writes it at the start of a text. None masks nothing (our choice).",
    )
    special_token_mask_scope: str = setting(
        "first",
        choices=("first", "all"),
        why="It says which occurrences are masked (arXiv:2603.25562).",
        used_if={"special_token_mask": ON},
        help="Which occurrences `special_token_mask` leaves out: the 'first' of each token in each rollout "
        "(arXiv:2603.25562, its code), or 'all' (our choice).",
    )

    # --- Objective: what is distilled at each token --------------------------------------------------------------
    distillation_mode: str = setting(
        "sampled_token",
        group="Objective",
        choices=DISTILLATION_MODES,
        why="It is the loss of a token.",
        help="Loss of a token: 'sampled_token' (policy gradient with the teacher's log-ratio of the sampled token; "
        "paper, Eq. 10), 'topk_logits' (reverse KL on the teacher's top-K tokens, renormalised there; "
        "arXiv:2603.25562), 'full_logits' (reverse KL over the whole vocabulary, to teacher^lambda * "
        "reference^(1-lambda); arXiv:2602.12125) or 'asymmetric' (AOPD: forward KL on the teacher's top-K tokens "
        "where the teacher likes the sampled token less, policy gradient elsewhere).",
    )
    distillation_topk: int | None = setting(
        None,
        at_least=1,
        why="It counts the teacher's likeliest tokens at a position.",
        used_if={"distillation_mode": ("topk_logits", "asymmetric")},
        help="K of 'topk_logits' and 'asymmetric', the teacher's likeliest tokens at each position. Default: 32 "
        "(arXiv:2603.25562), and 10 with 'asymmetric' (AOPD).",
    )
    asymmetric_threshold: float = setting(
        0.0,
        at_least=-1,
        at_most=1,
        why="It is a difference of probabilities (AOPD).",
        used_if=_ASYMMETRIC,
        help="Probability of the teacher minus that of the student up to which 'asymmetric' takes the forward KL "
        "(AOPD, arXiv:2605.06387: 0). -1 is the policy gradient on all tokens but certain ones, 1 the forward KL on "
        "all.",
    )
    asymmetric_forward_kl_scale: float | None = setting(
        None,
        above=0,
        why="It weighs the forward KL (AOPD).",
        way_out="Set it to None for 1/K.",
        used_if=_ASYMMETRIC,
        help="Factor of the forward KL of 'asymmetric'. Default: 1/K (AOPD, arXiv:2605.06387, at second hand).",
    )

    # --- Coefficients: from the teacher alone to the rewards alone ------------------------------------------------
    task_reward_coef: list[float] = setting(
        [0.0],  # one or two of them, which `_wrong_coefs` checks
        group="Coefficients",
        help="w_r of the advantage w_r * a1r + w_t * T: how much TRL's group advantage of all reward functions counts "
        "beside the teacher's (KDRL, arXiv:2506.02208, and the sums of ms-swift, miles, slime). One number, or two "
        "from which and to which it goes. 0 leaves rewards to the gate (paper).",
    )
    teacher_kl_coef: list[float] = setting(
        [1.0],
        help="w_t, see `task_reward_coef`: how much the teacher's weighted advantage T counts. One number, or two. "
        "From where it stays at 0 nothing is asked of the teacher, and one that the run has loaded is freed "
        "(our choice; the name is ms-swift's).",
    )
    coef_schedule: str = setting(
        "linear",
        choices=COEF_SCHEDULES,
        why="It is the way from the first coefficient to the second.",
        used_if=_MOVING_COEFS,
        help="How coefficients with two numbers go from the first to the second (our choice: both).",
    )
    coef_phase_end_fracs: list[float] = setting(
        [0.0, 1.0],
        used_if=_MOVING_COEFS,
        help="Shares of all steps: coefficients with two numbers have the first up to the end of one, and the second "
        "from the end of the other. Equal shares are a hard switch (OPD, then RL: arXiv:2609.04108, where it is at "
        "0.4 to 0.5).",
    )

    # --- Phased teacher sampling: the anchor, what it is made of and when ----------------------------------------
    teacher_sampling_enable: bool = setting(
        True,
        group="Phased teacher sampling",
        off=False,
        help="Whether verified teacher rollouts join as a cross-entropy anchor (paper, Eq. 2-3).",
    )
    teacher_sampling_ratio: float = setting(
        0.125,
        above=0,
        below=1,
        why="It is the share of teacher prompts among all prompts.",
        way_out="Set teacher_sampling_enable=False for a run without teacher rollouts.",
        used_if=_ANCHOR,
        help="rho: share of teacher prompts among all prompts (paper, appendix H: 0.125).",
    )
    teacher_sampling_prompts: str = setting(
        "reserve",
        choices=("reserve", "share"),
        why="It says where teacher prompts come from (Algorithm 1).",
        used_if=_ANCHOR,
        help="Where teacher prompts come from: 'reserve' draws them from their own permutation of the training set "
        "(paper, Algorithm 1), 'share' takes them from the student's prompts of the same step.",
    )
    teacher_num_generations: int = setting(
        1,
        at_least=1,
        why="It counts the teacher's rollouts per prompt.",
        used_if=_ANCHOR,
        help="Teacher rollouts per teacher prompt (paper, Eq. 2 is singular: 1).",
    )
    teacher_sampling_filter_correct: bool = setting(
        True, used_if=_ANCHOR, help="Keep only teacher rollouts the verifier judges right (paper, section 5.3)."
    )
    teacher_sampling_phase1_end_frac: float = setting(
        0.30,
        at_least=0,
        at_most=1,
        why="It is a share of all steps.",
        used_if=_ANCHOR,
        help="End of phase 1 (constant alpha) as a share of all steps (paper: step 30 of 100).",
    )
    teacher_sampling_phase2_end_frac: float = setting(
        0.35,
        at_least=0,
        at_most=1,
        why="It is a share of all steps.",
        used_if=_ANCHOR,
        help="End of phase 2 (cosine to alpha_end), then no anchor (paper: step 35 of 100).",
    )
    # Phase 2 and alpha_end count here too: they say how many teacher rollouts are "as many as otherwise".
    teacher_sampling_time_separated: bool = setting(
        False,
        used_if=_ANCHOR,
        help="Separate anchor and student in time: only the anchor trains until the end of phase 1, without any "
        "student rollout, only the student's loss after it; as many teacher rollouts as otherwise (paper, Table 3e, "
        "TimeSep; the boundary is our choice).",
    )
    teacher_sft_alpha_start: float = setting(
        0.2,
        at_least=0,
        why="It weighs the anchor against the student's loss (Eq. 3).",
        used_if=_ANCHOR,
        help="alpha of the anchor in phase 1 (paper, Eq. 3; 0.2 is printed in Table 3).",
    )
    teacher_sft_alpha_end: float = setting(
        0.0,
        at_least=0,
        why="It weighs the anchor against the student's loss (Eq. 3).",
        used_if=_ANCHOR,
        help="alpha at the end of phase 2 (paper, Eq. 3 prints no value: our choice).",
    )
    teacher_sft_phi: str = setting(
        "chord",
        choices=ANCHOR_WEIGHTS,
        why="It is the token weight of the anchor (appendix C).",
        used_if=_ANCHOR,
        help="Token weight of the anchor: 'chord' p(1-p) (arXiv:2508.11408; paper, appendix C), 'dft' p "
        "(arXiv:2508.05629) or 'none'. Detached, unit mean per rollout.",
    )
    teacher_sft_reduction: str = setting(
        "token_mean",
        choices=ANCHOR_REDUCTIONS,
        why="It is the reduction of the anchor (Eq. 2).",
        used_if=_ANCHOR,
        help="Reduction of the anchor over the step's kept teacher rollouts: 'token_mean' (our choice), 'seq_mean' or "
        "'sum' (paper, Eq. 2 to the letter).",
    )
    teacher_max_completion_length: int | None = setting(
        None,
        at_least=1,
        why="It counts the tokens of the longest teacher rollout.",
        used_if=_ANCHOR,
        help="Longest teacher rollout in tokens. Default: `max_completion_length` (paper: 14336).",
    )
    teacher_rollouts_path: str | None = setting(
        None,  # a folder or an id, which `_wrong_rollouts_path` checks
        used_if=_ANCHOR,
        help="Where teacher rollouts are kept and read instead of generated again: a local folder, which the run "
        "creates and adds to, or the id of a Hub data set (`user/name`, `user/name@revision`), which is only read. "
        "Default: every run generates its own (our choice).",
    )

    # --- Running: how a run is carried out -----------------------------------------------------------------------
    max_tokens_per_scoring_batch: int | None = setting(
        None,
        group="Running",
        at_least=1,
        why="It counts the tokens of one scoring forward.",
        help="Token budget, padding included, of one teacher or reference forward; where rows share their prompt, it "
        "counts in each of them. Default: what one training micro-batch of full length holds (our choice).",
    )
    preflight: bool = setting(
        True,
        help="Whether the first seconds of training look at versions, memory, verifier and the gate's rounding noise, "
        "as `sg-opd check` does at length: what is doubtful is a warning, what cannot go well ends the run before its "
        "first step (our choice).",
    )
    max_skipped_steps: int = setting(
        3,
        rule=Rule(at_least=0, why="It is a number of steps."),
        help="How many steps in a row may be skipped because their loss or gradient is not finite. Weights and "
        "optimizer stay as they are, and the batch is written to `skipped_steps/` in `output_dir`; one more such step "
        "ends the run. 0 ends it at the first, as DeepSpeed does whatever is set here (our choice).",
    )
    eval_with_teacher: bool = setting(
        False,
        help="Score the evaluation rollouts with the teacher too. Off: TRL's metrics only (our choice).",
    )

    # --- TRL's own fields, with the paper's values ---------------------------------------------------------------
    learning_rate: float = setting(1e-5, help="Initial learning rate of AdamW. Paper, appendix C: 1e-5.")
    lr_scheduler_type: str = setting(
        "constant", help="Learning-rate schedule. Paper, appendix C: constant, no warm-up."
    )
    weight_decay: float = setting(0.01, help="Weight decay of AdamW. Paper, appendix C: 0.01.")
    loss_type: str = setting(
        "grpo",  # TRL has more of them: `_refused_of_trl` says why they are not here
        help="Reduction of the per-token loss: 'grpo' (mean over sequences of the mean over tokens; paper, Eq. 10), "
        "'bnpo', 'dr_grpo' or 'dapo'.",
    )
    delta: float | None = setting(
        3.0,
        above=0,
        why="It bounds the probability ratio of negative advantages.",
        help="Upper bound of the probability ratio (dual clip). The paper's code base uses 3.0.",
    )
    vllm_importance_sampling_mode: str = setting(
        "token_truncate",
        choices=("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
        why="It says what happens to tokens that vLLM and the student see differently.",
        help="Rollout importance correction, see `trl.GRPOConfig`. Paper, appendix C: per token, truncated.",
    )
    vllm_importance_sampling_clip_max: float | None = setting(
        5.0,
        at_least=1,
        why="The ratio is 1 where vLLM and student agree.",
        help="Cap of the rollout importance ratio. Paper, appendix C: 5.0, no lower bound.",
    )

    def __post_init__(self) -> None:
        # A recipe may have a number where one is enough.
        for name in _COEFS:
            value: object = getattr(self, name)
            setattr(self, name, [value] if _is_number(value) else value)
        # Before TRL's own checks, whose messages do not say what its numbers are to this method.
        self.teacher_model_server_url = parsed_servers(self.teacher_model_server_url)
        check_config(self)
        settle_bf16(self)
        super().__post_init__()
        unpin(self)

    # --- What several parts of a run read of these ---------------------------------------------------------------
    @property
    def needs_reference(self) -> bool:
        """Whether any route has a lambda other than 1, so that a reference model is used at all."""
        return any(self.open_routes)

    @property
    def coefs_move(self) -> bool:
        """Whether a coefficient has two numbers."""
        return any(len(getattr(self, name)) > 1 for name in _COEFS)

    @property
    def teacher_ends(self) -> bool:
        """Whether the teacher counts for nothing at the end of the run."""
        return self.teacher_kl_coef[-1] == 0

    @property
    def open_routes(self) -> RouteReferences:
        """Whether consensus, conflict and neutral tokens use the reference."""
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
    def drift_block_size(self) -> int | None:
        """Tokens of one block of the drift gate; None for spans that end with a newline."""
        return None if self.drift_gate_block == "newline" else int(self.drift_gate_block)

    @property
    def teacher_completion_length(self) -> int:
        """Longest teacher rollout in tokens."""
        return self.teacher_max_completion_length or self.max_completion_length or 0

    @property
    def longest_completion(self) -> int:
        """Longest completion in tokens that is scored: the student's, or the anchor's where that is on."""
        own = self.max_completion_length or 0
        return max(own, self.teacher_completion_length) if self.teacher_sampling_enable else own


@dataclass
class StudentConfig(ModelConfig):
    """`trl.ModelConfig`, the student and its adapter in a recipe; the adapter without dropout."""

    lora_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Dropout of the adapter. TRL has 0.05, which is on while rollouts are written: they would not be "
            "those of the model that is scored and saved (our choice)."
        },
    )


def unpin(args: Any) -> None:
    """Have batches not pinned where there is no accelerator to copy them to: torch would warn of it in every run."""
    args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()


def settings_of(config_class: type) -> dict[str, Setting]:
    """What is declared of each setting, ours and TRL's."""
    return declared(config_class, _TRL_RULES)


def check_config(config: SGOPDConfig) -> None:
    """Check all settings of SG-OPD.

    Raises:
        SGOPDConfigError: lists every problem found, one per line.
    """
    problems = [
        *value_problems(config, settings_of(type(config))),
        *_wrong_cells(config),
        *_wrong_blocks(config),
        *_wrong_special_tokens(config),
        *_wrong_coefs(config),
        *_wrong_phases(config),
        *_wrong_separation(config),
        *_wrong_rollouts_path(config),
        *server_problems(config),
        *engine_problems(config),
        *folder_problems(config),
        *_wrong_groups(config),
        *precision_problems(config),
        *_refused_of_trl(config),
        *_refused_controls(config),
        *_refused_modes(config),
        *_refused_offload(config),
    ]
    if problems:
        raise SGOPDConfigError("\n".join(problems))


def unused_settings(config: SGOPDConfig) -> dict[str, str]:
    """Settings that differ from their default and that nothing of this run reads.

    Returns:
        name -> the setting that switches its part off, with its value.
    """
    return unused(config, settings_of(type(config)))


def warn_of_unused(config: SGOPDConfig) -> None:
    """Name the settings that have no effect on this run."""
    found = unused_settings(config)
    if found:
        shown = ", ".join(f"{name}={getattr(config, name)!r} ({switch})" for name, switch in found.items())
        logger.warning("These settings have no effect, each because of the one behind it: %s.", shown)


# --- Settings whose values have a form of their own ------------------------------------------------------------------
def _wrong_cells(config: SGOPDConfig) -> Iterator[str]:
    cells = config.disagree_cell_lambdas
    valid = isinstance(cells, (list, tuple)) and len(cells) == 4
    if not valid or not all(_is_number(value) and 0 <= value < math.inf for value in cells):
        yield (
            f"`disagree_cell_lambdas` must be four finite numbers >= 0, got {cells!r}. They are the lambdas of the "
            "sign pairs (verifier, teacher) = ++, +-, -+, --. Set for example [1.5, 1.0, 1.0, 1.5]."
        )


def _wrong_blocks(config: SGOPDConfig) -> Iterator[str]:
    # YAML and Python give 64, a command line "64": both are meant. `isdigit` alone takes digits of other scripts too.
    block: object = config.drift_gate_block
    size = int(block) if isinstance(block, str) and block.isascii() and block.isdigit() else block
    if block != "newline" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        yield (
            f"`drift_gate_block` must be 'newline' or a whole number of at least 1, got {block!r}. It is what the "
            "drift is averaged over (arXiv:2606.24084). Set it to 64, the default."
        )


def _wrong_special_tokens(config: SGOPDConfig) -> Iterator[str]:
    strings: object = config.special_token_mask
    if strings is None:
        return
    listed = isinstance(strings, (list, tuple)) and bool(strings)
    if not listed or not all(isinstance(string, str) and string for string in strings):  # type: ignore[attr-defined]
        yield (
            f"`special_token_mask` must be a list of at least one non-empty string, got {strings!r}. It names the "
            "tokens that leave the loss. Set it to None to mask nothing."
        )


def _wrong_coefs(config: SGOPDConfig) -> Iterator[str]:
    wrong = False
    for name in _COEFS:
        values: object = getattr(config, name)
        listed = isinstance(values, (list, tuple)) and 1 <= len(values) <= 2
        if not listed or not all(_is_number(x) and math.isfinite(x) and x >= 0 for x in values):  # type: ignore[attr-defined]
            wrong = True
            yield (
                f"`{name}` must be one number of at least 0, or two, got {values!r}. It weighs rewards and teacher "
                "against one another, from the first to the second. Set it to [1.0], say."
            )
    shares: object = config.coef_phase_end_fracs
    pair = isinstance(shares, (list, tuple)) and len(shares) == 2
    if not pair or not all(_is_number(x) and 0 <= x <= 1 for x in shares) or shares[0] > shares[1]:  # type: ignore[attr-defined,index]
        yield (
            f"`coef_phase_end_fracs` must be two shares of the run, the first not above the second, got {shares!r}. "
            "Coefficients change between them. Set it to [0.4, 0.4] for a switch at two fifths."
        )
        return
    if not wrong:
        yield from _refused_coefs(config)


def _refused_coefs(config: SGOPDConfig) -> Iterator[str]:
    """What cannot be had with rewards in the advantage, or without a teacher in it."""
    task, teacher = config.task_reward_coef, config.teacher_kl_coef
    for at in (0, -1):
        if task[at] == teacher[at] == 0:
            yield (
                f"`task_reward_coef` must be above 0 where `teacher_kl_coef` is 0, got {task!r} and {teacher!r}. "
                "Nothing would be trained there. Raise one of them."
            )
            return
    if any(task) and config.distillation_mode != "sampled_token":
        yield (
            f"`task_reward_coef` must be 0 with distillation_mode={config.distillation_mode!r}, got {task!r}. A loss "
            "over distributions has no advantage that rewards could be added to. Set distillation_mode to "
            "'sampled_token'."
        )
    if not config.teacher_ends:
        return
    end = config.coef_phase_end_fracs[1] if len(teacher) > 1 else 0.0
    if config.teacher_sampling_enable and config.teacher_sampling_phase2_end_frac > end:
        yield (
            f"`teacher_sampling_phase2_end_frac` must not be above {end}, where `teacher_kl_coef` has come to 0, got "
            f"{config.teacher_sampling_phase2_end_frac}. The teacher is asked for nothing from there. Lower it, or "
            "set teacher_sampling_enable=False."
        )
    if config.drift_gate_tau is not None:
        yield (
            f"`drift_gate_tau` must be None where `teacher_kl_coef` ends at 0, got {config.drift_gate_tau}. Without "
            "the teacher the step is GRPO's, which has no such gate. Leave one of them out."
        )


# --- Settings that must fit together ---------------------------------------------------------------------------------
def _wrong_phases(config: SGOPDConfig) -> Iterator[str]:
    # What is no number is a problem of its own by now, and cannot be compared.
    first, second = config.teacher_sampling_phase1_end_frac, config.teacher_sampling_phase2_end_frac
    if _is_number(first) and _is_number(second) and first > second:
        yield (
            f"`teacher_sampling_phase1_end_frac` must not exceed `teacher_sampling_phase2_end_frac`, got {first} and "
            f"{second}. Phase 2 anneals the anchor after phase 1. Set the second to at least {first}."
        )


def _wrong_separation(config: SGOPDConfig) -> Iterator[str]:
    if not config.teacher_sampling_time_separated:
        return
    # Stage 1 has the anchor and nothing else, so that whatever leaves it without an anchor leaves it without a loss.
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


def _wrong_rollouts_path(config: SGOPDConfig) -> Iterator[str]:
    """Before anything is opened; whether the folder or the data set can be read is found out by the store."""
    path: object = config.teacher_rollouts_path
    if path is not None and (not isinstance(path, str) or not path.strip()):
        yield (
            f"`teacher_rollouts_path` must be a folder or a data set on the Hub, got {path!r}. Teacher rollouts are "
            "kept there. Set it to None to keep none."
        )
    elif path is not None and not config.teacher_sampling_enable:
        yield (
            f"`teacher_rollouts_path={path!r}` is not supported with teacher_sampling_enable=False: the teacher "
            "writes no rollout. Leave it out, or set teacher_sampling_enable=True."
        )


def can_send_weights(config: Any) -> bool:
    """Whether TRL can give a vLLM server the student's weights from here."""
    return torch.cuda.is_available() and not config.use_cpu


def engine_problems(config: Any, longest_prompt: int = 1, source: str = "a prompt of one token") -> Iterator[str]:
    """What is wrong with an engine: a server that cannot be given weights, a prompt and completion that do not fit.

    Args:
        config: of the run.
        longest_prompt: in tokens.
        source: where that length comes from, for the message.
    """
    # The configurations of other methods have no rollouts; in server mode the context is the server's own.
    if not isinstance(config, GRPOConfig) or not config.use_vllm:
        return
    if config.vllm_mode == "server" and not can_send_weights(config):
        yield (
            "`vllm_mode` must be 'colocate' on this machine, got 'server'. TRL sends the student's weights to a "
            "server over NCCL, which needs an NVIDIA GPU. Set vllm_mode='colocate', or leave use_vllm out."
        )
    if config.vllm_mode != "colocate":
        return
    room, needed = config.vllm_max_model_length, longest_prompt + (config.max_completion_length or 0)
    if room is not None and needed > room:
        yield (
            f"`vllm_max_model_length` must be at least {needed}, got {room}: {source} and `max_completion_length` "
            f"take {needed} tokens. vLLM would cut completions short and refuse longer prompts. Raise it, or lower "
            "`max_completion_length` or `max_prompt_tokens`."
        )


def _wrong_groups(config: SGOPDConfig) -> Iterator[str]:
    size = config.num_generations
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        yield (
            f"`num_generations={size!r}` is not supported: a group of one has no verifier advantage, and TRL takes "
            "none. Set num_generations to at least 2."
        )
    # TRL still takes the two booleans that it had before there were names, and turns them into these.
    if config.scale_rewards not in ("group", "batch", "none", True, False):
        yield (
            f"`scale_rewards` must be one of 'group', 'batch', 'none', got {config.scale_rewards!r}. It scales the "
            "verifier's advantage. Set it to 'group'."
        )


# --- What is not supported -------------------------------------------------------------------------------------------
def _refused_of_trl(config: SGOPDConfig) -> Iterator[str]:
    # TRL accepts each of these and goes on to train something: it would be neither its method nor ours.
    if config.eval_steps is not None and not config.eval_steps > 0:
        yield (
            f"`eval_steps` must be a number above 0, got {config.eval_steps!r}. It is a count of steps, or a share of "
            "them; 0 would be taken for `logging_steps`. Leave it out, or set eval_strategy='no'."
        )
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
    # `_wrong_coefs` has told of what is no list by now.
    mixed = isinstance(config.task_reward_coef, list) and any(config.task_reward_coef)
    if config.multi_objective_aggregation != "sum_then_normalize" and not mixed:
        yield (
            f"`multi_objective_aggregation={config.multi_objective_aggregation!r}` is not supported: the teacher's "
            "advantages replace the mixed reward. Set multi_objective_aggregation='sum_then_normalize', or a "
            "task_reward_coef above 0."
        )


def _refused_controls(config: SGOPDConfig) -> Iterator[str]:
    if config.gate_signal == "random" and not config.sign_gated_extrapolation:
        yield (
            "`gate_signal='random'` is not supported with sign_gated_extrapolation=False: without the gate there is "
            "no consensus to deal out. Set sign_gated_extrapolation=True, or gate_signal='verifier'."
        )


def _refused_modes(config: SGOPDConfig) -> Iterator[str]:
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
    if config.sign_gated_extrapolation and (why := _unmatched_route(config.disagree_mode, mode)):
        yield (
            f"`disagree_mode={config.disagree_mode!r}` is not supported with distillation_mode={mode!r}: {why}. Set "
            "disagree_mode='interp', or distillation_mode='sampled_token'."
        )


def _refused_offload(config: SGOPDConfig) -> Iterator[str]:
    if not config.teacher_offload:
        return
    if config.distillation_mode == "full_logits":
        yield (
            "`teacher_offload=True` is not supported with distillation_mode='full_logits': the loss of every "
            "micro-batch reads the teacher's output head, for which its weights would have to come and go. Set "
            "teacher_offload=False, or distillation_mode='topk_logits'."
        )
    options = config.teacher_model_init_kwargs
    if isinstance(options, Mapping) and options.get("device_map") is not None:
        yield (
            f"`teacher_offload=True` is not supported with device_map={options['device_map']!r} in "
            "teacher_model_init_kwargs: that says where the weights stay. Leave one of the two out."
        )


def _unmatched_route(disagree_mode: str, distillation_mode: str) -> str:
    """Why a loss over distributions cannot follow the routes of a mode; empty where it can."""
    if distillation_mode == "asymmetric":
        # Its policy gradient takes the advantage of any route, also the verifier's; its forward KL reads no route.
        if disagree_mode in modes_without_forward_kl():
            return "its forward KL matches conflict tokens to the teacher in full, whatever their route is"
    elif disagree_mode in modes_without_distribution():
        return "the verifier's advantage is of one token, it names no distribution to match"
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
