"""The signals of one micro-batch on their way into TRL's loss. It does no arithmetic."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import core
from .head_request import HeadRequest, scattered
from .heads import OutputHead
from .objectives import Positions
from .scoring import loss_mask
from .token_weights import TokenFactors

if TYPE_CHECKING:
    from .trainer import SGOPDTrainer


class Signals(NamedTuple):
    """What is known of a micro-batch's tokens before their loss, `(B, T)` each and detached.

    Attributes:
        behaviour: log-probs of the policy that made the rollouts.
        teacher_advantages: a2.
        gate: classes; None without a gate.
        advantages: routed.
        factors: weights of the loss.
        matched: bool, tokens whose distribution is matched.
        targets: lambda and scale of every token's target.
    """

    behaviour: Tensor
    teacher_advantages: Tensor
    gate: Tensor | None
    advantages: Tensor
    factors: TokenFactors
    matched: Tensor
    targets: core.RoutedLambdas


class MicroBatchLoss:
    """Turns the student's log-probs and distributions into what TRL's loss reads.

    TRL's loss of a token is linear in its advantage where the probability ratio is 1. So a token whose distribution is
    matched is given a ratio of 1 and the advantage `-loss`, with the gradient of that loss; every reduction, mask and
    normaliser stays TRL's.

    Args:
        trainer: whose methods decide.
        inputs: the micro-batch; entries are added and replaced.
    """

    def __init__(self, trainer: "SGOPDTrainer", inputs: dict) -> None:
        self._trainer = trainer
        self._inputs = inputs
        self._mask = loss_mask(inputs)
        self._signals: Signals | None = None
        matches = trainer.objective.matches
        self.request = HeadRequest(self._mask != 0, self._match) if matches else None

    def merge(self, student_logps: Tensor) -> Tensor:
        """Write the entries that TRL's loss reads next.

        Args:
            student_logps: `(B, T)` from its only forward, with gradient.

        Returns:
            The log-probs that it shall go on with: without gradient where distributions are matched.
        """
        inputs, mask = self._inputs, self._mask
        signals = self._signals_of(student_logps.detach())
        advantages = core.weighted_advantages(signals.advantages, *signals.factors.applied)
        inputs["matching"] = mask.new_zeros(2, dtype=torch.float32)
        if self.request is not None and self.request.output is not None:
            losses, weights = scattered(self.request.output[0], signals.matched), signals.targets.scales
            advantages = core.matched_advantages(
                advantages, losses, signals.matched, weights, *signals.factors.applied
            )
            inputs["matching"] = core.masked_sum_and_count(losses * weights, signals.matched)
            student_logps = self._without_ratio(student_logps, signals.matched)
        inputs["advantages"] = advantages
        known = (student_logps + advantages).detach()
        inputs["not_finite"] = ((~torch.isfinite(known)) & (mask != 0)).sum()
        inputs["statistics"] = self._statistics(signals)
        return student_logps

    def _match(self, hidden_states: Tensor, head: OutputHead, logps: Tensor) -> tuple[Tensor, ...]:
        """Losses `(N,)` of the matched tokens, computed inside the student's forward."""
        counted = self._mask != 0
        signals = self._signals_of(scattered(logps.detach(), counted))
        if self._everything_matched:
            chosen = hidden_states, head, logps
        else:
            inside = signals.matched[counted]
            chosen = hidden_states[inside], head, logps[inside]
        positions = Positions(*chosen, signals.targets.lambdas[signals.matched], self._entry)
        return (self._trainer.objective.losses(positions),)

    def _entry(self, name: str) -> Tensor:
        values, matched = self._inputs[name], self._known.matched
        return (values.unsqueeze(1).expand(matched.shape) if values.dim() == 1 else values)[matched]

    @property
    def _everything_matched(self) -> bool:
        """Whether no token that counts keeps its policy gradient; without waiting for the device."""
        return self._trainer.objective.routes_targets and self._trainer.args.wrong_rollout_advantage is None

    @property
    def _known(self) -> Signals:
        if self._signals is None:
            raise RuntimeError("the signals of a micro-batch are known after its forward")
        return self._signals

    def _without_ratio(self, student_logps: Tensor, matched: Tensor) -> Tensor:
        """A probability ratio of 1 at matched tokens, in the inner updates and in vLLM's correction too."""
        inputs, constant = self._inputs, student_logps.detach()
        if "old_per_token_logps" in inputs:
            inputs["old_per_token_logps"] = torch.where(matched, constant, inputs["old_per_token_logps"])
        if "importance_sampling_ratio" in inputs:
            inputs["importance_sampling_ratio"] = torch.where(matched, 1.0, inputs["importance_sampling_ratio"])
        return constant if self._everything_matched else torch.where(matched, constant, student_logps)

    def _signals_of(self, student_logps: Tensor) -> Signals:
        """The signals, found once: inside the forward where distributions are matched, otherwise after it."""
        if self._signals is None:
            self._signals = self._find(student_logps)
        return self._signals

    def _find(self, student_logps: Tensor) -> Signals:
        trainer, inputs, mask = self._trainer, self._inputs, self._mask
        weights = trainer.token_weights
        # Scores of the policy that made the rollouts keep a2 and the gate fixed over the inner updates of a batch.
        behaviour = inputs.get("old_per_token_logps", student_logps)
        teacher, verifier = inputs["teacher_logps"], inputs["verifier_advantages"]
        a2 = core.reverse_kl_advantage(behaviour, teacher)
        gate = trainer.compute_gate(verifier, a2) if trainer.args.sign_gated_extrapolation else None
        gate = weights.deal_gate(gate, inputs, mask)
        routed = trainer.route_advantages(gate, behaviour, teacher, inputs.get("reference_logps"), verifier)
        routed = weights.fix_advantages(routed, inputs)
        phi = trainer.compute_token_weights(a2, mask, inputs)
        factors = weights.factors(phi, a2, (behaviour, student_logps), mask, inputs)
        return Signals(behaviour, a2, gate, routed, factors, *self._targets(behaviour, gate, a2))

    def _targets(self, behaviour: Tensor, gate: Tensor | None, a2: Tensor) -> tuple[Tensor, core.RoutedLambdas]:
        trainer, inputs = self._trainer, self._inputs
        one = torch.ones_like(a2)
        targets = core.RoutedLambdas(one, one)
        if trainer.objective.routes_targets:
            targets = trainer.route_lambdas(gate, a2, inputs["verifier_advantages"])
        taught = trainer.token_weights.taught(inputs["verdicts"]).unsqueeze(1)
        matched = trainer.objective.matched(behaviour, inputs) & (self._mask != 0) & taught
        self._check_reference(targets.lambdas, matched)
        return matched, targets

    def _check_reference(self, lambdas: Tensor, matched: Tensor) -> None:
        """Only routes of a subclass can ask for a reference that the settings did not."""
        if not self._trainer.args.needs_reference and bool(((lambdas != 1) & matched).any()):
            raise ValueError(
                "`route_lambdas` returned a lambda other than 1, but no setting asked for a reference, so none was "
                "loaded. Lambda weighs the teacher against it. Set `lambda_high` or `lambda_base` to the lambda that "
                "is used, or return 1."
            )

    def _statistics(self, signals: Signals) -> core.TokenStatistics:
        verdicts: Any = self._inputs["verdicts"]
        return core.token_statistics(
            gate=signals.gate,
            advantages=signals.advantages,
            teacher_advantages=signals.teacher_advantages,
            stability_weights=signals.factors.stability,
            mask=self._mask,
            right=verdicts == 1,
            wrong=verdicts == 0,
            taught=self._trainer.token_weights.taught(verdicts),
            prefix_weights=signals.factors.prefix,
            drift_gates=signals.factors.drift_gates,
        )
