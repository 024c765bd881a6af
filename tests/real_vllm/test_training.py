"""Whole runs of SG-OPD whose teacher is behind vLLM."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from tiny import inject_rollouts, inject_teacher_rollouts, logged

from real_vllm.serving import NEEDS_VLLM, Server, recipe_trainer

pytestmark = NEEDS_VLLM


def record_rollouts(trainer: Any) -> list[list[list[int]]]:
    """The student's rollouts of every generation batch, as they are written."""
    batches: list[list[list[int]]] = []
    generate = trainer._generate_single_turn

    def record(*given: Any, **named: Any) -> Any:
        answer = generate(*given, **named)
        batches.append([list(ids) for ids in answer[0]])
        return answer

    trainer._generate_single_turn = record
    return batches


def stored_rollouts(folder: Path) -> dict[tuple[int, ...], list[list[int]]]:
    """The completions of every prompt in a rollout cache, in the order of their sample index."""
    rows = sorted(load_dataset(str(folder), split="train"), key=lambda row: row["sample"])
    found: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for row in rows:
        found[tuple(row["prompt_ids"])].append(row["completion_ids"])
    return found


@pytest.mark.parametrize("mode", ["sampled_token", "topk_logits"])
def test_losses_are_those_of_the_teacher_in_this_process(
    tmp_path: Path, server: Server, teacher_folder: str, mode: str
) -> None:
    """Five steps on the student's rollouts of the first run, and on its teacher's as the cache has them."""
    common = {"teacher_model_name_or_path": teacher_folder, "max_steps": 5, "per_device_train_batch_size": 32}
    common |= {"teacher_sampling_phase1_end_frac": 0.6, "teacher_sampling_phase2_end_frac": 1.0}
    common |= {"distillation_mode": mode, "distillation_topk": 8}
    cache = tmp_path / "cache"
    local = recipe_trainer(tmp_path / "local", **common, teacher_rollouts_path=cache)
    batches = record_rollouts(local)
    local.train()

    remote = recipe_trainer(tmp_path / "remote", **common, teacher_model_server_url=server.url)
    written, stored = iter([ids for batch in batches for ids in batch]), stored_rollouts(cache)
    inject_rollouts(remote, lambda prompt, row: next(written))
    inject_teacher_rollouts(remote, lambda prompt: stored[tuple(prompt)].pop(0))
    remote.train()
    assert not any(stored.values()), "every rollout of the cache was used"
    for name in ("loss", "anchor/loss", "grad_norm"):
        assert logged(remote, name) == pytest.approx(logged(local, name), abs=1e-3), name
    assert len(logged(remote, "loss")) == 5
    assert max(logged(remote, "anchor/loss")) > 0
    assert logged(remote, "teacher/scored_tokens") == logged(local, "teacher/scored_tokens")
    # Many tokens of so simple a task are certain for both models: their a2 is about the dead zone, rounding decides.
    assert logged(remote, "gate/consensus") == pytest.approx(logged(local, "gate/consensus"), abs=0.02)


def test_the_student_improves(tmp_path: Path, server: Server, teacher_folder: str) -> None:
    """Forty steps with rollouts of its own; five steps are 640 rollouts, whose mean has a standard error of 0.02."""
    trainer = recipe_trainer(
        tmp_path, teacher_model_name_or_path=teacher_folder, teacher_model_server_url=server.url, max_steps=40
    )
    trainer.train()
    right = logged(trainer, "rewards/math_reward/mean")
    assert sum(right[-5:]) / 5 - sum(right[:5]) / 5 > 0.08
    assert max(logged(trainer, "anchor/verified_share")) > 0.5
    assert trainer.teacher.tokens_generated > 0
