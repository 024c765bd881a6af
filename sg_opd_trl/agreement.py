"""Whether rows that are scored together get the log-probs that each of them gets alone: measured for every model.

A log-prob of this package comes from a forward over several rows, padded or packed, through a head that never builds
logits. For many models that is not what plain `model(input_ids).logits / T` says of the row alone: positions that
count padding, recurrent layers that run over it, windows that only a mask knows of, heads with more than an output
embedding, frequencies that follow the longest row. No list of architectures is complete, so a few made-up rows are
scored both ways before the first step. Where another layout is right it is taken, and said; otherwise the run ends.
"""

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import SGOPDConfigError
from .models.batch import TokenBatch
from .models.forward import Layouts, layouts_of, packed_forward, padded_forward, restrict_layouts, should_pack
from .trl_seam import compact_head

logger = logging.getLogger(__name__)

Agree = Callable[[float], float]
"""A rank's difference -> the largest over all ranks: they must decide alike."""

#: Mean difference of a row's log-probs, in nats, up to which it is rounding. Rows that see padding, or one another, or
#: another head, differ by a hundred times that in a trained model.
TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
# Rounding of half-precision experts can pass the tolerance: a router's choice flips. Then this many times the rounding
# that is measured on the same rows still is rounding.
_TIMES_ROUNDING = 4.0
# Tokens by which the longest row passes the longest window.
_BEYOND = 16
_SHORTEST = 24
# Names of configuration fields after which a model treats longer rows differently.
_BOUNDS = re.compile(r"window(?!_layers)|chunk|local_attention|original_max_position_embeddings")
# Kinds of RoPE whose frequencies follow the longest row once it passes the original context.
_FOLLOWS_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class Agreement:
    """How a model's rows are scored, and how far that is from plain logits of each row alone.

    Attributes:
        role: `student`, `teacher`, ...
        model: its class.
        layouts: those that agree.
        difference: the largest mean difference of a row in any of them, in nats.
        tolerance: up to which it counts as rounding.
        reason: why a layout is left out; None where none is.
    """

    role: str
    model: str
    layouts: Layouts
    difference: float
    tolerance: float
    reason: str | None = None


# --- the rows --------------------------------------------------------------------------------------------------------
def made_up_rows(config: Any, ids: Sequence[int], longest: int, device: torch.device, padding: int = 0) -> TokenBatch:
    """Three rows of unequal prompts and completions; one passes every bound that rows of the run can pass.

    Args:
        config: of the model; its windows, chunks and original context are the bounds.
        ids: token ids to write with, none of them special.
        longest: tokens of the longest row that the run can have.
        device: where the model is.
        padding: id of the padding.
    """
    width = row_length(config, longest)
    tail = min(_BEYOND, width // 2)
    shapes = ((min(5, width // 4), min(9, width // 2)), (width - tail, tail), (width // 2, min(5, width // 4)))

    def text(row: int, length: int) -> list[int]:
        # Steps that share no factor with common sizes: rows differ from one another, and no pattern repeats early.
        return [ids[(row * 101 + 31 * i + i * i % 13) % len(ids)] for i in range(length)]

    rows = [text(row, sum(shape)) for row, shape in enumerate(shapes)]
    prompts = [row[:prompt] for row, (prompt, _) in zip(rows, shapes, strict=True)]
    completions = [row[prompt:] for row, (prompt, _) in zip(rows, shapes, strict=True)]
    return TokenBatch.from_lists(prompts, completions, padding, device)


def row_length(config: Any, longest: int) -> int:
    """Tokens of the longest row that is made up: past all bounds below `longest`, within the model's positions."""
    passed = [bound for bound in bounds_of(config) if bound < longest]
    wanted = max([_SHORTEST, *(bound + _BEYOND for bound in passed)])
    # What follows the longest row has no end of its positions.
    limit = None if follows_length(config) else positions_of(config)
    return wanted if limit is None else min(wanted, limit)


def bounds_of(config: Any) -> list[int]:
    """Lengths from which a model of this configuration may treat rows differently: windows, chunks, RoPE's context."""
    found = set(_integers(config.get_text_config().to_dict(), named=False))
    if follows_length(config):
        found.update(filter(None, [positions_of(config)]))
    return sorted(found)


def positions_of(config: Any) -> int | None:
    """Tokens that the model has positions for; None where nothing says."""
    settings = config.get_text_config().to_dict()
    limits = [settings.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def _integers(settings: Any, *, named: bool) -> Iterator[int]:
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from _integers(value, named=bool(_BOUNDS.search(str(key))))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _integers(value, named=named)
    elif named and isinstance(settings, int) and not isinstance(settings, bool) and settings > 0:
        yield settings


def follows_length(config: Any) -> bool:
    """Whether RoPE frequencies change with the longest row."""
    settings = config.get_text_config().to_dict()
    ropes = [settings.get("rope_scaling") or {}, settings.get("rope_parameters") or {}]
    # One entry per kind of layer, in some models.
    ropes += [nested for rope in ropes for nested in rope.values() if isinstance(nested, dict)]
    return any(rope.get("rope_type", rope.get("type")) in _FOLLOWS_LENGTH for rope in ropes)


# --- the check -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def check_model(
    model: nn.Module,
    batch: TokenBatch,
    *,
    role: str,
    temperature: float,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    agree: Agree = lambda difference: difference,
) -> Agreement:
    """Have a model score the rows in every layout it may be run in, and keep it to those that agree with plain logits.

    Args:
        model: with a fused head, in evaluation mode, plain or wrapped.
        batch: rows of unequal length, see `made_up_rows`.
        role: what messages call it: a setting's name or `student`.
        temperature: all logits are divided by it.
        autocast: the run's precision.
        agree: see `Agree`; called equally often on every rank.

    Raises:
        SGOPDConfigError: no layout agrees; names the model, the difference and the reason.
    """
    with autocast():
        check = _Check(model, batch, role, temperature, agree)
        padded = check.difference(padded_forward)
        flush = None
        if not check.is_rounding(padded):
            flush = check.difference(padded_forward, flush_left=True)
            if not check.is_rounding(flush):
                raise check.refusal(flush)
        packed = check.difference(packed_forward) if should_pack(model, batch.joined()[1]) else None
        packs = packed is None or check.is_rounding(packed)
    known = layouts_of(model)
    # A base that serves several roles keeps to what is right for all of them.
    layouts = Layouts(packed=known.packed and packs, padded=known.padded and flush is None)
    reasons = []
    if flush is not None:
        reasons.append(check.told("padded on the left", padded, "what it computes depends on the padding in front"))
    if packed is not None and not packs:
        reasons.append(check.told("packed", packed, "packed rows see one another, or more of themselves than alone"))
    for reason in reasons if layouts != known else ():
        logger.warning("%s %s", reason, _SLOWER[layouts.padded])
    restrict_layouts(model, layouts)
    used = [padded if flush is None else flush, packed if packs else None]
    difference = max(value for value in used if value is not None)
    return Agreement(role, check.name, layouts, difference, check.tolerance, " ".join(reasons) or None)


_SLOWER = {
    True: "Its rows are padded instead, which is slower and right.",
    False: "Its padding is moved behind the rows instead, which is right.",
}


class _Check:
    """One model and what plain logits say of its rows."""

    def __init__(self, model: nn.Module, batch: TokenBatch, role: str, temperature: float, agree: Agree) -> None:
        self.model, self.batch, self.role = model, batch, role
        self.temperature, self.agree = temperature, agree
        base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        self.name, self.config = type(base).__name__, base.config
        self.keeps = "logits_to_keep" in inspect.signature(type(base).forward).parameters
        self.alone = self._plain_logps(behind=0)
        self.tolerance = TOLERANCES.get(_precision(base), TOLERANCES[torch.float32])
        self._rounding: float | None = None

    def difference(self, forward: Callable, **options: Any) -> float:
        """Largest mean difference of a row in one layout, over all ranks; infinite for what is not finite."""
        with compact_head(self.batch.prompt_ids.device):
            logps = forward(self.model, *self.batch.joined(), self.batch.completion_ids.size(1), **options).logps
        return self.agree(self._distance(logps))

    def _distance(self, logps: Tensor) -> float:
        mask = self.batch.completion_mask
        distance = ((logps - self.alone).abs() * mask).sum(dim=1) / mask.sum(dim=1)
        return float(distance.nan_to_num(nan=torch.inf).max())

    def is_rounding(self, difference: float) -> bool:
        """Whether a difference is no more than the order of the sums makes it."""
        # Rows of RoPE that follows their length cannot be told from rounding so: it is more tokens that change them.
        half = self.tolerance > TOLERANCES[torch.float32]
        if difference > self.tolerance and half and not follows_length(self.config):
            self.tolerance = max(self.tolerance, _TIMES_ROUNDING * self.rounding)
        return difference <= self.tolerance

    @property
    def rounding(self) -> float:
        """What a row alone differs by with a few more tokens behind it, which no earlier token sees."""
        if self._rounding is None:
            self._rounding = self.agree(self._distance(self._plain_logps(behind=8)))
        return self._rounding

    def _plain_logps(self, *, behind: int) -> Tensor:
        """`(B, T)` float32 from plain logits of each row alone, with some tokens behind it."""
        batch = self.batch
        result = torch.zeros(batch.completion_ids.shape, device=batch.completion_ids.device)
        for row in range(len(batch)):
            prompt = batch.prompt_ids[row, batch.prompt_mask[row] == 1]
            completion = batch.completion_ids[row, batch.completion_mask[row] == 1]
            count = len(completion)
            tokens = torch.cat([prompt, completion])
            ids = torch.cat([tokens, tokens[:behind]]).unsqueeze(0)
            options = {"logits_to_keep": count + 1 + behind} if self.keeps else {}
            logits = self.model(input_ids=ids, use_cache=False, **options).logits[0]
            last = logits.size(0) - behind
            logps = (logits[last - count - 1 : last - 1].float() / self.temperature).log_softmax(dim=-1)
            result[row, :count] = logps.gather(1, completion.unsqueeze(1)).squeeze(1)
        return result

    def told(self, layout: str, difference: float, reason: str) -> str:
        """The fact in a sentence."""
        return (
            f"The {self.role} ({self.name}) gives rows that are {layout} other log-probs than each of them alone, by "
            f"{difference:.2g} nats on average (rounding: up to {self.tolerance:.2g}): {reason}."
        )

    def refusal(self, difference: float) -> SGOPDConfigError:
        """Neither layout of padded rows agrees: why, as far as it can be told."""
        if not self.is_rounding(self._difference_of_one_row()):
            reason = (
                "even one row without padding differs, so that its logits are not its last hidden states times its "
                "output embedding, which is what the fused head computes"
            )
            way_out = "Use a model whose head is its output embedding alone."
        elif follows_length(self.config):
            bound = max(bound for bound in bounds_of(self.config) if bound < self.batch.joined()[0].size(1))
            reason = f"beyond {bound} tokens its RoPE frequencies follow the longest row"
            way_out = f"Keep prompt and completion within {bound} tokens, or set a rope_type of fixed frequencies."
        else:
            reason = "what it computes for a row depends on the rows beside it"
            way_out = "Use a model that treats rows of a batch apart."
        return SGOPDConfigError(
            f"`{_SETTINGS.get(self.role, self.role)}` must give rows that are scored together the log-probs of each "
            f"row alone, got {self.name}, which is off by {difference:.2g} nats on average (rounding: up to "
            f"{self.tolerance:.2g}): {reason}. Distillation would compare wrong numbers. {way_out}"
        )

    def _difference_of_one_row(self) -> float:
        """That of rows which are forwarded one by one through the fused head."""
        worst = 0.0
        for row in range(len(self.batch)):
            part = self.batch.select(torch.tensor([row], device=self.batch.prompt_ids.device))
            with compact_head(part.prompt_ids.device):
                logps = padded_forward(self.model, *part.joined(), part.completion_ids.size(1)).logps
            distance = (logps - self.alone[row : row + 1, : logps.size(1)]).abs().mean()
            worst = max(worst, float(distance.nan_to_num(nan=torch.inf)))
        return self.agree(worst)


_SETTINGS = {"student": "model", "teacher": "teacher_model", "reference": "reference_model"}


def _precision(model: PreTrainedModel) -> torch.dtype:
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
