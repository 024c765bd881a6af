"""How a run is carried out."""

from dataclasses import dataclass, field


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
