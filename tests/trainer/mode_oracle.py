"""The losses of `distillation_mode` written once more: float64, loops over rows, tokens and vocabulary.

Routes, advantages and the anchor come from `oracle`; nothing of `sg_opd_trl` is used here.
"""

import math
from collections import Counter
from typing import Any

import torch

from trainer.oracle import (
    Row,
    Step,
    Weights,
    advantage,
    anchor_loss,
    clipped,
    float64_model,
    group_advantages,
    token_class,
)

Distribution = list[float]


def distributions(model: torch.nn.Module, row: Row, temperature: float) -> torch.Tensor:
    """Log-probs over the whole vocabulary at every completion token, `(T, V)`."""
    logits = model(torch.tensor([row.prompt + row.completion])).logits[0] / temperature
    assert logits.dtype == torch.float64
    return logits[len(row.prompt) - 1 : -1].log_softmax(-1)


def target(args: Any, kind: str, a1: float, a2: float) -> tuple[float, float]:
    """Lambda and scale of a token's target."""
    mode, cells = args.disagree_mode, args.disagree_cell_lambdas
    if kind == "ungated" or (kind == "neutral" and args.neutral_mode == "base"):
        return args.lambda_base, 1.0
    if kind == "consensus":
        return ((cells[0] if a2 > 0 else cells[3]) if mode == "cells" else args.lambda_high), 1.0
    return {
        "interp": (1.0, args.disagree_interp_beta),
        "interp_lambda": (args.disagree_interp_beta, 1.0),
        "preserve": (args.lambda_base, 1.0),
        "cells": (cells[2] if a2 > 0 else cells[1], 1.0),
    }[mode]


def reverse_kl(student: torch.Tensor, teacher: Distribution, reference: Distribution, lam: float) -> torch.Tensor:
    """KL(p || q) over the tokens given, both normalised over them; `student` are log-probs or logits with gradient."""
    powers = [math.exp(lam * t + (1 - lam) * r) for t, r in zip(teacher, reference, strict=True)]
    own = torch.exp(student) / torch.exp(student).sum()
    return sum(p * (p.log() - math.log(q / sum(powers))) for p, q in zip(own, powers, strict=True))


def matching_loss(args: Any, p: torch.Tensor, t: torch.Tensor, r: torch.Tensor, lam: float) -> torch.Tensor:
    """Of one token, from log-probs `(V,)` of student, teacher and reference."""
    if args.distillation_mode == "full_logits":
        return reverse_kl(p, t.tolist(), r.tolist(), lam)
    chosen = sorted(range(len(t)), key=lambda v: -float(t[v]))[: args.distillation_topk]
    if args.distillation_mode == "topk_logits":
        return reverse_kl(p[chosen], t[chosen].tolist(), r[chosen].tolist(), lam)
    scale = args.asymmetric_forward_kl_scale or 1 / args.distillation_topk
    return scale * sum(math.exp(t[v]) * (float(t[v]) - p[v]) for v in chosen)


def weights(args: Any, a2: list[float]) -> list[float]:
    """phi and the prefix importance weight of a row's tokens."""
    phi = [1.0 if args.stability_tau is None else min(1.0, args.stability_tau / abs(a)) for a in a2]
    mean = sum(phi) / len(phi)
    total, seen, result = sum(map(abs, a2)), 0.0, []
    for value, a in zip(phi, a2, strict=True):
        result.append(value / mean * (1 + args.iw_opd_gamma * (1 - seen / total)))
        seen += abs(a)
    return result


def mode_oracle(args: Any, step: Step) -> tuple[Weights, Counter]:
    """Gradient of the step, and how many tokens went which way."""
    student, *frozen = map(float64_model, (step.student, step.behaviour, step.teacher, step.reference))
    counts: Counter = Counter()
    tokens, rows = sum(len(row.completion) for row in step.rollouts), len(step.rollouts)
    loss = torch.zeros((), dtype=torch.float64)
    for row, a1 in zip(step.rollouts, group_advantages(), strict=True):
        current = distributions(student, row, args.temperature)
        with torch.no_grad():
            behaviour, teacher, reference = (distributions(model, row, args.temperature) for model in frozen)
        sampled = [[float(x[t, v]) for t, v in enumerate(row.completion)] for x in (behaviour, teacher, reference)]
        a2 = [t - s for s, t in zip(*sampled[:2], strict=True)]
        for t, weight in enumerate(weights(args, a2)):
            ls, lt, lr = (values[t] for values in sampled)
            kind = token_class(args, a1, a2[t])
            counts[kind] += 1
            if args.distillation_mode == "asymmetric":
                if math.exp(lt) - math.exp(ls) > args.asymmetric_threshold:
                    counts["policy gradient"] += 1
                    routed = weight * advantage(args, kind, a1, ls, lt, lr)
                    token_loss = -clipped(args, current[t, row.completion[t]], ls, routed)
                else:
                    counts["forward KL"] += 1
                    token_loss = weight * matching_loss(args, current[t], teacher[t], reference[t], 1.0)
            else:
                lam, scale = target(args, kind, a1, a2[t])
                counts[f"lambda {lam:g}"] += 1
                token_loss = weight * scale * matching_loss(args, current[t], teacher[t], reference[t], lam)
            loss = (
                loss
                + token_loss
                / {
                    "grpo": rows * len(row.completion),
                    "bnpo": tokens,
                    "dapo": tokens,
                    "dr_grpo": rows * args.max_completion_length,
                }[args.loss_type]
            )
    if step.alpha:
        loss = loss + step.alpha * anchor_loss(args, student, step.teacher_rollouts)
    loss.backward()
    return {name: p.grad for name, p in student.named_parameters()}, counts
