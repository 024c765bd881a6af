"""`asymmetric`: AOPD, forward KL where the sampled token's advantage is not positive."""

from torch import Tensor

from .. import core
from ..heads import support_log_probs
from .base import Positions, SupportObjective


class Asymmetric(SupportObjective):
    """Forward KL on the teacher's top-K tokens where it likes the sampled token less, the policy gradient elsewhere.

    AOPD, known at second hand (a third party's code that quotes its Eq. 1, 7, 9 and 10). The gate routes the
    advantages of the policy gradient; the forward KL is to the teacher itself, whatever the token's route.
    """

    def matched(self, behaviour_logps: Tensor, inputs: dict) -> Tensor:
        """Where the teacher's probability exceeds the student's by no more than the threshold."""
        return core.asymmetric_tokens(behaviour_logps, inputs["teacher_logps"], self.args.asymmetric_threshold)

    def losses(self, positions: Positions) -> Tensor:
        """Forward KL on the support."""
        student = support_log_probs(
            positions.hidden_states,
            positions.head,
            positions.entry("teacher_support_ids"),
            positions.entry("completion_ids"),
            positions.logps,
        )
        teacher = positions.entry("teacher_support_logps")
        scale = self.args.asymmetric_forward_kl_scale
        return core.forward_kl_on_support(student.unsqueeze(0), teacher.unsqueeze(0), scale).squeeze(0)
