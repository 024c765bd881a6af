"""Phased teacher sampling."""

from dataclasses import dataclass, field


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
