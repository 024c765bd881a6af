"""One step of SG-OPD on the real model once more: plain logits, one row at a time, sums over rows and tokens.

Equations and gate are `oracle`'s. Sums are in float64; the model itself runs in float32, as it does in training: there
is nothing that a real model's float64 would add to that of the tiny ones.
"""

from typing import Any

import torch
from oracle import Row, advantage, gate, group_advantages
from torch import Tensor


def log_probs(model: Any, row: Row, temperature: float) -> Tensor:
    """Of every completion token, `(T,)` float64, from logits over the whole vocabulary; no padding, no other row."""
    logits = model(torch.tensor([row.prompt + row.completion])).logits[0].double() / temperature
    predicted = logits[len(row.prompt) - 1 : -1]
    return predicted.gather(1, torch.tensor(row.completion)[:, None])[:, 0] - predicted.logsumexp(1)


def step_gradient(
    args: Any,
    model: Any,
    rollouts: list[Row],
    verdicts: list[float | None],
    teacher_prompts: list[list[int]],
    anchor: list[Row],
) -> tuple[dict[str, Tensor], list[str]]:
    """Of one on-policy step whose student, teacher and reference are one model; the teacher has prompts of its own.

    Args:
        args: of the trainer.
        model: student, teacher and reference.
        rollouts: of the student, in groups.
        verdicts: on them.
        teacher_prompts: what the teacher reads before each of them.
        anchor: the teacher's rollouts that were judged right, after the student's prompt.

    Returns:
        Gradient by parameter, and the class of every token.
    """
    classes: list[str] = []
    model.requires_grad_(True).zero_grad()
    a1 = group_advantages(verdicts, args.num_generations)
    for row, read, signal in zip(rollouts, teacher_prompts, a1, strict=True):
        with torch.no_grad():
            taught = log_probs(model, Row(read, row.completion), args.temperature).tolist()
        logps = log_probs(model, row, args.temperature)
        own = logps.tolist()  # the reference's too, which is the student before the first step
        damped = [
            min(1.0, args.stability_tau / abs(t - s)) if t != s else 1.0 for s, t in zip(own, taught, strict=True)
        ]
        loss = torch.zeros((), dtype=torch.float64)
        for logp, s, t, phi in zip(logps, own, taught, damped, strict=True):
            classes.append(gate(signal, t - s, args.gate_dead_zone))
            weight = phi / (sum(damped) / len(damped))
            loss = loss - weight * advantage(args, classes[-1], signal, s, t, s) * logp
        (loss / (len(rollouts) * len(own))).backward()
    tokens = sum(len(row.completion) for row in anchor)
    for row in anchor:
        logps = log_probs(model, row, args.temperature)
        p = logps.detach().exp()
        chord = p * (1 - p)
        (-args.teacher_sft_alpha_start * (chord / chord.mean() * logps).sum() / tokens).backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.requires_grad_(False).zero_grad()
    return gradient, classes
