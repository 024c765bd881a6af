"""Non-negative weights of tokens."""

from dataclasses import dataclass, field


@dataclass
class WeightFields:
    """Non-negative weights of tokens."""

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
