"""Token weights and controls beside the stability weight: all of them off by default.

The prefix weight of IW-OPD, the drift gate, the special-token mask, and two controls: a gate that tosses coins and a
fixed advantage for wrong rollouts. The equations are in `core`; here is what they need of a run: settings, token ids
and random numbers.
"""

import logging
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import core
from .bookkeeping import TrainingMetrics
from .config import SGOPDConfig
from .errors import SGOPDConfigError
from .run import Run

logger = logging.getLogger(__name__)


class MeasuredRun(Run, Protocol):
    """A run that keeps metrics."""

    metrics: TrainingMetrics


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
    """What the settings of the weights and the controls of the gate do to a run.

    Args:
        args: the trainer's configuration.
        tokenizer: the student's.

    Raises:
        SGOPDConfigError: a setting that the tokenizer cannot honour.
    """

    def __init__(self, args: SGOPDConfig, tokenizer: Any) -> None:
        self._args: Any = args
        self._special_ids = special_token_ids(tokenizer, args.special_token_mask or [])
        by_line = args.drift_gate_tau is not None and args.drift_block_size is None
        self._newline_ids = newline_token_ids(tokenizer) if by_line else []

    # --- rollouts ------------------------------------------------------------------------------------------------
    def prepare(self, rollouts: dict, run: MeasuredRun) -> dict:
        """Rollouts of a generation batch with their special tokens masked and, for a random gate, its numbers."""
        args, accelerator = self._args, run.accelerator
        if self._special_ids:
            before = float(rollouts["num_items_in_batch"])
            rollouts = mask_special_tokens(
                rollouts, self._special_ids, args.special_token_mask_scope, accelerator.gather
            )
            left_out = before - float(rollouts["num_items_in_batch"])
            run.metrics.add(run.mode, "weights/special_masked", left_out, before)
        if args.gate_signal == "random":
            key = f"{args.seed} {run.state.global_step} {accelerator.process_index}"
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
    def random_gate(self, gate: Tensor | None, inputs: dict, mask: Tensor) -> Tensor | None:
        """The gate `(B, T)` with its decisions dealt out at random: the control `gate_signal="random"`."""
        if gate is None:
            return None
        return core.random_gate(gate, mask * self.taught(inputs["verdicts"]).unsqueeze(1), inputs["gate_numbers"])

    def without_teacher(self, values: Tensor, inputs: dict, value: float) -> Tensor:
        """Values `(B, T)` with one for all tokens of the rows that are not taught: of `wrong_rollout_advantage`."""
        if self.all_taught:
            return values
        return core.fixed_on_rows(values, ~self.taught(inputs["verdicts"]), value)

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
            prefix = self.without_teacher(prefix, inputs, 1.0)
        if args.drift_gate_tau is not None:
            drift, gates = (self._drift(logps, mask, inputs, norm) for norm in ("sequence", "none"))
        return TokenFactors(self.without_teacher(stability, inputs, 1.0), prefix, drift, gates)

    def _drift(self, logps: tuple[Tensor, Tensor], mask: Tensor, inputs: dict, norm: str) -> Tensor:
        args, size, spans = self._args, self._args.drift_block_size, None
        if size is None:
            ids = inputs["completion_ids"]
            spans = core.span_numbers(ids, torch.tensor(self._newline_ids, device=ids.device))
        return core.drift_gate(
            *logps, mask, args.drift_gate_tau, size or 1, span_ids=spans, mean=args.drift_gate_mean, norm=norm
        )


def _random_numbers(completion_ids: Tensor, key: str) -> Tensor:
    """`(B, T)` uniform numbers that depend on the key and the rollouts alone."""
    # No generator of the run is drawn from: a resumed run gets the same numbers, and the sampling of rollouts is not
    # another one because of the control.
    seed = zlib.crc32(completion_ids.cpu().numpy().tobytes(), zlib.crc32(key.encode()))
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(completion_ids.shape, generator=generator).to(completion_ids.device)


# --- tokens singled out by their text --------------------------------------------------------------------------------
def special_token_ids(tokenizer: Any, strings: Sequence[str]) -> list[int]:
    """Ids of all tokens of some strings, as arXiv:2603.25562 counts them: a string of several tokens gives each.

    Args:
        tokenizer: the student's.
        strings: `special_token_mask`.

    Returns:
        Ids in order, each once.

    Raises:
        SGOPDConfigError: a string that the tokenizer has no token for.
    """
    ids: list[int] = []
    for string in strings:
        parts = tokenizer.encode(string, add_special_tokens=False)
        if not parts or (tokenizer.unk_token_id in parts and string != tokenizer.unk_token):
            raise SGOPDConfigError(
                f"`special_token_mask` must hold strings that the student's tokenizer knows, got {string!r}. It has "
                "no token for it, so that nothing or every unknown token would be masked. Set the list to strings "
                "of the student's chat template."
            )
        if len(parts) > 1:
            logger.warning(
                "%r of `special_token_mask` is no token of its own but %d: %s. Each of them is masked wherever it "
                "occurs.",
                string,
                len(parts),
                ", ".join(map(repr, tokenizer.convert_ids_to_tokens(parts))),
            )
        ids += parts
    return list(dict.fromkeys(ids))


def newline_token_ids(tokenizer: Any) -> list[int]:
    """Ids of all tokens with a newline in their text.

    Raises:
        SGOPDConfigError: the tokenizer has none.
    """
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    ids = [token for token, text in enumerate(texts) if "\n" in text]
    if not ids:
        raise SGOPDConfigError(
            "`drift_gate_block='newline'` is not supported with this tokenizer: no token of it has a newline, so that "
            "every rollout would be one block. Set drift_gate_block to a number of tokens, e.g. 64."
        )
    return ids


def mask_special_tokens(rollouts: dict, special_ids: Sequence[int], scope: str, gather: Callable) -> dict:
    """Take special tokens out of a generation batch's loss.

    TRL multiplies `completion_mask` by `tool_mask` in its loss and reads `tool_mask` nowhere else by then; attention
    follows `completion_mask` alone. With loss_type "dapo" the loss is divided by `num_items_in_batch`.

    Args:
        rollouts: TRL's, `(B, T)` entries.
        special_ids: token ids.
        scope: `first` or `all`.
        gather: over ranks.

    Returns:
        The rollouts with `tool_mask` and `num_items_in_batch` as they are without these tokens.
    """
    counted = rollouts["completion_mask"]
    if "tool_mask" in rollouts:
        counted = counted * rollouts["tool_mask"]
    kept = core.without_special_tokens(rollouts["completion_ids"], counted, special_ids, scope)
    return rollouts | {"tool_mask": kept, "num_items_in_batch": gather(kept.sum()).sum()}
