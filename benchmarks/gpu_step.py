"""One optimizer step of a 1.7B student with a 4B teacher on one GPU: ours against TRL's trainers.

    python benchmarks/gpu_step.py [--rows 32] [--micro_batch 4] [--longest 2048] [--repeats 3]
    python benchmarks/gpu_step.py --device cpu --tiny

Random weights of Qwen3's shapes, bfloat16 throughout, no gradient checkpointing, injected long-tailed rows: only
shapes matter to the time. All trainers are there at once, so that they can take turns, and share one teacher; that
takes about 60 GB before the first step. Useful tokens are those of prompts and completions, without padding. Useful
FLOPs are what these tokens need at least: forward and backward pass of the student, forward pass of the teacher, and
of the reference where it is used, the head on completion tokens alone, attention over a row's own past. Recomputed,
padded or unused work does not count. Peak memory is that of a step, above models and optimizer state.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from harness import (
    ROLLOUTS_PER_PROMPT,
    Ratio,
    Rollouts,
    Shape,
    arguments,
    build_model,
    completion_lengths,
    interleaved_medians,
    make_rollouts,
    progress,
    show,
    versus,
)

STUDENT = Shape(2048, 28, 151_936, heads=16, key_value_heads=8, head_dim=128, intermediate_size=6144, tied=True)
TEACHER = Shape(2560, 36, 151_936, heads=32, key_value_heads=8, head_dim=128, intermediate_size=9728, tied=True)
TINY = Shape(64, 1, 512, heads=2, key_value_heads=1, head_dim=32, intermediate_size=128, tied=True)
GIGABYTE = 2**30
SG_OPD, OPD, GRPO, DISTILLATION = "SG-OPD", "OPD", "TRL GRPO", "TRL Distillation"
FORWARDS = {SG_OPD: (3, 1, 1), OPD: (3, 1, 0), GRPO: (3, 0, 0), DISTILLATION: (3, 1, 0)}
"""Forward passes' worth of work on student, teacher and reference; a backward pass counts as two."""


def forward_flops(shape: Shape, prompt: int, completion: int) -> float:
    """FLOPs of one row's forward pass: two per weight and token, and attention over the past of every token."""
    heads, shared = shape.heads or 1, shape.key_value_heads or 1
    width, inner = shape.hidden_size, shape.intermediate_size or 0
    weights = width * shape.head_dim * (2 * heads + 2 * shared) + 3 * width * inner
    tokens = prompt + completion
    # q.k and weights.v: 2 FLOPs each per channel and pair; tokens * (tokens + 1) / 2 pairs.
    attention = 2 * heads * shape.head_dim * tokens * (tokens + 1)
    return shape.layers * (2 * weights * tokens + attention) + 2 * width * shape.vocab_size * completion


def useful_flops(name: str, student: Shape, teacher: Shape, rollouts: Rollouts) -> float:
    """FLOPs one optimizer step needs at least."""
    of_student, of_teacher, of_reference = FORWARDS[name]
    rows = list(zip(rollouts.prompt_tokens, map(len, rollouts.completion_ids), strict=True))
    student_forward = sum(forward_flops(student, *row) for row in rows)
    teacher_forward = sum(forward_flops(teacher, *row) for row in rows)
    return (of_student + of_reference) * student_forward + of_teacher * teacher_forward


def build_steps(args: Any, student: Shape, teacher: Shape, rollouts: Rollouts) -> dict[str, Callable[[], float]]:
    """One step function per trainer."""
    from trainers import Setup, distillation, grpo, opd, ours

    shared_teacher = build_model(teacher, 1, torch.bfloat16, args.device)

    def build(role: str) -> Any:
        return shared_teacher if role == "teacher" else build_model(student, 0, torch.bfloat16, args.device)

    setup = Setup(student, rollouts, args.micro_batch, {"use_cpu": args.device == "cpu"}, build)
    builders = {SG_OPD: ours, OPD: opd, GRPO: grpo, DISTILLATION: distillation}
    return {name: builder(setup) for name, builder in progress(builders.items(), "trainers")}


def peak_memory(step: Callable[[], float]) -> float | None:
    """Gigabytes above what is there before the step; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / GIGABYTE


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of the device by its data sheet; None where it is not known."""
    from trl.trainer.utils import get_peak_flops

    return get_peak_flops(torch.cuda.get_device_name(), "bfloat16") if device == "cuda" else None


def line(name: str, result: dict) -> Ratio:
    """Share of the peak, and what it is made of."""
    memory = "" if result["peak_gigabytes"] is None else f", {result['peak_gigabytes']:.1f} GB above the models"
    detail = f"{result['tokens_per_second']:.0f} useful tokens/s, {result['teraflops']:.3g} useful TFLOP/s{memory}"
    return Ratio(f"share of the peak: {name}", result["share_of_peak"], "", detail)


def main() -> None:
    args = arguments(
        __doc__ or "",
        device=("cuda", "cpu"),
        rows=32,
        micro_batch=4,
        longest=2048,
        repeats=3,
        tiny=False,
    )
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.stdout.write("gpu_step: no GPU: nothing measured\n")
        return
    student, teacher = (TINY, TINY) if args.tiny else (STUDENT, TEACHER)
    lengths = completion_lengths("long-tailed", args.rows, args.longest)
    rollouts = make_rollouts(lengths, student.vocab_size)
    steps = build_steps(args, student, teacher, rollouts)
    seconds = interleaved_medians(steps, args.repeats, "gpu_step")
    tokens, peak = rollouts.tokens + sum(rollouts.prompt_tokens), peak_flops(args.device)
    results = {}
    for name, step in steps.items():
        flops = useful_flops(name, student, teacher, rollouts) / seconds[name]
        results[name] = {
            "seconds": seconds[name],
            "tokens_per_second": tokens / seconds[name],
            "teraflops": flops / 1e12,
            "share_of_peak": None if peak is None else flops / peak,
            "peak_gigabytes": peak_memory(step),
        }
    ratios = [versus(seconds, slow, fast) for slow in (GRPO, DISTILLATION) for fast in (SG_OPD, OPD)]
    rows = {"rows": args.rows, "useful_tokens": tokens, "padding": rollouts.padding, "group": ROLLOUTS_PER_PROMPT}
    data = {"trainers": results, "rows": rows, "settings": vars(args)}
    show("gpu_step", [*ratios, *(line(*item) for item in results.items())], data)


if __name__ == "__main__":
    main()
