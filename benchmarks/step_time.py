"""Time of one optimizer step on the same long-tailed rows: ours against TRL's trainers.

    python benchmarks/step_time.py [--repeats 5] [--longest 766] [--hidden 256] [--layers 4] [--vocab 8192]

Ratios above 1 mean that ours is faster. Rollouts are injected: generation is not part of any time.
"""

from typing import Any

import torch
from harness import (
    ROLLOUTS_PER_PROMPT,
    Rollouts,
    Shape,
    Stepper,
    alternating_verifier,
    arguments,
    build_model,
    build_tokenizer,
    common_settings,
    completion_lengths,
    interleaved_medians,
    make_rollouts,
    show,
    synchronise,
)
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from sg_opd_trl import SGOPDConfig, SGOPDTrainer

MICRO_BATCH, MICRO_BATCHES = 4, 8
ROWS = MICRO_BATCH * MICRO_BATCHES


def ours(shape: Shape, rollouts: Rollouts, **settings: Any) -> Stepper:
    args = SGOPDConfig(
        **common_settings(MICRO_BATCH, MICRO_BATCHES),
        num_generations=ROLLOUTS_PER_PROMPT,
        teacher_sampling_enable=False,
        **settings,
    )
    trainer = SGOPDTrainer(
        build_model(shape, 0),
        alternating_verifier,
        args,
        rollouts.dataset(),
        processing_class=build_tokenizer(shape.vocab_size),
        teacher_model=build_model(shape, 1),
        teacher_processing_class=build_tokenizer(shape.vocab_size),
    )
    return Stepper(trainer, rollouts)


def grpo(shape: Shape, rollouts: Rollouts) -> Stepper:
    args = GRPOConfig(**common_settings(MICRO_BATCH, MICRO_BATCHES), num_generations=ROLLOUTS_PER_PROMPT)
    trainer = GRPOTrainer(
        build_model(shape, 0),
        alternating_verifier,
        args,
        rollouts.dataset(),
        processing_class=build_tokenizer(shape.vocab_size),
    )
    return Stepper(trainer, rollouts)


def distillation(shape: Shape, rollouts: Rollouts) -> Stepper:
    args = DistillationConfig(**common_settings(MICRO_BATCH, MICRO_BATCHES, beta=1.0))
    trainer = DistillationTrainer(
        build_model(shape, 0),
        build_model(shape, 1),
        args,
        rollouts.dataset(),
        processing_class=build_tokenizer(shape.vocab_size),
    )
    return Stepper(trainer, rollouts)


def bare_scoring(stepper: Stepper) -> Any:
    """GRPO's step plus a plain teacher and reference forward over its own micro-batches."""
    from sg_opd_trl.trl_seam import add_fused_head, fused_log_probs

    trainer = stepper.trainer
    config = trainer.model.config
    shape = Shape(config.hidden_size, config.num_hidden_layers, config.vocab_size)
    models = [build_model(shape, seed) for seed in (1, 0)]
    for model in models:
        add_fused_head(model, 1.0, False)

    def step() -> float:
        import time

        synchronise()
        start = time.perf_counter()
        stepper()
        with torch.no_grad():
            for model in models:
                for batch in trainer._buffered_inputs:
                    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
                    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
                    fused_log_probs(model, ids, mask, batch["completion_ids"].size(1))
        synchronise()
        return time.perf_counter() - start

    return step


def compare(kind: str, shape: Shape, longest: int, repeats: int) -> None:
    rollouts = make_rollouts(completion_lengths(kind, ROWS, longest), shape.vocab_size)
    base = grpo(shape, rollouts)
    steps = {
        "ours: SG-OPD": ours(shape, rollouts),
        "ours: OPD": ours(shape, rollouts, sign_gated_extrapolation=False),
        "TRL GRPO": base,
        "TRL GRPO + teacher + reference": bare_scoring(grpo(shape, rollouts)),
        "TRL Distillation": distillation(shape, rollouts),
    }
    seconds = interleaved_medians(steps, repeats)
    rows = [
        [name, f"{value * 1000:.0f}", f"{value / seconds['ours: SG-OPD']:.2f}", f"{value / seconds['ours: OPD']:.2f}"]
        for name, value in seconds.items()
    ]
    title = f"Step time, {kind}: {ROWS} rows, {rollouts.tokens} tokens, {rollouts.padding:.0%} padding in TRL's layout"
    show(title, rows, ["trainer", "ms", "/ SG-OPD", "/ OPD"], {"seconds": seconds, "shape": vars(shape), "kind": kind})


def main() -> None:
    args = arguments(__doc__ or "", repeats=5, longest=766, hidden=256, layers=4, vocab=8192)
    shape = Shape(args.hidden, args.layers, args.vocab)
    for kind in ("long-tailed", "fixed"):
        compare(kind, shape, args.longest, args.repeats)


if __name__ == "__main__":
    main()
