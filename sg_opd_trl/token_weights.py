"""The optional weights and controls of a run, with what they need from the tokenizer. Equations are in `core`."""

import logging
import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import core
from .special_tokens import mask_special_tokens, newline_token_ids, special_token_ids

logger = logging.getLogger(__name__)


class TokenFactors(NamedTuple):
    """Weights of a micro-batch's tokens, `(B, T)` each and detached; None where a weight is off.

    Attributes:
        stability: phi (Eq. 9), from `SGOPDTrainer.compute_token_weights`.
        prefix: IW-OPD's.
        drift: of the drift gate, of unit mean in each row.
        drift_gates: g of the drift gate before that, for the metrics.
    """

    stability: Tensor
    prefix: Tensor | None
    drift: Tensor | None
    drift_gates: Tensor | None

    @property
    def applied(self) -> list[Tensor]:
        """The factors of the loss."""
        return [weights for weights in (self.stability, self.prefix, self.drift) if weights is not None]


class TokenWeights:
    """What `config_fields.weights` and the controls of the gate do to a run.

    Args:
        args: the trainer's configuration.
        tokenizer: the student's.

    Raises:
        SGOPDConfigError: a setting that the tokenizer cannot honour.
    """

    def __init__(self, args: Any, tokenizer: Any) -> None:
        self._args = args
        self._special_ids = special_token_ids(tokenizer, args.special_token_mask or [])
        by_line = args.drift_gate_tau is not None and args.drift_block_size is None
        self._newline_ids = newline_token_ids(tokenizer) if by_line else []
        if args.drift_gate_tau is not None:
            _warn_without_drift(args)

    # --- rollouts ------------------------------------------------------------------------------------------------
    def prepare(self, rollouts: dict, trainer: Any) -> dict:
        """Rollouts of a generation batch with their special tokens masked and, for a random gate, its numbers."""
        args, accelerator = self._args, trainer.accelerator
        if self._special_ids:
            before = float(rollouts["num_items_in_batch"])
            rollouts = mask_special_tokens(
                rollouts, self._special_ids, args.special_token_mask_scope, accelerator.gather
            )
            left_out = before - float(rollouts["num_items_in_batch"])
            trainer.metrics.add(trainer.mode, "weights/special_masked", left_out, before)
        if args.gate_signal == "random":
            key = f"{args.seed} {trainer.state.global_step} {accelerator.process_index}"
            rollouts = rollouts | {"gate_numbers": _random_numbers(rollouts["completion_ids"], key)}
        return rollouts

    @property
    def all_taught(self) -> bool:
        """Whether the advantage of every row comes from the teacher, whatever its verdict."""
        return self._args.wrong_rollout_advantage is None

    def counts(self, completion_ids: list[int]) -> bool:
        """Whether any token of a completion is left in the loss by `special_token_mask`."""
        ids = torch.tensor([completion_ids], dtype=torch.long)
        scope = self._args.special_token_mask_scope
        return bool(core.without_special_tokens(ids, torch.ones_like(ids), self._special_ids, scope).any())

    def taught(self, verdicts: Tensor) -> Tensor:
        """Rows `(B,)` bool whose advantage comes from the teacher: all but the wrong ones of that control."""
        return torch.ones_like(verdicts, dtype=torch.bool) if self.all_taught else verdicts != 0

    # --- the loss ------------------------------------------------------------------------------------------------
    def deal_gate(self, gate: Tensor | None, inputs: dict, mask: Tensor) -> Tensor | None:
        """The verifier's gate `(B, T)`, or the random one in its place."""
        if gate is None or self._args.gate_signal != "random":
            return gate
        return core.random_gate(gate, mask * self.taught(inputs["verdicts"]).unsqueeze(1), inputs["gate_numbers"])

    def fix_advantages(self, advantages: Tensor, inputs: dict) -> Tensor:
        """Routed advantages `(B, T)`, the wrong rollouts' replaced where that control is on."""
        return self._without_teacher(advantages, inputs, self._args.wrong_rollout_advantage)

    def factors(
        self, stability: Tensor, teacher_advantages: Tensor, logps: tuple[Tensor, Tensor], mask: Tensor, inputs: dict
    ) -> TokenFactors:
        """All weights of a micro-batch.

        Args:
            stability: `(B, T)` phi.
            teacher_advantages: `(B, T)` a2, not routed.
            logps: `(B, T)` each, of the policy that made the rollouts and of the current one.
            mask: `(B, T)`, 1 = counts.
            inputs: the micro-batch.

        Returns:
            The weights; those that ask the teacher are 1 in rows that it did not score.
        """
        args, prefix, drift, gates = self._args, None, None, None
        if args.iw_opd_gamma > 0:
            prefix = core.prefix_importance_weight(teacher_advantages, mask, args.iw_opd_gamma)
            prefix = self._without_teacher(prefix, inputs, 1.0)
        if args.drift_gate_tau is not None:
            drift, gates = (self._drift(logps, mask, inputs, norm) for norm in ("sequence", "none"))
        return TokenFactors(self._without_teacher(stability, inputs, 1.0), prefix, drift, gates)

    def _drift(self, logps: tuple[Tensor, Tensor], mask: Tensor, inputs: dict, norm: str) -> Tensor:
        args, size, spans = self._args, self._args.drift_block_size, None
        if size is None:
            ids = inputs["completion_ids"]
            spans = core.span_numbers(ids, torch.tensor(self._newline_ids, device=ids.device))
        return core.drift_gate(
            *logps, mask, args.drift_gate_tau, size or 1, span_ids=spans, mean=args.drift_gate_mean, norm=norm
        )

    def _without_teacher(self, values: Tensor, inputs: dict, value: float | None) -> Tensor:
        if self._args.wrong_rollout_advantage is None or value is None:
            return values
        return core.fixed_on_rows(values, ~self.taught(inputs["verdicts"]), value)


def _warn_without_drift(args: Any) -> None:
    """Where each generation batch is used up in one update, the policy is still the one that wrote it."""
    if args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) == 0:
        logger.warning(
            "`drift_gate_tau=%s` does nothing with num_iterations=%d and steps_per_generation=%d: each rollout is "
            "used in one update, before the policy could drift. Set num_iterations=2.",
            args.drift_gate_tau,
            args.num_iterations,
            args.steps_per_generation,
        )


def _random_numbers(completion_ids: Tensor, key: str) -> Tensor:
    """`(B, T)` uniform numbers that depend on the key and the rollouts alone, so that a resumed run draws the same."""
    seed = zlib.crc32(completion_ids.cpu().numpy().tobytes(), zlib.crc32(key.encode()))
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(completion_ids.shape, generator=generator).to(completion_ids.device)
