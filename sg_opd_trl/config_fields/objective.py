"""What is distilled at each token."""

from dataclasses import dataclass, field


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
