"""Whether rows that are run together get the log-probs that each of them gets alone: measured for every model.

A log-prob of this package comes from a forward over several rows, padded or packed, through a head that never builds
logits. For many models that is not what plain `model(input_ids).logits / T` says of the row alone: positions that
count padding, recurrent layers that run over it, windows that only a mask knows of, heads with more than an output
embedding, frequencies that follow the longest row. No list of architectures is complete, so a few made-up rows are
scored both ways before the first step, and continued both ways by a model that writes rollouts. Where another layout
is right it is taken, and said; otherwise the run ends.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from .errors import SGOPDConfigError
from .models.batch import TokenBatch, pad_rows
from .models.context import bounds_of, follows_length, positions_of
from .models.experts import without_router_logits
from .models.forward import (
    Layouts,
    computing_dtype,
    layouts_of,
    packed_forward,
    padded_forward,
    padding_behind,
    prefixes_to_share,
    restrict_layouts,
    should_pack,
)
from .models.internals import inner_model
from .models.sampling import without_own_settings
from .trl_seam import compact_head

logger = logging.getLogger(__name__)

Agree = Callable[[float], float]
"""A rank's difference -> the largest over all ranks: they must decide alike."""

#: Mean difference of a row's log-probs, in nats, up to which it is rounding. Models that agree differ by 1e-5 at most
#: in float32; those that do not, by more than this even with random weights.
TOLERANCES = {torch.float64: 2e-4, torch.float32: 2e-4, torch.float16: 0.05, torch.bfloat16: 0.2}
# Rounding of half-precision experts can pass the tolerance: a router's choice flips. Then this many times the rounding
# that is measured on the same rows still is rounding.
_TIMES_ROUNDING = 4.0
# Tokens by which the longest row passes the longest window, that no earlier one may see, and that are written.
_BEYOND, _BEHIND, _WRITTEN = 16, 8, 2
_SHORTEST = 24


@dataclass(frozen=True)
class Agreement:
    """How a model's rows are scored, and how far that is from plain logits of each row alone.

    Attributes:
        role: `student`, `teacher`, ...
        model: its class.
        layouts: those that agree.
        difference: the largest mean difference of a row in any of those that the run uses, in nats.
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
    """Four rows of unequal prompts and completions; one passes every bound that rows of the run can pass.

    The third one's prompt begins as the second one's.

    Args:
        config: of the model; its windows, chunks and original context are the bounds.
        ids: token ids to write with, none of them special.
        longest: tokens of the longest row that the run can have.
        device: where the model is.
        padding: id of the padding.
    """
    width = row_length(config, longest)
    tail = min(_BEYOND, width // 2)
    shapes = (
        (min(5, width // 4), min(9, width // 2)),
        (width - tail, tail),
        (width // 2, min(5, width // 4)),
        # With other padding than the first: models that read in blocks are right for some paddings alone.
        (min(2, width // 4), min(6, width // 2)),
    )

    def text(row: int, length: int) -> list[int]:
        # Steps that share no factor with common sizes: rows differ from one another, and no pattern repeats early.
        return [ids[(row * 101 + 31 * i + i * i % 13) % len(ids)] for i in range(length)]

    rows = [text(row, sum(shape)) for row, shape in enumerate(shapes)]
    prompts = [row[:prompt] for row, (prompt, _) in zip(rows, shapes, strict=True)]
    prompts[2] = text(1, len(prompts[2]))
    completions = [row[prompt:] for row, (prompt, _) in zip(rows, shapes, strict=True)]
    return TokenBatch.from_lists(prompts, completions, padding, device)


def row_length(config: Any, longest: int) -> int:
    """Tokens of the longest row that is made up: past all bounds below `longest`, within the model's positions."""
    passed = [bound for bound in bounds_of(config) if bound < longest]
    wanted = max([_SHORTEST, *(bound + _BEYOND for bound in passed)])
    # What follows the longest row has no end of its positions.
    limit = None if follows_length(config) else positions_of(config)
    return wanted if limit is None else min(wanted, limit)


def plain_ids(tokenizer: Any, vocab_size: int) -> list[int]:
    """Some ids of ordinary text, from all over the vocabulary."""
    size = min(len(tokenizer), vocab_size)
    ids = range(0, size, max(1, size // _PLAIN_IDS))
    return [token for token in ids if token not in tokenizer.added_tokens_decoder] or list(ids)


_PLAIN_IDS = 512


def _not_passed(config: Any, batch: TokenBatch) -> int | None:
    """The first bound that no row passes, if there is one: the first prompts of a run may not be its longest."""
    longest = int(batch.joined()[1].sum(dim=1).max())
    return min((bound for bound in bounds_of(config) if bound >= longest), default=None)


# --- the check -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def check_model(
    model: nn.Module,
    batch: TokenBatch,
    *,
    role: str,
    temperature: float,
    writes: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    agree: Agree = lambda difference: difference,
) -> Agreement:
    """Have a model run the rows in every layout of the run, and keep it to those that agree with plain logits.

    Args:
        model: with a fused head, in evaluation mode, plain or wrapped.
        batch: rows of unequal length, see `made_up_rows`.
        role: what messages call it.
        temperature: all logits are divided by it.
        writes: whether it also writes rollouts, with `generate`.
        autocast: the run's precision.
        agree: see `Agree`; called equally often on every rank.

    Raises:
        SGOPDConfigError: no layout agrees; names the model, the difference and the reason.
    """
    check_layers_are_found(model, role)
    with autocast(), _told_of_errors(model, role):
        check = _Check(model, batch, role, temperature, agree)
        check.is_causal()
        check.padded()
        check.packed()
        check.shared()
        if writes:
            check.sampled()
    # A base that serves several roles keeps to what is right for all of them.
    known = layouts_of(model)
    layouts = known.common(replace(check.layouts, up_to=_not_passed(check.config, batch)))
    for reason in check.reasons if replace(layouts, up_to=known.up_to) != known else ():
        logger.warning("%s", reason)
    restrict_layouts(model, layouts)
    return Agreement(role, check.name, layouts, check.largest, check.tolerance, " ".join(check.reasons) or None)


@torch.no_grad()
def check_writer(model: nn.Module, tokenizer: Any) -> None:
    """Have a model that only writes continue prompts together and alone, and keep it to one length if it must be.

    Args:
        model: in evaluation mode; without a fused head.
        tokenizer: its own.

    Raises:
        SGOPDConfigError: what it writes is not what its logits say.
    """
    config: Any = inner_model(model).config
    ids = plain_ids(tokenizer, config.get_text_config().vocab_size)
    with _told_of_errors(model, "model"):
        check = _Check(model, made_up_rows(config, ids, 0, inner_model(model).device), "model", 1.0, float)
        check.sampled()
    known = layouts_of(model)
    restrict_layouts(model, replace(known, written_together=known.written_together and check.layouts.written_together))
    for reason in check.reasons:
        logger.warning("%s", reason)


@torch.no_grad()
def check_for_trl(model: Any, tokenizer: Any, *, role: str, method: str) -> None:
    """Refuse a model that TRL's own trainers would run on other positions than its rows have alone.

    Those pad prompts on the left and know no other layout.

    Args:
        model: of such a trainer.
        tokenizer: its own.
        role: what messages call it.
        method: of the recipe.

    Raises:
        SGOPDConfigError: names the model and the difference.
    """
    base = inner_model(model)
    ids = plain_ids(tokenizer, base.config.get_text_config().vocab_size)
    was_training = model.training
    model.eval()
    try:
        with _told_of_errors(model, role):
            check = _Check(model, made_up_rows(base.config, ids, 0, base.device), role, 1.0, float)
            difference = check.difference_of_padded_logits()
    finally:
        model.train(was_training)
    if difference > check.tolerance:
        raise SGOPDConfigError(
            f"`method: {method}` is not supported with the {role} {check.name}, whose log-probs beside a longer "
            f"prompt differ by {difference:.2g} nats on average from those of each row alone (rounding: up to "
            f"{check.tolerance:.2g}): TRL's trainer pads prompts on the left. Use a model with rotary positions, or "
            "method: sg_opd, which moves the padding."
        )


class _Check:
    """One model and what plain logits say of its rows; every method compares one thing.

    Attributes:
        layouts: those that agree so far.
        reasons: a sentence for each of the others.
        largest: difference in those that agree.
    """

    def __init__(self, model: nn.Module, batch: TokenBatch, role: str, temperature: float, agree: Agree) -> None:
        self.model, self.batch, self.role = model, batch, role
        self.temperature, self.agree = temperature, agree
        base = inner_model(model)
        self.name, self.config = type(base).__name__, base.config
        self.keeps = "logits_to_keep" in inspect.signature(type(base).forward).parameters
        self.device = batch.prompt_ids.device
        self.tolerance = TOLERANCES.get(computing_dtype(model, self.device), TOLERANCES[torch.float32])
        self.layouts, self.reasons, self.largest = Layouts(), list[str](), 0.0
        self.rows = [_row(batch, number) for number in range(len(batch))]
        self.alone = [self._plain_logps(prompt, completion) for prompt, completion in self.rows]
        if self.agree(float(not all(bool(torch.isfinite(logps).all()) for logps in self.alone))):
            raise SGOPDConfigError(
                f"`{_setting(role)}` must give finite log-probs, got the {role} {self.name}, which gives NaN or "
                "infinities for a few rows of ordinary tokens. Nothing could be learnt from them. Check its weights, "
                "or load it in float32 or bfloat16."
            )

    # --- what is compared ----------------------------------------------------------------------------------------
    def is_causal(self) -> None:
        """A token's log-prob must not depend on what stands behind it; the difference that rounding makes, besides."""
        prompt, completion = self.rows[0]
        behind = torch.cat([prompt, completion])[:_BEHIND]
        if follows_length(self.config):
            # More tokens change every frequency of such a model once they pass its context.
            return
        longer = self._plain_logps(prompt, completion, behind)
        difference = self.agree(_distance(longer, self.alone[0]))
        half = self.tolerance > TOLERANCES[torch.float32]
        if difference > (_TIMES_ROUNDING * self.tolerance if half else self.tolerance):
            raise self._refusal(
                difference,
                "tokens that come later change the log-probs of earlier ones, so that it does not write from left to "
                "right",
                "Use a causal language model (some need is_decoder=True in their configuration).",
            )
        if half:
            most = _TIMES_ROUNDING * self.tolerance
            self.tolerance = min(most, max(self.tolerance, _TIMES_ROUNDING * difference))

    def padded(self) -> None:
        """Prompts padded on the left as TRL has them, or else all padding behind the rows.

        The run scores its rows with the padding behind them in half precision. What padding on the left gives is known
        then too, for forwards of the model in another precision.
        """
        padded = self._difference(padded_forward)
        left = padded <= self.tolerance
        if left and not padding_behind(self.model, self.device):
            self.largest = max(self.largest, padded)
            return
        moved = self._difference(padded_forward, flush_left=True)
        if self._agrees(moved):
            if not left:
                self._leave_out(
                    "padded", padded, "rows that are padded on the left",
                    "its padding is moved behind the rows, which costs nothing",
                )  # fmt: skip
        elif self._agrees(padded):
            self._leave_out(
                "behind", moved, "rows with all padding behind them",
                "its prompts are padded on the left, where half precision rounds otherwise than in packed rows",
            )  # fmt: skip
        else:
            raise self._refusal(moved, *self._why_not_even_moved())

    def packed(self) -> None:
        """Rows behind one another, if the run would pack them."""
        if not should_pack(self.model, self.batch.joined()[1]):
            return
        packed = self._difference(packed_forward)
        if not self._agrees(packed):
            self._leave_out("packed", packed, "packed rows", "its rows are padded, which is slower")

    def shared(self) -> None:
        """Prompts that begin alike computed once, if the run would share them."""
        if not self.layouts.packed:
            return
        prefixes = prefixes_to_share(self.model, *self.batch.joined(), self.batch.completion_ids.size(1))
        if prefixes is None:
            return
        shared = self._difference(packed_forward, prefixes=prefixes)
        if not self._agrees(shared):
            self._leave_out(
                "shared", shared, "packed rows that share the beginning of their prompts",
                "each of them computes its own, which is slower",
            )  # fmt: skip

    def sampled(self) -> None:
        """Prompts of unequal length continued together by `generate`, or else those of one length at a time."""
        if any("generate" in vars(module) for module in self.model.modules()):
            # The caller's own in place of transformers': nothing tells what it saw while it wrote.
            logger.warning(
                "The %s (%s) has a `generate` of the caller's own: whether it continues prompts together as it does "
                "each alone was not looked at.",
                self.role,
                self.name,
            )
            return
        short, long = self.rows[0][0], self.rows[2][0]
        together = self.agree(self._distance_of_written([short, long]))
        if self._agrees(together):
            return
        # Two of them still: some models mix up the states of rows.
        apart = self.agree(self._distance_of_written([short, long[: len(short)]]))
        if not self._agrees(apart):
            raise self._refusal(
                apart,
                "what `generate` continues a row with is not what the model's logits say of it",
                "Use a model whose `generate` works, or write rollouts with vLLM (use_vllm=True).",
            )
        self._leave_out(
            "written_together", together, "prompts of unequal length that are continued together",
            "prompts of one length are sampled at a time, which is slower",
        )  # fmt: skip

    # --- how -----------------------------------------------------------------------------------------------------
    def _agrees(self, difference: float) -> bool:
        if difference > self.tolerance:
            return False
        self.largest = max(self.largest, difference)
        return True

    def _difference(self, forward: Callable, **options: Any) -> float:
        """Largest mean difference of a row in one layout, over all ranks."""
        with compact_head(self.device):
            logps = forward(self.model, *self.batch.joined(), self.batch.completion_ids.size(1), **options).logps
        return self.agree(
            max(_distance(row[: len(alone)], alone) for row, alone in zip(logps, self.alone, strict=True))
        )

    def difference_of_padded_logits(self) -> float:
        """Largest mean difference of a row's plain logits under prompts that are padded on the left."""
        ids, mask = self.batch.joined()
        width = self.batch.completion_ids.size(1)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -width - 1 : -1]
        logps = (logits.float() / self.temperature).log_softmax(dim=-1)
        logps = logps.gather(2, self.batch.completion_ids.unsqueeze(2)).squeeze(2)
        pairs = zip(logps, self.alone, strict=True)
        return self.agree(max(_distance(row[: len(alone)], alone) for row, alone in pairs))

    def _difference_of_rows_alone(self) -> float:
        """That of rows which are run one by one through the fused head: of the head, then, and of no layout."""
        largest = 0.0
        for number, alone in enumerate(self.alone):
            part = self.batch.select(torch.tensor([number], device=self.device))
            with compact_head(self.device):
                logps = padded_forward(self.model, *part.joined(), part.completion_ids.size(1)).logps[0]
            largest = max(largest, _distance(logps, alone))
        return self.agree(largest)

    def _plain_logps(self, prompt: Tensor, completion: Tensor, behind: Tensor | None = None) -> Tensor:
        """`(T,)` float32 of a completion, from plain logits of its row alone, with some tokens behind it."""
        tokens = [prompt, completion] if behind is None else [prompt, completion, behind]
        after = 0 if behind is None else len(behind)
        options = {"logits_to_keep": len(completion) + 1 + after} if self.keeps else {}
        ids = torch.cat(tokens).unsqueeze(0)
        logits = self.model(input_ids=ids, use_cache=False, **options).logits[0]
        last = logits.size(0) - after
        logps = (logits[last - len(completion) - 1 : last - 1].float() / self.temperature).log_softmax(dim=-1)
        return logps.gather(1, completion.unsqueeze(1)).squeeze(1)

    def _distance_of_written(self, prompts: list[Tensor]) -> float:
        """Of the log-probs that `generate` saw while it wrote, from plain logits of each row alone."""
        ids, mask = pad_rows([prompt.tolist() for prompt in prompts], 0, left=True)
        config = GenerationConfig(
            max_new_tokens=_WRITTEN,
            min_new_tokens=_WRITTEN,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
        )
        with without_own_settings(self.model), without_router_logits(self.model):
            # Wrappers of data parallelism only run forward.
            model: Any = self.model if hasattr(self.model, "generate") else self.model.module
            written = model.generate(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), generation_config=config
            )
        tokens = written.sequences[:, ids.size(1) :]
        logps = torch.stack(written.logits, dim=1).float().div(self.temperature).log_softmax(dim=-1)
        logps = logps.gather(2, tokens.unsqueeze(2)).squeeze(2)
        pairs = zip(prompts, tokens, logps, strict=True)
        return max(_distance(seen, self._plain_logps(prompt, row)) for prompt, row, seen in pairs)

    # --- what is said --------------------------------------------------------------------------------------------
    def _leave_out(self, layout: str, difference: float, rows: str, instead: str) -> None:
        self.layouts = replace(self.layouts, **{layout: False})
        self.reasons.append(
            f"The {self.role} ({self.name}) gives {rows} other log-probs than each of them alone, by "
            f"{difference:.2g} nats on average (rounding: up to {self.tolerance:.2g}): {instead}."
        )

    def _why_not_even_moved(self) -> tuple[str, str]:
        """Reason and way out, as far as they can be told."""
        if self._difference_of_rows_alone() > self.tolerance:
            return (
                "even one row without padding differs, so that its logits are not its last hidden states times its "
                "output embedding, which is what the fused head computes",
                "Use a model whose head is its output embedding alone.",
            )
        if follows_length(self.config):
            bound = max(bound for bound in bounds_of(self.config) if bound < self.batch.joined()[0].size(1))
            return (
                f"beyond {bound} tokens its RoPE frequencies follow the longest row",
                f"Keep prompt and completion within {bound} tokens, or set a rope_type of fixed frequencies.",
            )
        return (
            "what it computes for a row depends on the rows beside it, or on the padding behind it",
            "Use a model that treats rows of a batch apart.",
        )

    def _refusal(self, difference: float, reason: str, way_out: str) -> SGOPDConfigError:
        return SGOPDConfigError(
            f"`{_setting(self.role)}` must give rows that are run together the log-probs of each row alone, got the "
            f"{self.role} {self.name}, which is off by {difference:.2g} nats on average (rounding: up to "
            f"{self.tolerance:.2g}): {reason}. Distillation would compare wrong numbers. {way_out}"
        )


def check_layers_are_found(model: nn.Module, role: str) -> None:
    """Refuse a model whose layers below its head are not where its class says they are.

    Llama 4 and Mllama as text models: TRL's fused head runs `model.base_model`, which is the whole model there.

    Raises:
        SGOPDConfigError: names the model and the way out.
    """
    base = inner_model(model)
    if base.base_model is not base:
        return
    instead = "Use another model"
    if role.startswith("teacher"):
        instead += ", or have it score behind a vLLM server (teacher_model_server_url)"
    raise SGOPDConfigError(
        f"`{_setting(role)}` must keep the layers below its head in a module of its own, under the name that its "
        f"class gives, got the {role} {type(base).__name__}, which has no `{base.base_model_prefix}`. The fused head, "
        f"which scores without building logits, would not find its hidden states. {instead}."
    )


@contextmanager
def _told_of_errors(model: nn.Module, role: str) -> Iterator[None]:
    """Give whatever a model's own code raises on a few rows of token ids the name of the model."""
    try:
        yield
    except (SGOPDConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        base = inner_model(model)
        raise SGOPDConfigError(
            f"`{_setting(role)}` must run on rows of token ids, padded and alone, got the {role} "
            f"{type(base).__name__}, which ended in {type(error).__name__}: {error}. Rollouts could not be scored or "
            "written. Use another model, or another version of transformers."
        ) from error


def _setting(role: str) -> str:
    # A teacher of several is called `teacher NAME`.
    return _SETTINGS.get(role.partition(" ")[0], role)


_SETTINGS = {"student": "model", "teacher": "teacher_model", "reference": "reference_model"}


def _row(batch: TokenBatch, number: int) -> tuple[Tensor, Tensor]:
    """Prompt and completion of a row, without padding."""
    prompt = batch.prompt_ids[number, batch.prompt_mask[number] == 1]
    return prompt, batch.completion_ids[number, batch.completion_mask[number] == 1]


def _distance(logps: Tensor, alone: Tensor) -> float:
    """Mean difference of a row; infinite for what is not finite, which no tolerance lets pass."""
    return float((logps - alone).abs().mean().nan_to_num(nan=torch.inf))
