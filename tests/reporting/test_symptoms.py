"""Each symptom is told once and plainly; a healthy run, however noisy, is left alone."""

import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import inject_rollouts, tiny_trainer
from transformers import TrainerControl, TrainerState, TrainingArguments

from sg_opd_trl import SGOPDConfig
from sg_opd_trl.core import token_statistics
from sg_opd_trl.reporting.symptoms import (
    STEPS_IN_A_ROW,
    STEPS_OF_A_SHORT_RUN,
    STEPS_OF_ONE_VERDICT,
    SymptomReporter,
    rank_difference,
)
from sg_opd_trl.trl_seam import WrittenBatch

NAN = math.nan
GROUP = 8
VERIFIER = "verifier"
MIXED = [1.0, 0.0] * (GROUP // 2)

# Runs of the built-in task `arithmetic` step by step: reward and teacher/kl_k3. `unlearning`: one prompt a step at the
# demo's learning rate, accuracy went from 0.28 to 0.06 and less. `learning`: the README's example, to 0.35 and 0.42.
RECORDED = json.loads(Path(__file__).with_name("recorded_curves.json").read_text(encoding="utf-8"))


def written(verdicts: Sequence[float] = MIXED, **facts: Any) -> WrittenBatch:
    texts = [f"text {number}" for number in range(len(verdicts))]
    return WrittenBatch(
        **{"completions": texts, "rewards": {VERIFIER: verdicts}, "longest": 9, "cut_off": 0.0} | facts
    )


def tokens(kl: float = 0.1, gate: float = 1.0) -> Any:
    """Statistics of one token whose k3 is `kl`: exp(a2) - 1 - a2 = kl for some a2 < 0, found by bisection."""
    low, high = -kl - 2.0, 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.exp(middle) - 1 - middle > kl else (low, middle)
    one, row = torch.ones(1, 1), torch.ones(1)
    return token_statistics(
        gate=gate * one,
        advantages=one,
        teacher_advantages=low * one,
        stability_weights=one,
        mask=one,
        right=row,
        wrong=0 * row,
    )


class Watched:
    """A run that consists of what the reporter is told."""

    def __init__(self, folder: Path, *, main: bool = True, **settings: Any) -> None:
        plain = {"use_cpu": True, "bf16": False, "num_generations": GROUP, "max_completion_length": 9}
        self.args = SGOPDConfig(str(folder), **plain | settings)
        self.reporter = SymptomReporter(self.args, VERIFIER)
        self.state = TrainerState(is_world_process_zero=main)
        self.call("on_train_begin")

    def call(self, event: str) -> None:
        getattr(self.reporter, event)(TrainingArguments, self.state, TrainerControl())

    def step(self, batch: WrittenBatch | None, statistics: Any = None) -> None:
        self.state.global_step += 1
        if batch is not None:
            self.reporter.saw_rollouts(batch)
            self.reporter.saw_tokens(tokens() if statistics is None else statistics)
        self.call("on_step_end")


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "sg_opd_trl.reporting.symptoms"]


ABSTAINED, WRONG, RIGHT = [NAN] * GROUP, [0.0] * GROUP, [1.0] * GROUP
# What a step shows, its tokens, the steps that it takes, and words of the message.
CASES = {
    "no verdict": (written(ABSTAINED), None, STEPS_IN_A_ROW, ["no verdict on any of the 80", "`answer_column`"]),
    "all wrong": (
        written(WRONG),
        None,
        STEPS_OF_ONE_VERDICT,
        ["said wrong to all 160", "gate is never open", "boxed"],
    ),
    "all right": (written(RIGHT), None, STEPS_OF_ONE_VERDICT, ["said right to all 160", "too easy"]),
    "cut off": (written(cut_off=1.0), None, STEPS_IN_A_ROW, ["100% of the 80", "max_completion_length=9"]),
    "empty": (written(longest=1), None, STEPS_IN_A_ROW, ["All 80 completions", "empty", "end token at once"]),
    "alike": (written(completions=["same"] * GROUP), None, STEPS_IN_A_ROW, ["same text 8 times", "`temperature`=1.0"]),
    "closed gate": (written(), tokens(gate=0.0), STEPS_OF_ONE_VERDICT, ["neutral (80 of 160", "`gate_dead_zone` (0"]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_symptom_is_told_once_when_it_has_lasted(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch, statistics, needed, words = CASES[case]
    run = Watched(tmp_path)
    for _ in range(needed - 1):
        run.step(batch, statistics)
    assert warned(caplog) == []
    for _ in range(2 * needed):
        run.step(batch, statistics)
    (message,) = warned(caplog)
    assert [word for word in [*words, f"the steps 1 to {needed}", "Likely reasons"] if word not in message] == []


@pytest.mark.parametrize("case", CASES)
def test_one_better_step_begins_the_count_anew(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batch, statistics, needed, _ = CASES[case]
    run = Watched(tmp_path)
    for _ in range(3):
        for _ in range(needed - 1):
            run.step(batch, statistics)
        run.step(written())
    run.call("on_train_end")
    assert warned(caplog) == []


@pytest.mark.parametrize("case", CASES)
def test_a_short_run_tells_at_its_end(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batch, statistics, _, words = CASES[case]
    run = Watched(tmp_path)
    for number in range(STEPS_OF_A_SHORT_RUN):
        assert warned(caplog) == [], number
        run.step(batch, statistics)
    run.call("on_train_end")
    (message,) = warned(caplog)
    # The numbers in the words are those of a long run.
    assert words[-1] in message or "neutral" in message


def test_verdicts_do_not_matter_without_a_gate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Watched(tmp_path, sign_gated_extrapolation=False, teacher_sampling_enable=False)
    for _ in range(2 * STEPS_OF_ONE_VERDICT):
        run.step(written(WRONG))
    assert warned(caplog) == []


def test_other_processes_and_steps_without_rollouts_say_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, idle = Watched(tmp_path, main=False), Watched(tmp_path)
    for _ in range(STEPS_OF_ONE_VERDICT):
        other.step(written(ABSTAINED))
        idle.step(None)
    idle.call("on_train_end")
    assert warned(caplog) == []


def test_micro_batches_of_a_step_count_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Watched(tmp_path, per_device_train_batch_size=GROUP, gradient_accumulation_steps=3, steps_per_generation=1)
    for _ in range(STEPS_IN_A_ROW):
        for verdicts in (ABSTAINED, ABSTAINED):
            run.reporter.saw_rollouts(written(verdicts))
            run.reporter.saw_tokens(tokens())
        run.step(written(ABSTAINED))
    (message,) = warned(caplog)
    assert f"any of the {3 * GROUP * STEPS_IN_A_ROW} completions" in message


def test_nothing_piles_up_once_the_callback_is_removed(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    for _ in range(50):
        run.reporter.saw_rollouts(written())
        run.reporter.saw_tokens(tokens())
    assert len(run.reporter._batches) == len(run.reporter._tokens) == 1


def test_one_token_is_all_that_a_limit_of_one_allows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Watched(tmp_path, max_completion_length=1)
    for _ in range(STEPS_IN_A_ROW):
        run.step(written(longest=1))
    assert warned(caplog) == []


def curve(rewards: Sequence[float], kls: Sequence[float], prompts: int, folder: Path) -> Watched:
    run = Watched(folder, learning_rate=7e-4)
    for reward, kl in zip(rewards, kls, strict=True):
        right = round(reward * GROUP * prompts)
        run.step(written([1.0] * right + [0.0] * (GROUP * prompts - right)), tokens(kl))
    run.call("on_train_end")
    return run


@pytest.mark.parametrize("seed", RECORDED["unlearning"])
def test_a_student_that_unlearns_is_told_of(seed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewards, kls = RECORDED["unlearning"][seed].values()
    curve(rewards, kls, 1, tmp_path)
    (message,) = warned(caplog)
    # The means of both halves, by hand.
    assert f"from {sum(rewards[:10]) / 10:.3g} (steps 1 to 10) to {sum(rewards[10:]) / 10:.3g}" in message
    assert f"from {sum(kls[:10]) / 10:.3g} to {sum(kls[10:]) / 10:.3g}" in message
    assert "learning_rate=0.0007 is too high for steps of 1 prompt(s)" in message


def test_a_fall_after_a_rise_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Looks at 20, 30, 45, 67 steps; the last one has parts of 16.
    rewards = [0.25] * 25 + [0.75] * 25 + [0.5, 0.25] * 25
    kls = [0.2] * 25 + [0.1] * 25 + [0.3, 0.4] * 25
    curve(rewards, kls, 1, tmp_path)
    (message,) = warned(caplog)
    assert "from 0.734" in message  # of the steps 36 to 51: 15 of 16 at 0.75, the last one at 0.5


@pytest.mark.parametrize("seed", RECORDED["learning"])
def test_a_student_that_learns_is_left_alone(seed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewards, kls = RECORDED["learning"][seed].values()
    curve(rewards, kls, 8, tmp_path)
    assert warned(caplog) == []


def test_noise_around_a_plateau_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Healthy steps in random order: reward and KL are tied, as a hard prompt moves both, but have no trend."""
    steps = [pair for run in RECORDED["learning"].values() for pair in zip(*run.values(), strict=True)]
    for seed in range(20):
        rng = random.Random(seed)
        rewards, kls = zip(*(rng.choice(steps) for _ in range(100)), strict=True)
        curve(rewards, kls, 8, tmp_path)
    assert warned(caplog) == []


@pytest.mark.parametrize(
    ("rewards", "kls"),
    [
        ([0.75] * 20 + [0.1] * 20, [0.2] * 40),  # harder problems: the teacher is as near as before
        ([0.5] * 40, [0.1] * 20 + [0.4] * 20),  # another way of writing: as many right
        ([0.75, 0.5] * 20, [0.4, 0.2] * 20),
    ],
)
def test_one_curve_alone_is_no_symptom(
    rewards: list[float], kls: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    curve(rewards, kls, 1, tmp_path)
    assert warned(caplog) == []


def test_rank_difference_against_counting_pairs() -> None:
    """U is the number of pairs that `after` wins, ties half; with ties its variance is nm/12 (N+1 - T/(N(N-1)))."""
    before, after = [1.0, 2.0, 2.0], [2.0, 3.0]
    # Pairs won: 2 beats 1 and ties twice (2.0); 3 beats all (3.0): U = 5, mean 3. Three 2s: T = 27 - 3 = 24.
    # Variance: 6/12 * (6 - 24/20) = 2.4.
    assert rank_difference(before, after) == pytest.approx(2 / math.sqrt(2.4))
    assert rank_difference(after, before) == pytest.approx(-2 / math.sqrt(2.4))
    assert rank_difference([1.0, 1.0], [1.0]) == 0.0


@pytest.mark.parametrize(
    ("write", "verdict", "words"),
    [
        (lambda row: [5 + row % 3, 1], None, "no verdict on any of the 24 completions of the steps 1 to 3"),
        (lambda row: [5 + row % 3, 1], 0.0, "said wrong to all 24 completions"),
        (lambda row: [5 + row % 3, 6, 7], "mixed", "100% of the 24 completions of the steps 1 to 3 were cut off"),
        (lambda row: [1], "mixed", "All 24 completions of the steps 1 to 3 are empty"),
        (lambda row: [5, 6, 1], "mixed", "are the same text 4 times over (24 completions)"),
    ],
)
def test_a_real_run_tells(
    write: Callable[[int], list[int]],
    verdict: Any,
    words: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def verifier(completions: list, **_: Any) -> list[float | None]:
        return [float(row % 2) if verdict == "mixed" else verdict for row in range(len(completions))]

    settings = {"max_steps": 3, "max_completion_length": 3, "num_generations": 4, "lambda_high": 1.0}
    trainer = tiny_trainer(tmp_path, settings=settings, reward_funcs=verifier)
    inject_rollouts(trainer, lambda prompt, row: write(row))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (message,) = warned(caplog)
    assert words in message
