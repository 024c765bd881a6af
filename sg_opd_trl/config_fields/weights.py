"""Non-negative weights of tokens, and tokens that count for nothing."""

from dataclasses import dataclass, field


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
