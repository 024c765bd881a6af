"""Eq. 12 of SG-OPD (arXiv:2606.09304) written once more: float64, loops over rows and tokens, one row per forward.

Nothing of `sg_opd_trl` is used here.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

import torch
from tiny import tiny_model

# A mixed group, a group without variance, a mixed group with an abstention.
VERDICTS = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, None, 0.0, 1.0]
GROUP = 4
Weights = dict[str, torch.Tensor]


class Row(NamedTuple):
    """A rollout as the verifier saw it."""

    prompt: list[int]
    completion: list[int]


class Step(NamedTuple):
    """Everything that shapes one optimizer step."""

    student: Weights
    behaviour: Weights
    teacher: Weights
    reference: Weights
    rollouts: list[Row]
    teacher_rollouts: list[Row]
    alpha: float


def float64_model(weights: Weights) -> torch.nn.Module:
    model = tiny_model(0)
    model.load_state_dict(weights)
    for module in model.double().eval().modules():
        if "RMSNorm" in type(module).__name__:
            # The model's own normalisation computes in float32 whatever its weights are.
            module.forward = lambda x, norm=module: (
                norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
            )
    return model


def log_probs(model: torch.nn.Module, row: Row, temperature: float) -> list[torch.Tensor]:
    """Of every completion token, from logits over the whole vocabulary; no padding, one row at a time."""
    logits = model(torch.tensor([row.prompt + row.completion])).logits[0] / temperature
    assert logits.dtype == torch.float64
    positions = range(len(row.prompt) - 1, len(row.prompt) - 1 + len(row.completion))
    return [
        logits[p, token] - torch.logsumexp(logits[p], 0) for p, token in zip(positions, row.completion, strict=True)
    ]


def group_advantages() -> list[float]:
    result = []
    for first in range(0, len(VERDICTS), GROUP):
        group = VERDICTS[first : first + GROUP]
        judged = [v for v in group if v is not None]
        mean = sum(judged) / len(judged)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in judged) / (len(judged) - 1))
        result += [0.0 if v is None or len(set(judged)) == 1 else (v - mean) / (deviation + 1e-4) for v in group]
    return result


def token_class(args: Any, a1: float, a2: float) -> str:
    assert abs(abs(a2) - args.gate_dead_zone) > 1e-5, "float32 could decide this token otherwise"
    if not args.sign_gated_extrapolation:
        return "ungated"
    if a1 == 0 or abs(a2) <= args.gate_dead_zone:
        return "neutral"
    return "consensus" if a1 * a2 > 0 else "conflict"


def advantage(args: Any, kind: str, a1: float, ls: float, lt: float, lr: float) -> float:
    def extrapolated(lam: float) -> float:
        return lam * lt + (1 - lam) * lr - ls

    a2, mode, cells = lt - ls, args.disagree_mode, args.disagree_cell_lambdas
    if kind == "ungated" or (kind == "neutral" and args.neutral_mode == "base"):
        return extrapolated(args.lambda_base)
    if kind == "consensus":
        lam = {True: cells[0], False: cells[3]}[a2 > 0] if mode == "cells" else args.lambda_high
        return extrapolated(lam)
    return {
        "interp": args.disagree_interp_beta * a2,
        "interp_lambda": extrapolated(args.disagree_interp_beta),
        "preserve": extrapolated(args.lambda_base),
        "grpo": a1,
        "cells": extrapolated(cells[2] if a2 > 0 else cells[1]),
    }[mode]


def clipped(args: Any, logp: torch.Tensor, ls: float, a: float) -> torch.Tensor:
    ratio = (logp - ls).exp()
    inside = ratio.clamp(1 - args.epsilon, 1 + args.epsilon) * a
    outside = (ratio if args.delta is None else ratio.clamp(max=args.delta)) * a
    return inside if inside.item() < outside.item() else outside


def policy_loss(args: Any, step: Step, classes: Counter) -> tuple[torch.nn.Module, torch.Tensor]:
    student, *frozen = map(float64_model, (step.student, step.behaviour, step.teacher, step.reference))
    valid = [not args.mask_truncated_completions or row.completion[-1] == 1 for row in step.rollouts]
    scores: list[Any] = []
    with torch.no_grad():
        for row in step.rollouts:
            scores.append([[float(x) for x in log_probs(model, row, args.temperature)] for model in frozen])

    def phi(i: int) -> list[float]:
        ls, lt, _ = scores[i]
        return [min(1.0, args.stability_tau / abs(t - s)) for s, t in zip(ls, lt, strict=True)]

    def mean_phi(chosen: list[int]) -> float:
        return sum(sum(phi(j)) for j in chosen) / sum(len(phi(j)) for j in chosen)

    counted = [i for i, ok in enumerate(valid) if ok]
    tokens, rows = sum(len(step.rollouts[i].completion) for i in counted), len(step.rollouts)
    loss = torch.zeros((), dtype=torch.float64)
    for i in counted:
        a1, row, (ls, lt, lr) = group_advantages()[i], step.rollouts[i], scores[i]
        norm = {"sequence": [i], "batch": counted}.get(args.stability_norm)
        for t, logp in enumerate(log_probs(student, row, args.temperature)):
            kind = token_class(args, a1, lt[t] - ls[t])
            classes[kind] += 1
            a = advantage(args, kind, a1, ls[t], lt[t], lr[t])
            if args.stability_tau is not None:
                a *= phi(i)[t] / (mean_phi(norm) if norm else 1.0)
            on_policy = step.student is step.behaviour
            gain = a * logp if on_policy else clipped(args, logp, ls[t], a)
            kl = (lr[t] - logp).exp() - (lr[t] - logp) - 1
            if args.use_bias_correction_kl:
                kl = kl * (logp - ls[t]).exp()
            scale = {
                "grpo": rows * len(row.completion), "dr_grpo": rows * args.max_completion_length, "dapo": tokens
            }[args.loss_type]  # fmt: skip
            loss = loss - (gain - args.beta * kl) / scale
    return student, loss


def anchor_loss(args: Any, student: torch.nn.Module, rollouts: list[Row]) -> torch.Tensor:
    keep_all = not args.teacher_sampling_filter_correct
    kept = [r for r in rollouts if keep_all or (len(r.completion) + r.completion[0]) % 2 == 0]
    loss = torch.zeros((), dtype=torch.float64)
    for row in kept:
        logps = log_probs(student, row, args.temperature)
        p = [math.exp(x.item()) for x in logps]
        raw = {"none": [1.0 for _ in p], "dft": p, "chord": [x * (1 - x) for x in p]}[args.teacher_sft_phi]
        scale = {
            "token_mean": sum(len(r.completion) for r in kept),
            "seq_mean": len(kept) * len(row.completion),
            "sum": 1,
        }[args.teacher_sft_reduction]
        for logp, weight in zip(logps, raw, strict=True):
            loss = loss - weight / (sum(raw) / len(raw)) * logp / scale
    return loss


def oracle(args: Any, step: Step) -> tuple[Weights, Counter]:
    classes: Counter = Counter()
    student, loss = policy_loss(args, step, classes)
    if step.alpha:
        loss = loss + step.alpha * anchor_loss(args, student, step.teacher_rollouts)
    loss.backward()
    return {name: p.grad for name, p in student.named_parameters()}, classes
