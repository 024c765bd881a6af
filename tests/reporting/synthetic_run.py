"""A log history as a run of some eighty steps leaves it."""

import math
import random


def log_history(num_steps: int = 80, seed: int = 0) -> list[dict]:
    source = random.Random(seed)

    def noisy(value: float, share: float = 0.06) -> float:
        return value * (1 + source.gauss(0, share))

    log = []
    for step in range(1, num_steps + 1):
        done = step / num_steps
        learnt = 1 - math.exp(-3 * done)
        consensus, conflict = noisy(0.22 + 0.1 * learnt), noisy(0.36 - 0.12 * learnt)
        entry = {
            "step": step, "epoch": done, "loss": 0.0, "learning_rate": 7e-4 * (1 - done),
            "reward": min(1.0, noisy(0.2 + 0.42 * learnt, 0.1)), "reward_std": 0.3,
            "entropy": noisy(0.7), "grad_norm": noisy(2.4 - 1.6 * learnt, 0.15),
            "completions/mean_length": noisy(36 - learnt),
            "completions/clipped_ratio": max(0, noisy(0.08 - 0.07 * learnt)),
            "gate/consensus": consensus, "gate/conflict": conflict, "gate/neutral": 1 - consensus - conflict,
            "gate/sign_flips": 0.01 * done,
            "gate/advantage_consensus": noisy(0.5), "gate/advantage_neutral": noisy(-0.02),
            "gate/advantage_conflict": noisy(-0.6 * (1 - 0.5 * learnt)),
            "time/rollout": noisy(0.35), "time/verify": noisy(0.05), "time/teacher": noisy(0.12),
            "time/reference": noisy(0.1), "time/loss": noisy(0.3),
        }  # fmt: skip
        kl = 0.9 * (1 - 0.8 * learnt)
        for suffix, factor in (("", 1.0), ("/right", 0.6), ("/wrong", 1.25)):
            entry[f"teacher/kl_k1{suffix}"] = noisy(kl * factor)
            entry[f"teacher/kl_k3{suffix}"] = noisy(kl * factor * 1.2)
        if step <= 0.35 * num_steps:
            entry |= {
                "anchor/alpha": 0.2 if step <= 0.3 * num_steps else 0.1, "anchor/loss": noisy(1.2 - 2 * done),
                "anchor/verified_share": min(1.0, noisy(0.88)), "time/anchor": noisy(0.2),
            }  # fmt: skip
        log.append(entry)
    log.append({"step": num_steps, "eval_reward": 0.5, "eval_gate/consensus": 0.3})
    log.append({"step": num_steps, "train_runtime": 93.4, "train_loss": 0.0})
    return log


def result(avg: float, interval: tuple[float, float], model: str = "student", **changes):
    from sg_opd_trl.evaluation import EvaluationResult

    settings = {
        "model": model, "num_problems": 200, "num_samples": 8, "k": 8, "avg_at_k": avg, "avg_interval": interval,
        "pass_at_k": 0.9, "pass_interval": (0.85, 0.95), "abstained": 3, "truncated": 17, "mean_length": 35.2,
        "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 48, "seed": 1, "seconds": 12.5,
    }  # fmt: skip
    return EvaluationResult(**(settings | changes))
