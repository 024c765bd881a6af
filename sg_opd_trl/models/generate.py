"""Completions of a causal LM in this process: a prompt is prefilled once, and a finished row costs nothing.

`generate_completions` runs `generate` of transformers with a decoding loop of our own (`decode_live_rows`), and leaves
to the loop of transformers what ours would have to ignore.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EosTokenCriteria, GenerationConfig, MaxLengthCriteria, generation
from transformers.generation import GenerationMode, LogitsProcessorList, StoppingCriteriaList

from ..errors import NonFiniteError, NonFiniteTeacherError
from .batch import pad_rows
from .context import check_prompts_fit, rope_stays_up_to
from .experts import without_router_logits
from .forward import layouts_of
from .internals import (
    cache_argument,
    can_select_rows,
    give_room,
    inner_model,
    new_cache,
    select_rows,
    select_rows_of_processors,
    switches_kernel_to_decode,
)
from .sampling import without_own_settings

logger = logging.getLogger(__name__)

OnEnded = Callable[[list[int], list[list[int]]], None]
"""`(numbers of rows that have just ended, their completions with the end token)`, called while others go on."""

CACHE = cache_argument()

#: Ended rows leave once they are this share of the batch: it copies the key-value cache of all the others.
DROP_SHARE = 1 / 8


def generate_completions(
    model: Any,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    *,
    role: str = "student",
    synced_gpus: bool = False,
    on_ended: OnEnded | None = None,
) -> list[list[int]]:
    """One completion per prompt; equal prompts should follow one another, so that they share a prefill.

    What our decoding loop does not support (beams, stop strings, static caches, ...) runs in that of `generate`. The
    model's own generation config has no say, so that one config means the same for every model.

    Args:
        model: unwrapped model, with or without a PEFT adapter.
        prompts: token ids of each prompt.
        config: how to sample, with `eos_token_id` and `pad_token_id`.
        role: what an error calls the model.
        synced_gpus: whether the model is sharded, so that all ranks must run the same number of forwards.
        on_ended: is told of rows that end with an end token while others go on; only our loop can tell.

    Returns:
        Token ids of each completion, up to and including its first end token.

    Raises:
        NonFiniteError: logits that are NaN or infinite.
        SGOPDConfigError: a prompt whose completion would pass the model's table of positions.
    """
    check_prompts_fit(model, prompts, config.max_new_tokens or 0, role)
    completions: list[list[int]] = [[] for _ in prompts]
    for rows in written_together(model, prompts, config.max_new_tokens or 0):
        told = None if on_ended is None else partial(_told_of, on_ended, rows)
        written = _complete(model, [prompts[row] for row in rows], config, role, synced_gpus, told)
        for row, ids in zip(rows, written, strict=True):
            completions[row] = ids
    return completions


def written_together(model: Any, prompts: Sequence[list[int]], completion: int) -> list[list[int]]:
    """Numbers of the prompts of each batch: all of them, or those of one length.

    One length at a time where the model must not see padding in front of a prompt, and where its RoPE changes with the
    longest row on the way to `completion` tokens: a shorter row beside that one would change too early.
    """
    if not prompts:
        return []
    stays = rope_stays_up_to(inner_model(model).config)
    changes = stays is not None and max(map(len, prompts)) + completion > stays
    if layouts_of(model).written_together and not changes:
        return [list(range(len(prompts)))]
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(row)
    return list(by_length.values())


def _told_of(on_ended: OnEnded, rows: list[int], ended: list[int], completions: list[list[int]]) -> None:
    on_ended([rows[number] for number in ended], completions)


def _complete(
    model: Any,
    prompts: list[list[int]],
    config: GenerationConfig,
    role: str,
    synced_gpus: bool,
    on_ended: OnEnded | None,
) -> list[list[int]]:
    """One completion per prompt, all of them in one batch."""
    ids, mask = (x.to(model.device) for x in pad_rows(prompts, config.pad_token_id or 0, left=True))
    arguments = {"input_ids": ids, "attention_mask": mask, "generation_config": config}
    try:
        with without_own_settings(model), without_router_logits(model):
            output = _generate(model, arguments, synced_gpus, on_ended)
    except RuntimeError as error:
        # The sampler's own words for logits that are NaN or infinite.
        if "probability tensor" not in str(error):
            raise
        kind = NonFiniteTeacherError if role.startswith("teacher") else NonFiniteError
        raise kind(
            f"The {role}'s logits are not finite while it writes a completion. Nothing was updated. Check the "
            f"{role}'s weights, or load it in float32 or bfloat16."
        ) from error
    return [cut_after_eos(row, config.eos_token_id) for row in output[:, ids.size(1) :].tolist()]


def cut_after_eos(ids: list[int], eos_token_ids: int | Sequence[int] | None) -> list[int]:
    """The completion up to and including its first end token."""
    ends = {eos_token_ids} if isinstance(eos_token_ids, int) else set(eos_token_ids or ())
    length = next((position + 1 for position, token in enumerate(ids) if token in ends), len(ids))
    return ids[:length]


def _generate(model: Any, arguments: dict[str, Any], synced_gpus: bool, on_ended: OnEnded | None) -> Tensor:
    if synced_gpus:
        reason = "the model is sharded, and all ranks must run the same number of forwards"
    elif _has_adapter_of_rows(model):
        reason = "an adapter prepares inputs for every row before the first forward"
    else:
        try:
            return model.generate(**arguments, custom_generate=partial(decode_live_rows, on_ended=on_ended))
        except UnsupportedDecoding as error:
            reason = str(error)
    _warn_of_slow_loop(reason)
    return model.generate(**arguments, synced_gpus=synced_gpus or None)


def _has_adapter_of_rows(model: Any) -> bool:
    """Whether an adapter prepares inputs for all rows before the first forward, each prompt as often as it occurs."""
    configs = model.peft_config.values() if hasattr(model, "peft_config") else ()
    return any(config.is_prompt_learning or config.to_dict().get("alora_invocation_tokens") for config in configs)


@cache  # once per reason
def _warn_of_slow_loop(reason: str) -> None:
    logger.warning(
        "Completions are left to the decoding loop of `generate`: %s. That changes no probability, but a prompt is "
        "run as often as it occurs, and a finished row as long as any other.",
        reason,
    )


# --- the loop --------------------------------------------------------------------------------------------------------
def decode_live_rows(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    on_ended: OnEnded | None = None,
    **inputs: Any,
) -> Tensor:
    """The loop for `model.generate(..., custom_generate=decode_live_rows)`, sampled or greedy.

    Args:
        model: the model whose `generate` runs.
        input_ids: `(B, P)` prompts, padded on the left; equal prompts that follow one another share a prefill.
        logits_processor: processors that `generate` prepared.
        stopping_criteria: criteria that `generate` prepared.
        generation_config: settings that `generate` prepared.
        on_ended: is told of rows that end with an end token, and not of those that become too long.
        inputs: further inputs of the model.

    Returns:
        `(B, P + T)` prompts and completions, with padding after a row's end token.

    Raises:
        UnsupportedDecoding: an option or a model that needs the loop of `generate`.
        RuntimeError: probabilities that are not finite.
    """
    _check_support(model, logits_processor, stopping_criteria, generation_config, inputs)
    ends = [criterion.eos_token_id for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
    rows = _LiveRows(input_ids, generation_config, inputs)
    logits = rows.prefill(model)
    while True:
        scores = logits_processor(rows.tokens[:, : rows.length], logits)
        tokens = draw_tokens(scores.softmax(dim=-1)) if generation_config.do_sample else scores.argmax(dim=-1)
        live = rows.append(tokens, ends)
        if on_ended is not None and len(tokens) - live > rows.told:
            on_ended(*rows.newly_ended())
        if live == 0 or rows.length == generation_config.max_length:
            return rows.everything()
        if len(tokens) - live >= DROP_SHARE * len(tokens):
            select_rows_of_processors(logits_processor, rows.drop_ended())
        logits = rows.forward(model)


class _LiveRows:
    """The `L` rows of a batch of `B` that are still written; one that ended may stay a while and is padded."""

    def __init__(self, input_ids: Tensor, config: GenerationConfig, inputs: dict[str, Any]) -> None:
        (batch, self.length), limit = input_ids.shape, int(config.max_length or 0)
        self.start = self.length
        self.padding = config.pad_token_id or 0
        self.result = input_ids.new_full((batch, limit), self.padding)
        self.tokens: Any = self.result.clone()  # (L, limit)
        self.tokens[:, : self.length] = input_ids
        self.numbers = torch.arange(batch, device=input_ids.device)  # (L,) rows of the result
        self.ended = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)  # (L,)
        self.told = 0  # of the ended rows that are still here, those that `newly_ended` has returned
        self._told = self.ended.clone()  # (L,)
        self.inputs = inputs
        self.cache: DynamicCache = inputs[CACHE]
        give_room(self.cache)

    def prefill(self, model: Any) -> Tensor:
        """Run every prompt once and repeat what came of it; logits of the first tokens, `(B, V)` float32."""
        prompts, mask = self.tokens[:, : self.length], self.inputs.get("attention_mask")
        # With the mask: a prompt may begin with the id that pads another one.
        first, run = _runs(prompts if mask is None else torch.cat([prompts, mask], dim=1))
        once = _rows_of(self.inputs, first, len(prompts))
        logits = self._run(model, prompts[first], once, is_first_iteration=True)
        select_rows(self.cache, run)
        if mask is not None:
            # As wide as the longest completion from the start, as positions are: each step takes a view of it.
            self.inputs["attention_mask"] = torch.ones_like(self.tokens)
            self.inputs["attention_mask"][:, : self.length] = mask
        positions = self.inputs.get("position_ids")
        if positions is not None:
            later = torch.arange(1, self.tokens.size(1) - self.length + 1, device=positions.device)
            positions = torch.cat([positions, positions[:, -1:] + later], dim=1)
            self.inputs["position_ids"] = positions.expand(len(prompts), -1)
        return logits[run].float()

    def forward(self, model: Any) -> Tensor:
        """Logits after the last tokens, `(L, V)` float32."""
        wide = {name: self.inputs[name] for name in _WIDE if self.inputs.get(name) is not None}
        inputs = self.inputs | {name: value[:, : self.length] for name, value in wide.items()}
        ids = self.tokens[:, : self.length]
        return self._run(model, ids, inputs, next_sequence_length=1).float()

    def _run(self, model: Any, ids: Tensor, inputs: dict[str, Any], **which: Any) -> Tensor:
        prepared = model.prepare_inputs_for_generation(ids, **which, **inputs)
        if prepared.get(CACHE) is not self.cache:
            # The model dropped it and runs all tokens anew, where RoPE changes for those before as well.
            self.cache = self.inputs[CACHE] = prepared[CACHE] = new_cache(model.config)
        return model(**prepared, return_dict=True).logits[:, -1]

    def append(self, tokens: Tensor, ends: list[Tensor]) -> int:
        """Add a token to every row; the number of rows that go on."""
        self.tokens[:, self.length] = tokens.masked_fill(self.ended, self.padding)
        self.length += 1
        for end in ends:
            self.ended |= torch.isin(tokens, end.to(tokens.device))
        return len(tokens) - int(self.ended.sum())

    def newly_ended(self) -> tuple[list[int], list[list[int]]]:
        """Rows of the result that have ended since this was called last, and their completions."""
        new = (self.ended & ~self._told).nonzero().flatten()
        self._told, self.told = self.ended.clone(), self.told + len(new)
        return self.numbers[new].tolist(), self.tokens[new, self.start : self.length].tolist()

    def drop_ended(self) -> Tensor:
        """Take ended rows out; the indices of those kept, `(L,)` of the new `L`."""
        self.result[self.numbers[self.ended]] = self.tokens[self.ended]
        kept = (~self.ended).nonzero().flatten()
        select_rows(self.cache, kept)
        self.inputs = _rows_of(self.inputs, kept, len(self.tokens))
        self.tokens, self.numbers, self.ended = self.tokens[kept], self.numbers[kept], self.ended[kept]
        self.told, self._told = 0, self.ended.clone()
        return kept

    def everything(self) -> Tensor:
        """All rows, `(B, length)`."""
        self.result[self.numbers] = self.tokens
        return self.result[:, : self.length]


def _runs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of every run of equal rows, and the number of its run for each row."""
    starts = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    starts[1:] = (rows[1:] != rows[:-1]).any(dim=1)
    return starts.nonzero().flatten(), starts.cumsum(0) - 1


def _rows_of(inputs: dict[str, Any], chosen: Tensor, rows: int) -> dict[str, Any]:
    """The inputs of some rows; what all rows share (positions without padding, say) stays as it is."""
    return {
        name: value[chosen] if isinstance(value, Tensor) and value.dim() == 2 and len(value) == rows else value
        for name, value in inputs.items()
    }


# --- one token per row -----------------------------------------------------------------------------------------------
_VOCABULARY_BLOCK = 128


def draw_tokens(probabilities: Tensor) -> Tensor:
    """One token per row, with the given probabilities `(L, V)`.

    A block of the vocabulary is drawn by its mass, then a token of that block. `torch.multinomial` draws a random
    number for every entry of the vocabulary instead, which on a CPU can take longer than the model's forward.

    Raises:
        RuntimeError: probabilities that are not finite, in the words of `torch.multinomial`.
    """
    rows, vocabulary = probabilities.shape
    if vocabulary <= _VOCABULARY_BLOCK:
        return _draw(probabilities)
    padded = torch.nn.functional.pad(probabilities, (0, -vocabulary % _VOCABULARY_BLOCK))
    blocks = padded.view(rows, -1, _VOCABULARY_BLOCK)
    block = _draw(blocks.sum(dim=-1))
    inside = blocks[torch.arange(rows, device=block.device), block]
    return block * _VOCABULARY_BLOCK + _draw(inside)


def _draw(weights: Tensor) -> Tensor:
    """An index per row, in proportion to the weights `(L, N)`; never one of weight 0."""
    # In float64: a float32 sum over a large vocabulary would lose its rarest tokens.
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
    # Rounding may lift the point to the total, which is beyond every token.
    point = torch.minimum(torch.rand_like(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(1)


# --- what the loop can do --------------------------------------------------------------------------------------------
class UnsupportedDecoding(Exception):
    """What `decode_live_rows` would have to ignore, raised before any forward and any random number."""


#: Processors that look at nothing but a row's own tokens and scores, so that other rows may leave the batch.
_ROW_WISE = {
    generation.EpsilonLogitsWarper,
    generation.EtaLogitsWarper,
    generation.ExponentialDecayLengthPenalty,
    generation.ForcedBOSTokenLogitsProcessor,
    generation.ForcedEOSTokenLogitsProcessor,
    generation.InfNanRemoveLogitsProcessor,
    generation.LogitNormalization,
    generation.MinLengthLogitsProcessor,
    generation.MinNewTokensLengthLogitsProcessor,
    generation.MinPLogitsWarper,
    generation.NoBadWordsLogitsProcessor,
    generation.NoRepeatNGramLogitsProcessor,
    generation.RepetitionPenaltyLogitsProcessor,
    generation.SequenceBiasLogitsProcessor,
    generation.SuppressTokensAtBeginLogitsProcessor,
    generation.SuppressTokensLogitsProcessor,
    generation.TemperatureLogitsWarper,
    generation.TopKLogitsWarper,
    generation.TopPLogitsWarper,
    generation.TypicalLogitsWarper,
}
#: Inputs of the model that grow by a column with every token.
_WIDE = ("attention_mask", "position_ids")
#: Inputs of the model that the loop carries on from token to token.
_INPUTS = {*_WIDE, CACHE, "use_cache", "logits_to_keep"}


def _check_support(
    model: Any,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    inputs: dict[str, Any],
) -> None:
    mode, positions = config.get_generation_mode(), inputs.get("position_ids")
    options = [x for x in processors if type(x) not in _ROW_WISE]
    options += [x for x in criteria if type(x) not in (MaxLengthCriteria, EosTokenCriteria)]
    reasons = {
        f"generation mode {mode}": mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH),
        "several completions per row": config.num_return_sequences not in (None, 1),
        "more than token ids to return": bool(config.return_dict_in_generate),
        "prefill in chunks": config.prefill_chunk_size is not None,
        # It would be run on the last token alone.
        "model without a key-value cache": CACHE not in inspect.signature(type(model).forward).parameters,
        "key-value cache": not can_select_rows(inputs.get(CACHE)),
        f"options {[type(x).__name__ for x in options]}": bool(options),
        f"inputs {sorted(inputs.keys() - _INPUTS)}": bool(inputs.keys() - _INPUTS),
        "positions of several dimensions": positions is not None and positions.dim() != 2,
        # `draw_tokens` adds in it.
        "no float64 on this device": model.device.type == "mps",
        "mixture of experts": switches_kernel_to_decode(model),
    }
    refused = [reason for reason, applies in reasons.items() if applies]
    if refused:
        raise UnsupportedDecoding(", ".join(refused))
