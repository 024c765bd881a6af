"""`SGOPDConfig`: the settings of SG-OPD on top of `trl.GRPOConfig`.

Each field's meaning is written once, in its `help`, with its source. Bounds and refused combinations live in
`config_checks`.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from trl import GRPOConfig

from .config_checks import check_config
from .core import RouteReferences, routes_need_reference


@dataclass
class SGOPDConfig(GRPOConfig):
    """Configuration of `SGOPDTrainer`.

    All of `trl.GRPOConfig`, with the defaults of the paper's recipe (arXiv:2606.09304, appendix C), plus the teacher,
    the reference, the sign-consistency gate (Eq. 4-8), the stability weight (Eq. 9) and phased teacher sampling
    (Eq. 2-3).

    Raises:
        SGOPDConfigError: a value out of range or NaN, or a combination that is not supported; all of them are listed.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # type: ignore[misc]  # TRL's is not a ClassVar
        *GRPOConfig._VALID_DICT_FIELDS,
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

    # --- teacher -------------------------------------------------------------------------------------------------
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Teacher model, a local folder or a Hub id, unless `teacher_model` is given to the trainer."
        },
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of `teacher_model_name_or_path`."}
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `from_pretrained` of the teacher. The student's dtype and attention "
            "implementation are used unless given here (our choice)."
        },
    )

    # --- reference -----------------------------------------------------------------------------------------------
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

    # --- sign-consistency gate -----------------------------------------------------------------------------------
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

    # --- token weights -------------------------------------------------------------------------------------------
    stability_tau: float | None = field(
        default=5.0,
        metadata={
            "help": "tau of the stability weight min(1, tau/abs(a2)) (paper, Eq. 9, which prints no value: 5.0 is our "
            "choice). None switches the weight off."
        },
    )
    stability_norm: str = field(
        default="sequence",
        metadata={
            "help": "Scope over which the stability weight has mean one: 'sequence' (our choice), 'batch' (the global "
            "generation batch, one more policy forward) or 'none'."
        },
    )

    # --- phased teacher sampling ---------------------------------------------------------------------------------
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

    # --- running -------------------------------------------------------------------------------------------------
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

    def __post_init__(self) -> None:
        check_config(self)
        super().__post_init__()

    @property
    def needs_reference(self) -> bool:
        """Whether any route has a lambda other than 1, so that a reference model is used at all."""
        return any(self.open_routes)

    @property
    def open_routes(self) -> RouteReferences:
        """Whether consensus, conflict and neutral tokens use the reference (design: only used forwards)."""
        return routes_need_reference(
            sign_gated=self.sign_gated_extrapolation,
            lambda_high=self.lambda_high,
            lambda_base=self.lambda_base,
            disagree_mode=self.disagree_mode,
            disagree_interp_beta=self.disagree_interp_beta,
            neutral_mode=self.neutral_mode,
            cell_lambdas=tuple(self.disagree_cell_lambdas),
        )

    @property
    def teacher_completion_length(self) -> int:
        """Longest teacher rollout in tokens."""
        return self.teacher_max_completion_length or self.max_completion_length or 0
