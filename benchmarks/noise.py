"""Rounding noise of a2 by precision: what the gate reads where teacher and student are the same, and what it loses.

    python benchmarks/noise.py [--problems 64] [--rows 16] [--student PATH] [--teacher PATH] [--dataset PATH]

The student writes one rollout for each problem, behind prompts of unequal length. They are scored as it is trained
(micro-batches with a graph, with and without gradient checkpointing) and as frozen models are scored. With a frozen
copy of itself as the teacher every a2 is truly 0, and what is above the gate's default dead zone of 1e-4 is noise; the
ratio is the share of tokens that are neutral, as they should be.
With the task's teacher the signs are held against those of float64, one row at a time: `wrong` is the share of tokens
with the other sign, `lost` that of right signs which the dead zone takes, both at 1e-4 and at 0.03.

`padding on the left` is the control: prompts padded as TRL pads them, in every precision.
"""

import copy
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from harness import Ratio, arguments, progress, show
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sg_opd_trl.cli.loading import first_rows, load_splits
from sg_opd_trl.models.batch import TokenBatch, score_rows
from sg_opd_trl.models.forward import Layouts, restrict_layouts
from sg_opd_trl.models.generate import generate_completions
from sg_opd_trl.tasks import resolve
from sg_opd_trl.trl_seam import add_fused_head, fused_forward

CPU = torch.device("cpu")
ROLES = ("student", "teacher")
IN_BFLOAT16 = partial(torch.autocast, "cpu", torch.bfloat16)
#: Name -> dtype of the weights, and what a forward runs in.
PRECISIONS: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager]]] = {
    "float32": (torch.float32, nullcontext),
    "bfloat16 autocast": (torch.float32, IN_BFLOAT16),
    "bfloat16 weights": (torch.bfloat16, nullcontext),
}
#: Which layouts a model may take; the names are what the table says of them.
CONTROL = ", padding on the left"
PADDING = {"": Layouts(), CONTROL: Layouts(behind=False)}
DEAD_ZONES = (1e-4, 0.03)
LONGEST_FRONT = 24  # random tokens in front of a prompt, below this number: the task's own prompts are alike


def lengthened(prompts: list[list[int]], vocabulary: int) -> list[list[int]]:
    """The prompts with random tokens in front of them, so that their lengths differ."""
    draw = random.Random(0)
    return [[*draw.choices(range(5, vocabulary), k=draw.randrange(LONGEST_FRONT)), *prompt] for prompt in prompts]


def written(student: Any, prompts: list[list[int]], tokenizer: Any) -> TokenBatch:
    """One rollout for each prompt, in float32."""
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = GenerationConfig(max_new_tokens=48, do_sample=True, temperature=1.0, top_k=0, **ends)
    with torch.no_grad():
        completions = generate_completions(student, prompts, config)
    return TokenBatch.from_lists(prompts, completions, tokenizer.pad_token_id, CPU)


@torch.no_grad()
def in_float64(model: Any, batch: TokenBatch) -> Tensor:
    """`(B, T)` log-probs from plain logits of each row alone; the oracle, which knows of no layout."""
    model, result = copy.deepcopy(model).double(), torch.zeros(batch.completion_ids.shape, dtype=torch.float64)
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row, batch.prompt_mask[row] == 1]
        completion = batch.completion_ids[row, batch.completion_mask[row] == 1]
        logits = model(torch.cat([prompt, completion]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(dim=-1).gather(1, completion.unsqueeze(1))
        result[row, : len(completion)] = logps.squeeze(1)
    return result


def prepared(model: Any, dtype: torch.dtype, layouts: Layouts) -> Any:
    """A copy with a fused head, in evaluation mode."""
    model = copy.deepcopy(model).to(dtype).eval()
    add_fused_head(model, 1.0, False)
    restrict_layouts(model, layouts)
    return model


def as_trained(student: Any, batch: TokenBatch, rows: int, *, checkpointing: bool) -> Tensor:
    """`(B, T)` log-probs from the forwards of training steps: rows of like length together, and a graph."""
    student.train()
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    result = torch.zeros(batch.completion_ids.shape)
    for chosen in batch.joined()[1].sum(dim=1).argsort(descending=True, stable=True).split(rows):
        part = batch.select(chosen)
        width = part.completion_ids.size(1)
        result[chosen, :width] = fused_forward(student, *part.joined(), width).logps.detach()
    return result


@torch.no_grad()
def as_scored(model: Any, batch: TokenBatch) -> Tensor:
    """`(B, T)` log-probs as those of a frozen model."""
    every = torch.ones(len(batch), dtype=torch.bool)
    return score_rows(lambda *rows: fused_forward(model, *rows).logps, batch, every, batch.joined()[0].numel())


def figures(noise: Tensor, a2: Tensor, exact: Tensor) -> dict[str, float]:
    """What the dead zones make of the noise, and of a2 against its exact signs; `(N,)` each."""
    right = a2.sign() == exact.sign()
    result = {"quantile": float(noise.abs().quantile(0.95)), "largest": float(noise.abs().max())}
    for zone in DEAD_ZONES:
        result |= {
            f"noise above {zone:g}": share(noise.abs() > zone),
            f"wrong at {zone:g}": share((a2.abs() > zone) & ~right),
            f"lost at {zone:g}": share(a2.abs()[right] <= zone),
        }
    return result


def share(tokens: Tensor) -> float:
    """Of all of them."""
    return float(tokens.double().mean())


def line(name: str, found: dict[str, float]) -> Ratio:
    """One line of the table."""
    signs = [f"at {z:g} wrong {found[f'wrong at {z:g}']:.2%}, lost {found[f'lost at {z:g}']:.1%}" for z in DEAD_ZONES]
    noise = [
        f"noise above 1e-4 {found['noise above 0.0001']:.2%}",
        f"95% of it up to {found['quantile']:.2g}, all up to {found['largest']:.2g}",
    ]
    target = "" if CONTROL in name else ">= 0.95"
    return Ratio(f"{name}: neutral", 1 - found["noise above 0.0001"], target, "; ".join([*noise, *signs]))


def main() -> None:
    args = arguments(__doc__ or "", problems=64, rows=16, student="", teacher="", dataset="")
    paths = [given or resolve(f"builtin/arithmetic-{role}") for role, given in vars(args).items() if role in ROLES]
    student, teacher = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths)
    tokenizer = AutoTokenizer.from_pretrained(paths[0])
    problems = first_rows(load_splits(args.dataset or resolve("builtin/arithmetic"))["train"], args.problems)
    prompts = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for prompt in problems["prompt"]
    ]
    batch = written(student, lengthened(prompts, len(tokenizer)), tokenizer)
    tokens = batch.completion_mask != 0
    exact = (in_float64(teacher, batch) - in_float64(student, batch))[tokens]
    found = {}
    for name, checkpointing, padding in progress(list(product(PRECISIONS, (False, True), PADDING)), "noise"):
        dtype, precision = PRECISIONS[name]
        models = [prepared(model, dtype, PADDING[padding]) for model in (student, student, teacher)]
        with precision():
            trained = as_trained(models[0], batch, args.rows, checkpointing=checkpointing)
            noise, a2 = ((as_scored(model, batch) - trained)[tokens].double() for model in models[1:])
        found[f"{name}, checkpointing {'on' if checkpointing else 'off'}{padding}"] = figures(noise, a2, exact)
    lines = [line(*item) for item in found.items()]
    show("noise", lines, {"figures": found, "tokens": int(tokens.sum()), "settings": vars(args)})


if __name__ == "__main__":
    main()
