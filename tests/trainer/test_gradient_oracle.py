"""The gradient of an optimizer step against the float64 oracle, for every route, anchor and weight.

`LIMIT` is on the norm of the difference over the norm of the gradient, all parameters together; the trainer runs in
float32 on padded batches.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from oracle import GROUP, VERDICTS, Row, Step, Weights, oracle
from tiny import (
    SPECIAL,
    ScriptedVerifier,
    StepRecorder,
    copied_weights,
    relative_difference,
    save_pair,
    script_generation,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
)
from transformers import Qwen3ForCausalLM

from sg_opd_trl import core

LIMIT = 1e-5
TEACHER, REFERENCE = 1, 2  # seeds of the models


def rows_of(call: tuple[list, list[list[int]]]) -> list[Row]:
    vocab = tiny_tokenizer().get_vocab()
    questions = [prompt[0]["content"] for prompt in call[0]]
    prompts = [[SPECIAL.index("user"), *(vocab[c] for c in q), 1, SPECIAL.index("assistant")] for q in questions]
    return [Row(p, list(c)) for p, c in zip(prompts, call[1], strict=True)]


ANCHOR = {
    "teacher_sampling_enable": True,
    "teacher_sampling_ratio": 0.5,  # as many teacher prompts as student prompts: 3
    "teacher_num_generations": 3,
    "teacher_sampling_phase1_end_frac": 1.0,
    "teacher_sampling_phase2_end_frac": 1.0,
    "teacher_sft_alpha_start": 0.7,
}


def train(folder: Path, settings: dict, *, steps: int = 1, **arguments: Any) -> tuple[Any, list[Weights], list[Step]]:
    """Arguments, gradients and facts of a run; the facts' `alpha` is left to the caller."""
    verifier, recorder = ScriptedVerifier(VERDICTS), StepRecorder()
    base = {
        "per_device_train_batch_size": 12, "num_generations": GROUP, "max_steps": steps, "max_grad_norm": 0.0,
        "teacher_sampling_enable": False, "gate_dead_zone": 0.05, "stability_tau": 0.3, "learning_rate": 1e-2,
    }  # fmt: skip
    arguments = {"model": script_generation(tiny_model(0)), "reference_model": tiny_model(REFERENCE)} | arguments
    teacher = tiny_model(TEACHER)
    reference = copied_weights(arguments["reference_model"] or tiny_model(0))
    trainer = tiny_trainer(
        folder,
        settings=base | settings,
        reward_funcs=verifier,
        teacher_model=script_generation(teacher),
        callbacks=[recorder],
        **arguments,
    )
    trainer.train()
    student_calls = [rows_of(call) for call in verifier.calls if len(call[1]) == len(VERDICTS)]
    teacher_calls = [rows_of(call) for call in verifier.calls if len(call[1]) != len(VERDICTS)]
    student_calls = [rows for rows in student_calls for _ in range(trainer.args.num_iterations)]
    teacher_calls += [[]] * (steps - len(teacher_calls))
    weights = recorder.weights
    assert len(recorder.steps) == steps == len(student_calls)
    facts = zip(weights, student_calls, teacher_calls, strict=True)
    made = [Step(w, w, copied_weights(teacher), reference, s, t, 0.0) for w, s, t in facts]
    return trainer.args, recorder.steps, made


def compare(args: Any, gradient: Weights, step: Step) -> Counter:
    expected, classes = oracle(args, step)
    difference = relative_difference(gradient, expected)
    assert difference < LIMIT, f"relative difference {difference:.2e}"
    return classes


#: Values that tell the routes apart; a mode that is not among them is tried as it is.
TELLING: dict[str, dict] = {
    "interp": {"disagree_interp_beta": 0.7},
    "interp_lambda": {"disagree_interp_beta": 0.7},
    "preserve": {"lambda_base": 1.25},
    "cells": {"disagree_cell_lambdas": [1.6, 0.8, 1.2, 1.4]},
}
MODES = {mode: {"disagree_mode": mode} | TELLING.get(mode, {}) for mode in core.DISAGREE_MODES}


@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
@pytest.mark.parametrize("neutral_mode", ["base", "conflict"])
@pytest.mark.parametrize("mode", MODES)
def test_every_route(tmp_path: Path, mode: str, neutral_mode: str, anchored: bool) -> None:
    settings = MODES[mode] | {"neutral_mode": neutral_mode} | (ANCHOR if anchored else {})
    args, (gradient,), (step,) = train(tmp_path, settings)
    classes = compare(args, gradient, step._replace(alpha=0.7 if anchored else 0.0))
    assert min(classes[kind] for kind in ("consensus", "conflict", "neutral")) >= 5
    without_signal = [*step.rollouts[4:8], step.rollouts[9]]  # equal verdicts, and an abstention
    assert classes["neutral"] > sum(len(row.completion) for row in without_signal), "no token in the dead zone"


@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
@pytest.mark.parametrize("lambda_base", [1.0, 1.25])
def test_gate_off(tmp_path: Path, lambda_base: float, anchored: bool) -> None:
    settings = {"sign_gated_extrapolation": False, "lambda_base": lambda_base} | (ANCHOR if anchored else {})
    reference = None if lambda_base == 1 else tiny_model(REFERENCE)
    args, (gradient,), (step,) = train(tmp_path, settings, reference_model=reference)
    assert set(compare(args, gradient, step._replace(alpha=0.7 if anchored else 0.0))) == {"ungated"}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("phi", ["chord", "dft", "none"])
@pytest.mark.parametrize("reduction", ["token_mean", "seq_mean", "sum"])
def test_anchor_reductions(tmp_path: Path, reduction: str, phi: str, micro_batches: int) -> None:
    sizes = {"per_device_train_batch_size": 12 // micro_batches, "gradient_accumulation_steps": micro_batches}
    settings = ANCHOR | sizes | {"teacher_sft_reduction": reduction, "teacher_sft_phi": phi}
    args, (gradient,), (step,) = train(tmp_path, settings)
    compare(args, gradient, step._replace(alpha=0.7))
    kept = [row for row in step.teacher_rollouts if (len(row.completion) + row.completion[0]) % 2 == 0]
    assert 1 < len(kept) < len(step.teacher_rollouts) == 9
    assert len({len(row.completion) for row in kept}) > 1


OTHERS = {
    "only_conflicts_use_the_reference": {"lambda_high": 1.0} | MODES["interp_lambda"],
    "only_neutral_tokens_use_the_reference": {"lambda_high": 1.0, "lambda_base": 1.25},
    "tau_none": {"stability_tau": None},
    "tau_batch": {"stability_norm": "batch"},
    "tau_batch_accumulated": {
        "stability_norm": "batch", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3
    },
    "tau_unnormalised": {"stability_norm": "none"},
    "unfiltered": ANCHOR | {"teacher_sampling_filter_correct": False},
    "temperature": ANCHOR | {"temperature": 0.7},
    "dapo": {"loss_type": "dapo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "truncated": {"mask_truncated_completions": True},
    "truncated_tau_batch": {"mask_truncated_completions": True, "stability_norm": "batch"},
    "budget_of_one_row": {"max_tokens_per_scoring_batch": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings(tmp_path: Path, name: str) -> None:
    args, (gradient,), (step,) = train(tmp_path, OTHERS[name])
    classes = compare(args, gradient, step._replace(alpha=0.7 if "teacher_sampling_ratio" in OTHERS[name] else 0.0))
    every_token = sum(len(row.completion) for row in step.rollouts)
    assert (classes.total() == every_token) != args.mask_truncated_completions


def test_the_initial_student_is_the_reference_and_alpha_is_annealed(tmp_path: Path) -> None:
    # 4 steps, phase 1 ends after step 1, phase 2 after step 3:
    # alpha = .7, .1 + .6/2 (1 + cos(pi/2)) = .4, .1, 0
    schedule = {"teacher_sampling_phase1_end_frac": 0.25, "teacher_sampling_phase2_end_frac": 0.75}
    settings = ANCHOR | schedule | {"teacher_sft_alpha_end": 0.1}
    args, gradients, steps = train(tmp_path, settings, steps=4, reference_model=None)
    for gradient, step, alpha in zip(gradients, steps, (0.7, 0.4, 0.1, 0.0), strict=True):
        compare(args, gradient, step._replace(alpha=alpha))
    assert relative_difference(steps[3].student, steps[0].student) > 0.01, "the student hardly moved from its start"


@pytest.mark.parametrize("unbiased", [True, False])
def test_kl_penalty_and_extrapolation_share_trl_reference(tmp_path: Path, unbiased: bool) -> None:
    student = script_generation(Qwen3ForCausalLM.from_pretrained(save_pair(tmp_path / "student", 0)))
    settings = {"beta": 0.3, "use_bias_correction_kl": unbiased}
    args, gradients, steps = train(tmp_path, settings, steps=2, reference_model=None, model=student)
    for gradient, step in zip(gradients, steps, strict=True):
        compare(args, gradient, step)


def test_second_inner_update_keeps_signals_and_clips(tmp_path: Path) -> None:
    settings = {"num_iterations": 2, "learning_rate": 0.05}
    args, gradients, (first, second) = train(tmp_path, settings, steps=2)
    second = second._replace(behaviour=first.student)
    for gradient, step in zip(gradients, (first, second), strict=True):
        compare(args, gradient, step)
    _, unclipped = oracle_without_clipping(args, second)
    assert relative_difference(unclipped, gradients[1]) > 0.01, "no ratio was clipped"


def oracle_without_clipping(args: Any, step: Step) -> tuple[Any, Weights]:
    args.epsilon = args.delta = 1e9
    return args, oracle(args, step)[0]
