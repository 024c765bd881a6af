"""The equations and the whole loss written once more: float64, loops over rows, tokens and vocabulary.

Eq. 4-8 of SG-OPD (arXiv:2606.09304) token by token, each `disagree_mode` by hand; on them Eq. 12, one row per forward,
and the losses of `distillation_mode`. Nothing of `sg_opd_trl` is used here, its table of routes least of all.
`args` are the trainer's, or anything else with the settings that are read.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

import torch
from tiny import tiny_model

# A mixed group, a group without variance, a mixed group with an abstention.
VERDICTS = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, None, 0.0, 1.0]
GROUP = 4
EOS = 1  # of `tiny.tiny_tokenizer`
Weights = dict[str, torch.Tensor]
Distribution = list[float]


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


def group_advantages(verdicts: list[float | None] = VERDICTS, size: int = GROUP) -> list[float]:
    result = []
    for first in range(0, len(verdicts), size):
        group = verdicts[first : first + size]
        judged = [v for v in group if v is not None]
        mean = sum(judged) / len(judged)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in judged) / (len(judged) - 1))
        result += [0.0 if v is None or len(set(judged)) == 1 else (v - mean) / (deviation + 1e-4) for v in group]
    return result


def gate(a1: float, a2: float, dead_zone: float) -> str:
    """Eq. 4, its zeros as a class of their own."""
    if math.isnan(a1) or abs(a1) <= 1e-6 or a2 == 0 or abs(a2) <= dead_zone:
        return "neutral"
    return "consensus" if a1 * a2 > 0 else "conflict"


def token_class(args: Any, a1: float, a2: float) -> str:
    """The class of a token of a run in float32."""
    assert abs(abs(a2) - args.gate_dead_zone) > 1e-5, "float32 could decide this token otherwise"
    return gate(a1, a2, args.gate_dead_zone) if args.sign_gated_extrapolation else "ungated"


def upwards(a1: float, a2: float) -> bool:
    """Which cell a token is in, by a2; at a2 = 0 by the opposite of a1."""
    return a2 > 0 or (a2 == 0 and a1 < 0)


def advantage(args: Any, kind: str, a1: float, ls: float, lt: float, lr: float) -> float:
    """Eq. 5-8: the advantage of a token of a class."""

    def extrapolated(lam: float) -> float:
        return lam * lt + (1 - lam) * lr - ls

    a2, mode, cells = lt - ls, args.disagree_mode, args.disagree_cell_lambdas
    if kind == "ungated" or (kind == "neutral" and args.neutral_mode == "base"):
        return extrapolated(args.lambda_base)
    if kind == "consensus":
        if mode == "cells":
            return extrapolated(cells[0] if upwards(a1, a2) else cells[3])
        return extrapolated(args.lambda_high)
    return {
        "interp": args.disagree_interp_beta * a2,
        "interp_lambda": extrapolated(args.disagree_interp_beta),
        "preserve": extrapolated(args.lambda_base),
        "grpo": 0.0 if math.isnan(a1) else a1,
        "cells": extrapolated(cells[2] if upwards(a1, a2) else cells[1]),
    }[mode]


def target(args: Any, kind: str, a1: float, a2: float) -> tuple[float, float]:
    """Lambda and scale of a token's target distribution; `grpo` has none for conflict tokens."""
    mode, cells = args.disagree_mode, args.disagree_cell_lambdas
    if kind == "ungated" or (kind == "neutral" and args.neutral_mode == "base"):
        return args.lambda_base, 1.0
    if kind == "consensus":
        return ((cells[0] if upwards(a1, a2) else cells[3]) if mode == "cells" else args.lambda_high), 1.0
    return {
        "interp": (1.0, args.disagree_interp_beta),
        "interp_lambda": (args.disagree_interp_beta, 1.0),
        "preserve": (args.lambda_base, 1.0),
        "cells": (cells[2] if upwards(a1, a2) else cells[1], 1.0),
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
    written = [r for r in rollouts if r.completion[0] != EOS]  # an end token alone is nothing to learn
    kept = [r for r in written if keep_all or (len(r.completion) + r.completion[0]) % 2 == 0]
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


# --- the losses of `distillation_mode` -------------------------------------------------------------------------------
def distributions(model: torch.nn.Module, row: Row, temperature: float) -> torch.Tensor:
    """Log-probs over the whole vocabulary at every completion token, `(T, V)`."""
    logits = model(torch.tensor([row.prompt + row.completion])).logits[0] / temperature
    assert logits.dtype == torch.float64
    return logits[len(row.prompt) - 1 : -1].log_softmax(-1)


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
