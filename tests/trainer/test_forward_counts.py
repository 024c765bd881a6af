"""How often each model runs, and on which rows."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ScriptedVerifier, save_pair, script_generation, tiny_data, tiny_model, tiny_trainer
from transformers import Qwen3ForCausalLM

from sg_opd_trl import trl_seam
from sg_opd_trl.models import forward
from sg_opd_trl.teacher_sampling.callback import AnchorStep, TeacherRollout

# Two groups of four: one mixed, one without variance.
VERDICTS = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
NO_ANCHOR = {"teacher_sampling_enable": False}
ANCHOR = {
    "teacher_sampling_ratio": 0.6,  # 3 teacher prompts for 2 student prompts
    "teacher_sampling_filter_correct": False,
    "teacher_sampling_phase1_end_frac": 1.0,
    "teacher_sampling_phase2_end_frac": 1.0,
}
TWO_STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
Rows = Counter[tuple[int, ...]]


class Forwards:
    """Every scoring forward of a model, with and without gradient, and the number of forwards that generate."""

    def __init__(self, model: Any) -> None:
        self.trained: list[Rows] = []
        self.scored: list[Rows] = []
        self.generating = 0
        self.tokens = 0
        model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: Any, arguments: tuple, keywords: dict) -> None:
        if not keywords.get("fused_lm_head"):
            self.generating += 1
            return
        rows = Counter(tuple(ids.tolist()) for ids in rows_without_padding(keywords))
        self.tokens += keywords["input_ids"].numel()
        (self.trained if torch.is_grad_enabled() else self.scored).append(rows)

    @property
    def rows_scored(self) -> Rows:
        return sum(self.scored, Counter())


def rows_without_padding(keywords: dict) -> list[torch.Tensor]:
    """The rows of a forward: behind one another, with some tokens in common, or padded."""
    if "cu_seq_lens_q" in keywords:
        lengths = keywords["cu_seq_lens_q"].diff().tolist()
        return list(keywords["input_ids"][0].split(lengths))
    if "attention_mask" not in keywords:
        plan = forward._rows.get()
        widths = [width for rows, width in plan.calls for _ in range(rows)]
        # Padding of a call repeats the row's last token.
        return [keywords["input_ids"][0, row.unique_consecutive()] for row in plan.into.split(widths)]
    pairs = zip(keywords["input_ids"], keywords["attention_mask"], strict=True)
    return [ids[mask == 1] for ids, mask in pairs]


class Run:
    """A finished run, its models watched, and the rollouts of its steps as whole rows."""

    def __init__(self, folder: Path, settings: dict, *, verdicts: Any = VERDICTS, **arguments: Any) -> None:
        verifier = ScriptedVerifier(verdicts)
        arguments = {"model": script_generation(tiny_model(0))} | arguments
        settings = TWO_STEPS | {"preflight": False} | settings  # which runs the student too
        self.trainer = tiny_trainer(folder, settings=settings, reward_funcs=verifier, **arguments)
        self.student = Forwards(self.trainer.model)
        self.teacher = Forwards(self.trainer.teacher.model)
        self.reference = Forwards(self.trainer.reference.model) if self.trainer.reference else None
        self.trl_reference = Forwards(self.trainer.ref_model) if self.trainer.ref_model else None
        self.trainer.train()
        calls = [call for call in verifier.calls if len(call[1]) == len(verdicts)]
        self.rollouts = [row for prompts, ids in calls for row in self._rows(prompts, ids)]

    def _rows(self, prompts: list, completion_ids: list[list[int]]) -> list[tuple[int, ...]]:
        prompt_ids = self.trainer.tokenize_prompts(prompts)
        return [tuple(p + c) for p, c in zip(prompt_ids, completion_ids, strict=True)]


MODES = {
    "interp": {"disagree_mode": "interp", "disagree_interp_beta": 0.7},
    "interp_lambda": {"disagree_mode": "interp_lambda", "disagree_interp_beta": 0.7},
    "preserve": {"disagree_mode": "preserve", "lambda_base": 1.25},
    "grpo": {"disagree_mode": "grpo", "neutral_mode": "conflict"},
    "cells": {"disagree_mode": "cells", "neutral_mode": "conflict"},
    "gate_off": {"sign_gated_extrapolation": False, "lambda_base": 1.25},
    "distillation": {"sign_gated_extrapolation": False, "lambda_base": 1.0},
    "checkpointing": {"gradient_checkpointing": True},
    "unnormalised": {"stability_norm": "none", "loss_type": "dapo"},
}


@pytest.mark.parametrize("anchor", [NO_ANCHOR, ANCHOR], ids=["", "anchor"])
@pytest.mark.parametrize("mode", MODES)
def test_one_policy_forward_per_micro_batch(tmp_path: Path, mode: str, anchor: dict) -> None:
    run = Run(tmp_path, MODES[mode] | anchor)
    anchors = 0 if anchor is NO_ANCHOR else 3
    assert run.student.scored == []
    assert len(run.student.trained) == 2 * 2
    assert [sum(rows.total() for rows in run.student.trained[i : i + 2]) for i in (0, 2)] == [8 + anchors] * 2
    assert Counter(run.rollouts) <= sum(run.student.trained, Counter())
    assert run.teacher.trained == []
    assert run.teacher.rows_scored == Counter(run.rollouts)


def mixed_groups(run: Run) -> Rows:
    return Counter(row for i, row in enumerate(run.rollouts) if i % 8 < 4)


REFERENCE_ROWS = {
    "interp": mixed_groups,
    "interp_lambda": mixed_groups,
    "grpo": mixed_groups,
    "preserve": lambda run: Counter(run.rollouts),
    "gate_off": lambda run: Counter(run.rollouts),
    "cells": mixed_groups,
}


@pytest.mark.parametrize("mode", REFERENCE_ROWS)
def test_the_reference_runs_on_the_rows_that_use_it(tmp_path: Path, mode: str) -> None:
    run = Run(tmp_path, NO_ANCHOR | MODES[mode])
    assert run.reference.rows_scored == REFERENCE_ROWS[mode](run)
    assert run.reference.trained == []


def test_the_reference_never_runs_without_a_mixed_group(tmp_path: Path) -> None:
    run = Run(tmp_path, NO_ANCHOR, verdicts=[1.0] * 4 + [0.0, None, 0.0, 0.0])
    assert run.reference.scored == []
    assert len(run.teacher.scored) > 0


@pytest.mark.parametrize("settings", [MODES["distillation"], {"lambda_high": 1.0}], ids=["gate_off", "gate_on"])
def test_no_reference_where_every_lambda_is_one(tmp_path: Path, settings: dict) -> None:
    trainer = Run(tmp_path, NO_ANCHOR | settings).trainer
    assert trainer.reference is None
    assert trainer.ref_model is None
    assert not trainer.reuses_trl_reference


def test_the_kl_penalty_lends_its_reference(tmp_path: Path) -> None:
    student = script_generation(Qwen3ForCausalLM.from_pretrained(save_pair(tmp_path / "student", 0)))
    run = Run(tmp_path, NO_ANCHOR | {"beta": 0.1}, model=student)
    assert run.trainer.reference is None
    assert run.trl_reference.rows_scored == Counter(run.rollouts)


INNER = {"num_iterations": 2, "max_steps": 4}


@pytest.mark.parametrize(
    ("settings", "student_scores"),
    [
        (INNER, 1),
        (INNER | {"stability_norm": "batch"}, 1),
        ({"stability_norm": "batch"}, 1),
        ({"stability_norm": "batch", "stability_tau": None}, 0),
        ({"steps_per_generation": 4}, 1),
    ],
    ids=["inner", "inner_batch_norm", "batch_norm", "batch_norm_without_tau", "long_generation"],
)
def test_documented_extra_forwards_score_each_row_once(tmp_path: Path, settings: dict, student_scores: int) -> None:
    long = "steps_per_generation" in settings
    run = Run(tmp_path, NO_ANCHOR | settings, verdicts=VERDICTS * (2 if long else 1))
    assert len(run.rollouts) == 16
    assert run.student.rows_scored == Counter(run.rollouts * student_scores)
    assert len(run.student.trained) == 2 * run.trainer.args.max_steps
    assert run.teacher.rows_scored == Counter(run.rollouts)
    assert run.reference.rows_scored == mixed_groups(run)


def test_rows_without_a_counted_token_are_not_scored(tmp_path: Path) -> None:
    run = Run(tmp_path, NO_ANCHOR | {"mask_truncated_completions": True})
    whole = Counter(row for row in run.rollouts if row[-1] == 1)
    assert 0 < whole.total() < 16
    assert run.teacher.rows_scored == whole
    assert run.reference.rows_scored == mixed_groups(run) & whole
    assert (mixed_groups(run) & whole).total() < mixed_groups(run).total()


def test_the_budget_bounds_every_scoring_forward(tmp_path: Path) -> None:
    run = Run(tmp_path, NO_ANCHOR | {"max_tokens_per_scoring_batch": 30})
    assert max(sum(len(row) for row in rows.elements()) for rows in run.teacher.scored) <= 30
    assert max(rows.total() for rows in run.teacher.scored) > 1
    assert run.teacher.rows_scored == Counter(run.rollouts)


@pytest.mark.parametrize(("alpha_end", "sampled_steps"), [(0.0, 2), (0.1, 3)])
def test_the_teacher_stops_generating_with_the_anchor(tmp_path: Path, alpha_end: float, sampled_steps: int) -> None:
    # 6 steps: phase 1 ends after step 1, phase 2 after step 3, where alpha is alpha_end.
    schedule = {"teacher_sampling_phase1_end_frac": 1 / 6, "teacher_sampling_phase2_end_frac": 0.5, "max_steps": 6}
    generated_at: list[int] = []
    teacher = tiny_model(1)
    generate = teacher.generate

    def counted(**keywords: Any) -> torch.Tensor:
        generated_at.append(trainer.state.global_step + 1)
        return generate(**keywords)

    teacher.generate = counted
    settings = TWO_STEPS | ANCHOR | schedule | {"teacher_sft_alpha_end": alpha_end}
    trainer = tiny_trainer(tmp_path, settings=settings, teacher_model=teacher)
    released: list[int] = []
    trainer.teacher.stop_generating = lambda: released.append(trainer.state.global_step + 1)
    forwards = Forwards(trainer.teacher.model)
    trainer.train()
    assert sorted(set(generated_at)) == list(range(1, sampled_steps + 1))
    assert released == [sampled_steps + 1]
    assert forwards.generating > 0
    assert forwards.rows_scored.total() == 6 * 8


@pytest.mark.parametrize("with_teacher", [False, True])
def test_evaluation_scores_only_when_asked_and_never_anchors(tmp_path: Path, with_teacher: bool) -> None:
    settings = TWO_STEPS | ANCHOR | {"eval_with_teacher": with_teacher, "per_device_eval_batch_size": 4}
    trainer = tiny_trainer(tmp_path, settings=settings, eval_dataset=tiny_data(3))
    student, teacher = Forwards(trainer.model), Forwards(trainer.teacher.model)
    waiting = [[TeacherRollout([5], [5], [6, 1], verdict=1.0)]]
    trainer.anchor = AnchorStep(alpha=1.0, kept=1, total=2.0, micro_batches=waiting)  # of a step that is not over
    trainer.evaluate()
    assert len(waiting) == 1
    assert student.trained == []
    assert student.rows_scored.total() == 3 * 4
    assert teacher.rows_scored.total() == (3 * 4 if with_teacher else 0)
    assert teacher.generating == 0


def test_a_prompt_runs_once_for_all_its_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of four, in micro-batches of four; a group's prompt is computed once, but for its last token.

    Without that every model sees each token of every row, and the update is the same.
    """
    settings = NO_ANCHOR | TWO_STEPS | {"max_grad_norm": 0.0, "optim": "sgd"}

    def run(folder: str) -> Run:
        done = Run(tmp_path / folder, settings, train_dataset=tiny_data(8).map(_with_a_longer_prompt))
        assert all(rows.total() == 4 for rows in done.student.trained)
        return done

    shared = run("shared")
    monkeypatch.setattr(trl_seam, "prefixes_to_share", lambda *_: None)
    apart = run("apart")
    assert Counter(shared.rollouts) == Counter(apart.rollouts)
    prompts = [len(ids) for ids in shared.trainer.tokenize_prompts(shared.trainer.train_dataset["prompt"][:4])]
    saved = sum(3 * (length - 1) for length in prompts)
    every_token = sum(map(len, shared.rollouts))
    # Some more where prompts begin alike, and rows of a micro-batch are of two groups: there are none here.
    assert shared.student.tokens == every_token - saved
    assert shared.teacher.tokens <= every_token - saved, "which also sees what prompts have in common"
    assert apart.student.tokens >= every_token
    ours, theirs = (dict(done.trainer.model.named_parameters()) for done in (shared, apart))
    assert max(float((ours[name] - theirs[name]).detach().abs().max()) for name in ours) < 1e-6


def _with_a_longer_prompt(example: dict) -> dict:
    return {"prompt": [{"role": "user", "content": example["prompt"][0]["content"] + "abcdefgh" * 3}]}
