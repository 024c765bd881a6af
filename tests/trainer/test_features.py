"""What a run may combine: prompts, rewards, masks, loss types; and the metrics it logs."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from repository import PACKAGE
from tiny import (
    ANCHOR,
    GradientRecorder,
    inject_rollouts,
    inject_teacher_rollouts,
    logged,
    parity_verifier,
    tiny_data,
    tiny_trainer,
)

OFF = {"teacher_sampling_enable": False}
ONE = OFF | {"max_steps": 1, "max_grad_norm": 1e9}
GATE = ["gate/consensus", "gate/conflict", "gate/neutral"]


def first_gradient(folder: Path, settings: dict, write: Any = None, **arguments: Any) -> tuple[Any, dict]:
    """A run of one step: the trainer and the gradient that reached the optimizer."""
    recorder = GradientRecorder()
    trainer = tiny_trainer(folder, settings=ONE | settings, callbacks=[recorder], **arguments)
    if write is not None:
        inject_rollouts(trainer, write)
    trainer.train()
    return trainer, recorder.steps[0]


def norm(gradient: dict) -> float:
    return float(torch.stack([value.norm() for value in gradient.values()]).norm())


def difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return norm({name: one[name] - other[name] for name in one}) / max(norm(one), norm(other))


def first_token_verifier(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def all_right(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [1.0] * len(completion_ids)


def token_write(prompt: list[int], row: int) -> list[int]:
    """A mixed group of two lengths for every prompt."""
    return [5 + row % 4, 7, 9, 11][: 2 + row % 3]


# --- prompts and rewards ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chat", [True, False])
def test_chat_and_plain_prompts(tmp_path: Path, chat: bool) -> None:
    seen: list[Any] = []

    def verifier(prompts: list, completions: list, completion_ids: list, solution: list, **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, solution, strict=True))
        return parity_verifier(completions, completion_ids)

    trainer = tiny_trainer(tmp_path, settings=ANCHOR, train_dataset=tiny_data(chat=chat), reward_funcs=verifier)
    trainer.train()
    # 2 steps of 8 student rollouts and one teacher rollout each
    assert len(seen) == 2 * (8 + 1)
    for prompt, completion, solution in seen:
        assert isinstance(solution, str)
        assert isinstance(prompt, list if chat else str)
        assert (
            ([set(message) for message in completion] == [{"role", "content"}])
            if chat
            else isinstance(completion, str)
        )


def test_the_verifier_is_the_named_function_whatever_its_weight(tmp_path: Path) -> None:
    """A weight of 0.3 leaves TRL's own advantage of an all-right group at 3e-4, not 0: it must not open the gate."""

    def style(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [0.1 * len(ids) for ids in completion_ids]

    def judge(prompts: list, completion_ids: list[list[int]], **_: Any) -> list[float]:
        mixed = first_token_verifier(completion_ids)
        return [1.0 if row < 4 else verdict for row, verdict in enumerate(mixed)]

    settings = {"verifier_reward_func": "judge", "reward_weights": [0.7, 0.3], "gate_dead_zone": 0.0}
    trainer, _ = first_gradient(
        tmp_path, settings, lambda prompt, row: [5 + row % 2, 7, 9, 1], reward_funcs=[style, judge]
    )
    assert trainer._verifier_advantages[:4].tolist() == [0.0] * 4
    # rows 5 and 7 start with the even id 6: verdicts 0 1 0 1, mean 1/2, unbiased sigma sqrt(1/3)
    expected = 0.5 / (3**-0.5 + 1e-4)
    torch.testing.assert_close(trainer._verifier_advantages[4:], torch.tensor([-1.0, 1.0, -1.0, 1.0]) * expected)
    assert logged(trainer, "gate/neutral") == [0.5]
    assert logged(trainer, "gate/neutral/wrong") == [0.0]
    assert logged(trainer, "reward")[0] == pytest.approx(0.7 * 0.4 + 0.3 * 0.75)


def test_an_abstaining_verifier_makes_rollouts_neutral_and_not_wrong(tmp_path: Path) -> None:
    def judge(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None, 1.0, 0.0, None] * (len(completion_ids) // 4)

    trainer, _ = first_gradient(tmp_path, {}, lambda prompt, row: [5 + row, 7, 9, 1], reward_funcs=judge)
    assert trainer._verifier_advantages.view(2, 4)[:, [0, 3]].tolist() == [[0.0, 0.0]] * 2
    # Judged verdicts 1 and 0: mean 1/2, unbiased sigma sqrt(1/2).
    torch.testing.assert_close(
        trainer._verifier_advantages.view(2, 4)[:, [1, 2]], torch.tensor([[1.0, -1.0]] * 2) * 0.5 / (0.5**0.5 + 1e-4)
    )
    assert logged(trainer, "gate/neutral") == [0.5]
    assert logged(trainer, "gate/neutral/wrong") == [0.0]
    assert logged(trainer, "gate/neutral/right") == [0.0]


def test_all_abstaining_is_plain_distillation(tmp_path: Path) -> None:
    def judge(completion_ids: list[list[int]], **_: Any) -> list[None]:
        return [None] * len(completion_ids)

    trainer, gated = first_gradient(tmp_path, {}, token_write, reward_funcs=judge)
    _, plain = first_gradient(tmp_path, {"sign_gated_extrapolation": False}, token_write)
    assert logged(trainer, "gate/neutral") == [1.0]
    assert norm(plain) > 0.1
    assert difference(gated, plain) < 1e-6


# --- masks -----------------------------------------------------------------------------------------------------------
def rollout_func(env_mask: bool, tail: list[int]) -> Any:
    """Rollouts whose last tokens an environment wrote."""

    def roll(prompts: list, trainer: Any) -> dict:
        own = [[5 + row % 2, 7 + row % 5, 9] for row in range(len(prompts))]
        rolled: dict = {
            "prompt_ids": trainer.tokenize_prompts(prompts),
            "completion_ids": [ids + tail for ids in own],
            "logprobs": None,
        }
        return rolled | ({"env_mask": [[1] * 3 + [0] * len(tail) for _ in own]} if env_mask else {})

    return roll


def test_tokens_of_an_environment_count_nowhere(tmp_path: Path) -> None:
    """Masked tokens at the end leave gradient and metrics as if they were not there."""

    def run(env_mask: bool, tail: list[int]) -> tuple[Any, dict]:
        roll = rollout_func(env_mask, tail)
        return first_gradient(tmp_path, {}, reward_funcs=first_token_verifier, rollout_func=roll)

    (masked, masked_gradient), (bare, bare_gradient) = run(True, [12, 20, 6]), run(False, [])
    _, counted_gradient = run(False, [12, 20, 6])
    assert difference(masked_gradient, bare_gradient) < 1e-6
    assert difference(counted_gradient, bare_gradient) > 0.1
    names = [name for name in masked.state.log_history[0] if name.startswith(("gate/", "teacher/"))]
    names.remove("teacher/scored_tokens")  # a cost: the teacher read them
    assert len(names) > 30
    for name in names:
        assert logged(masked, name) == pytest.approx(logged(bare, name), abs=1e-5), name


def test_truncated_rollouts_count_nowhere(tmp_path: Path) -> None:
    """Rows 0, 2, ... end, the others do not: the gradient is that of the ended rows, over the same number of rows."""
    settings = {"mask_truncated_completions": True}

    def write(prompt: list[int], row: int) -> list[int]:
        return [5 + row // 2 % 2, 7, 9, 1] if row % 2 == 0 else [12, 13 + row, 14, 15, 16]

    def other(prompt: list[int], row: int) -> list[int]:
        return [5 + row // 2 % 2, 7, 9, 1] if row % 2 == 0 else [12, 20, 8, 6, 5]

    masked, one = first_gradient(tmp_path, settings, write, reward_funcs=first_token_verifier)
    _, same = first_gradient(tmp_path, settings, other, reward_funcs=first_token_verifier)
    _, unmasked = first_gradient(tmp_path, {}, other, reward_funcs=first_token_verifier)
    assert norm(one) > 0.1
    assert difference(one, same) < 1e-6
    assert difference(one, unmasked) > 0.1
    assert logged(masked, "completions/clipped_ratio") == [0.5]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("stability_norm", ["sequence", "batch"])
def test_a_batch_without_a_single_token_that_counts(tmp_path: Path, loss_type: str, stability_norm: str) -> None:
    settings = {"mask_truncated_completions": True, "loss_type": loss_type, "stability_norm": stability_norm}
    trainer, gradient = first_gradient(tmp_path, settings, lambda prompt, row: [12, 13, 14])
    assert logged(trainer, "loss") == [0.0]
    assert norm(gradient) == 0.0
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_only_the_anchor_acts_where_no_student_token_counts(tmp_path: Path) -> None:
    settings = ANCHOR | {"teacher_sampling_enable": True, "mask_truncated_completions": True}
    recorder = GradientRecorder()
    trainer = tiny_trainer(tmp_path, settings=ONE | settings, callbacks=[recorder], reward_funcs=all_right)
    inject_rollouts(trainer, lambda prompt, row: [12, 13, 14])
    inject_teacher_rollouts(trainer, lambda prompt: [6, 1])
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0.2 * logged(trainer, "anchor/loss")[0], rel=1e-4)
    assert norm(recorder.steps[0]) > 0.01


# --- loss types ------------------------------------------------------------------------------------------------------
def test_loss_types_weigh_lengths_as_they_do_in_trl(tmp_path: Path) -> None:
    """With rollouts of one length dapo = bnpo = grpo, and dr_grpo divides by the longest possible length instead."""
    gradients = {
        kind: first_gradient(tmp_path, {"loss_type": kind}, lambda prompt, row: [5 + row % 3, 7, 9])[1]
        for kind in ("grpo", "bnpo", "dapo", "dr_grpo")
    }
    assert difference(gradients["bnpo"], gradients["grpo"]) < 1e-6
    assert difference(gradients["dapo"], gradients["grpo"]) < 1e-6
    # 3 of max_completion_length = 6 tokens
    assert norm(gradients["dr_grpo"]) == pytest.approx(norm(gradients["grpo"]) * 3 / 6, rel=1e-5)
    _, uneven_grpo = first_gradient(tmp_path, {"loss_type": "grpo"}, token_write)
    _, uneven_bnpo = first_gradient(tmp_path, {"loss_type": "bnpo"}, token_write)
    assert difference(uneven_grpo, uneven_bnpo) > 1e-3


# --- metrics ---------------------------------------------------------------------------------------------------------
def test_metrics_of_the_glossary_are_logged(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=ANCHOR | {"max_steps": 1})
    inject_rollouts(trainer, lambda prompt, row: [5 + row % 3, 7, 9, 1] if row < 4 else [5, 7])
    inject_teacher_rollouts(trainer, lambda prompt: [6, 1])  # right, so that the anchor has a loss
    trainer.train()
    entry = trainer.state.log_history[0]
    split = [*GATE, "gate/sign_flips", "gate/advantage_consensus", "gate/advantage_conflict"]
    split += [f"teacher/{name}" for name in ("kl_k1", "kl_k3", "abs_advantage_mean", "abs_advantage_max", "phi_mean")]
    expected = [name + suffix for name in split for suffix in ("", "/right", "/wrong")]
    expected += [f"anchor/{name}" for name in ("alpha", "loss", "verified_share", "rollouts", "tokens")]
    expected += [f"time/{name}" for name in ("rollout", "verify", "teacher", "reference", "loss", "anchor")]
    expected += ["gate/advantage_neutral", "reward", "entropy", "completions/mean_length", "grad_norm"]
    assert [name for name in expected if name not in entry] == []
    assert all(isinstance(entry[name], float) for name in expected)
    assert sum(entry[name] for name in GATE) == pytest.approx(1.0)
    # 8 rollouts of 4 are 2 prompts; 1/8 of all prompts is round(2 / 7) = 0 for the teacher, so 1
    assert entry["anchor/rollouts"] == 1
    assert entry["time/anchor"] > 0


def test_metrics_of_a_window_are_weighted_by_their_tokens(tmp_path: Path) -> None:
    """Two micro-batches of 4 rollouts with 2 and 4 tokens: every token counts the same."""
    settings = OFF | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = tiny_trainer(
        tmp_path,
        settings=settings,
        reward_funcs=lambda completion_ids, **_: [float(len(ids) == 4 and ids[0] % 2) for ids in completion_ids],
    )
    inject_rollouts(trainer, lambda prompt, row: [5 + row % 4, 7] if row < 4 else [5 + row % 4, 7, 9, 11])
    trainer.train()
    # Rows of 2 tokens form a group without variance: 8 of 24 tokens are neutral.
    assert logged(trainer, "gate/neutral") == [pytest.approx(8 / 24)]
    assert logged(trainer, "gate/neutral/wrong") == [pytest.approx(8 / 16)]


def test_one_exchange_per_micro_batch_for_all_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    settings = ANCHOR | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3}
    trainer = tiny_trainer(tmp_path, settings=settings)
    calls: Counter = Counter()
    for name in ("gather", "reduce", "gather_for_metrics"):
        original = getattr(trainer.accelerator, name)

        def counting(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            caller = Path(sys._getframe(1).f_code.co_filename)
            calls[caller.name] += PACKAGE in caller.parents
            return original(*args, **kwargs)

        monkeypatch.setattr(trainer.accelerator, name, counting)
    trainer.train()
    # 3 steps: 2 micro-batches each; the anchor's total once a step; the seconds once a step; once a run the noise and
    # whether a process has found something red
    assert {name: count for name, count in calls.items() if count} == {
        "bookkeeping.py": 6,
        "noise.py": 1,
        "run.py": 1,
        "step.py": 3,
        "trainer.py": 3,
    }


def test_an_iterable_data_set(tmp_path: Path) -> None:
    stream = Dataset.from_list(tiny_data().to_list()).to_iterable_dataset()
    trainer = tiny_trainer(tmp_path, settings=ANCHOR | {"teacher_sampling_prompts": "share"}, train_dataset=stream)
    trainer.train()
    assert logged(trainer, "anchor/rollouts") == [1.0, 1.0]
