"""The sign-consistency gate and its routes."""

from dataclasses import dataclass, field


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
