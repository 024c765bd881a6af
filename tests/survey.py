"""Every causal language model of transformers against the log-prob check and the sampler: what docs/models.md tells.

The oracle is plain `model(input_ids).logits` of each row alone. It knows nothing of layouts, heads, caches or the
check, and most of its rows are others than the check's.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from models.architectures import ARCHITECTURES, NOT_BUILT, tiny_architecture
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl.trainer.utils import add_fused_lm_head

from sg_opd_trl.agreement import check_model, made_up_rows
from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.models.forward import packed_forward, padded_forward, prefixes_to_share, should_pack
from sg_opd_trl.models.generate import generate_completions
from sg_opd_trl.trl_seam import add_fused_head, add_head_output, compact_head, fused_forward

#: One of each kind: what the ordinary suite runs, and the documentation is held against.
SELECTION = (
    "llama",
    "qwen2_moe",
    "gemma3_text",
    "gpt2",
    "openai-gpt",
    "bart",
    "bloom",
    "phimoe",
    "mamba",
    "bert",
    "xlnet",
)
AGREES, SLOWER, REFUSED, NOT_RUN = "agrees", "other layout", "refused", "not built"
#: Largest difference of a single token, in nats, that is rounding in float32 for predictions as sharp as these.
ROUNDING = 1e-3
_CPU = torch.device("cpu")
_IDS = list(range(5, 60))
_LONGEST = 48  # tokens that the check is told a row may have: past every window
_TEMPERATURE = 0.8


@dataclass(frozen=True)
class Finding:
    """What is known of one architecture.

    Attributes:
        model_type: its name in configurations.
        model: its class.
        outcome: `AGREES`, `SLOWER`, `REFUSED` or `NOT_RUN`.
        layouts: in which its rows are scored, and its prompts written.
        reason: why a layout, or the model, is left out.
    """

    model_type: str
    model: str
    outcome: str
    layouts: str = ""
    reason: str = ""


def survey(model_types: Iterable[str] = ARCHITECTURES) -> Iterator[Finding]:
    """What becomes of each model; the message of a contradiction to the oracle is its reason, and no other's end."""
    for model_type in model_types:
        name = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
        if model_type in NOT_BUILT:
            yield Finding(model_type, name, NOT_RUN, reason=NOT_BUILT[model_type])
            continue
        try:
            yield examine(model_type, name)
        except AssertionError as error:
            yield Finding(model_type, name, WRONG, reason=str(error))


WRONG = "WRONG"
"""The outcome that no model may have: the check and the oracle contradict one another."""


@torch.no_grad()
def examine(model_type: str, name: str) -> Finding:
    """Build a model, have the check judge it as teacher and as student, and hold that against the oracle.

    Raises:
        AssertionError: the check accepts what differs, refuses or slows down what does not, or judges by role.
    """
    model = tiny_architecture(model_type)
    add_fused_head(model, _TEMPERATURE, False)
    found = _judged(model_type, name, model, "teacher")
    model = tiny_architecture(model_type)
    # As TRL prepares the model it trains.
    add_fused_lm_head(model, temperature=_TEMPERATURE, outputs=("log_probs", "entropy"))
    add_head_output(model)
    other = _judged(model_type, name, model, "student")
    assert found == other, f"{model_type}: as a teacher {found}, as a student {other}"
    return found


def _with_shared_prompts(model: Any, *rows: Any) -> Any:
    return packed_forward(model, *rows, prefixes=prefixes_to_share(model, *rows))


def _judged(model_type: str, name: str, model: Any, role: str) -> Finding:
    own, checks = _rows(), made_up_rows(model.config, _IDS, _LONGEST, _CPU)
    packs = should_pack(model, own.joined()[1])

    def errors(forward: Callable) -> float:
        return max(_error(model, forward, own), _error(model, forward, checks))

    before = {
        "padded": errors(padded_forward),
        "packed": errors(packed_forward) if packs else 0.0,
        "shared": errors(_with_shared_prompts) if packs else 0.0,
        "together": 0.0 if _samples_as_alone(model, own) and _samples_as_alone(model, checks) else torch.inf,
    }
    try:
        with _quiet():
            found = check_model(model, checks, role=role, temperature=_TEMPERATURE, writes=True)
    except SGOPDConfigError as error:
        moved = errors(lambda *rows: padded_forward(*rows, flush_left=True))
        wrong = min(before["padded"], moved) > ROUNDING or before["together"] > 0 or not _is_causal(model)
        assert wrong, f"{model_type} is refused and agrees: {before}, {error}"
        return Finding(model_type, name, REFUSED, reason=_short(str(error)))
    taken, left = _error(model, fused_forward, own), found.layouts
    assert taken <= ROUNDING, f"{model_type} is accepted with {left} and differs by {taken:.2g} nats: {before}"
    assert _samples_as_alone(model, own), f"{model_type} is accepted with {left} and writes other tokens than alone"
    left_out = {
        "padded": not left.padded,
        "packed": packs and not left.packed,
        "shared": packs and left.packed and not left.shared,
        "together": not left.written_together,
    }
    for layout, is_out in left_out.items():
        # The check reads differences of rows that are smaller than those of a single token.
        assert not is_out or before[layout] > ROUNDING / 10, f"{model_type} need not leave out {layout}: {before}"
    layouts = ["packed"] if packs and left.packed else []
    layouts += ["prompts not shared"] if left_out["shared"] else []
    layouts.append("padded" if left.padded else "padding behind")
    layouts += [] if left.written_together else ["writes one length at a time"]
    outcome = SLOWER if any(left_out.values()) else AGREES
    return Finding(model_type, name, outcome, ", ".join(layouts), _short(found.reason or ""))


#: What a message of the check says -> the same in a few words, without the numbers of this machine.
_REASONS = {
    "even one row without padding differs": "its head is more than its output embedding",
    "RoPE frequencies follow": "RoPE frequencies follow the longest row",
    "tokens that come later": "later tokens change earlier log-probs",
    "what `generate` continues": "`generate` writes what its logits do not say",
    "depends on the rows beside it": "a row depends on the rows beside it",
    "would not find its hidden states": "TRL's head does not find its layers",
    "rows that are padded on the left other": "counts padding in front",
    "packed rows other": "packed rows see too much",
    "that are continued together other": "counts padding in front while it writes",
}


def _short(message: str) -> str:
    known = [short for text, short in _REASONS.items() if text in message]
    assert known or not message, f"a reason that the table has no words for: {message}"
    return "; ".join(known)


# --- the oracle ------------------------------------------------------------------------------------------------------
_SHAPES = ((3, 12), (14, 2), (1, 20), (9, 7))  # tokens of prompts and completions: all windows are 8


def _rows() -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 60, (p + t,), generator=generator).tolist() for p, t in _SHAPES]
    pairs = list(zip(rows, _SHAPES, strict=True))
    return TokenBatch.from_lists([row[:p] for row, (p, _) in pairs], [row[p:] for row, (p, _) in pairs], 0, _CPU)


def _plain_logps(model: Any, prompt: Tensor, completion: Tensor) -> Tensor:
    """`(T,)` log-probs of a completion."""
    ids = torch.cat([prompt, completion]).unsqueeze(0)
    logits = model(input_ids=ids, use_cache=False).logits[0].double() / _TEMPERATURE
    logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logps.gather(1, completion.unsqueeze(1)).squeeze(1)


def _error(model: Any, forward: Callable, batch: TokenBatch) -> float:
    """Largest difference of one token from the oracle; infinite for a forward that fails."""
    try:
        with compact_head(_CPU):
            logps = forward(model, *batch.joined(), batch.completion_ids.size(1)).logps.double()
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return torch.inf
    worst = 0.0
    for row, found in enumerate(logps):
        prompt = batch.prompt_ids[row, batch.prompt_mask[row] == 1]
        completion = batch.completion_ids[row, batch.completion_mask[row] == 1]
        distance = (found[: len(completion)] - _plain_logps(model, prompt, completion)).abs()
        worst = max(worst, float(distance.nan_to_num(nan=torch.inf).max()))
    return worst


def _is_causal(model: Any) -> bool:
    """Whether earlier log-probs stay as they are when the last token is another one."""
    row = torch.arange(5, 25)
    changed = torch.cat([row[:-1], torch.tensor([40])])
    before, after = (_plain_logps(model, ids[:1], ids[1:])[:-1] for ids in (row, changed))
    return float((before - after).abs().max()) <= ROUNDING / 10


_NEW_TOKENS = 16
_NEAR_TIE = 1e-3  # margin of the best logit below which rounding may choose another token


def _samples_as_alone(model: Any, batch: TokenBatch) -> bool:
    """Whether greedy completions of unequal prompts are what plain logits of each alone lead to, near ties aside."""
    prompts = [ids[mask == 1].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    config = GenerationConfig(do_sample=False, max_new_tokens=_NEW_TOKENS, pad_token_id=0, eos_token_id=[])
    try:
        with _quiet():
            written = generate_completions(model, prompts, config)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return all(_is_greedy(model, prompt, ids) for prompt, ids in zip(prompts, written, strict=True))


def _is_greedy(model: Any, prompt: list[int], completion: list[int]) -> bool:
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2, dim=-1)
    sure = (best.values[:, 0] - best.values[:, 1]) > _NEAR_TIE
    same = best.indices[:, 0] == torch.tensor(completion)
    return len(completion) == _NEW_TOKENS and bool((same | ~sure).all())


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of the check are read from what it returns."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
