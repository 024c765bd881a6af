"""Why a teacher rollout is dropped: the reason, the counts, and what the user is told."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import ANCHOR, inject_rollouts, inject_teacher_rollouts, logged, tiny_data, tiny_trainer
from transformers import TrainerCallback

from sg_opd_trl import TeacherAnchorCallback
from sg_opd_trl.teacher_sampling.rollouts import STEPS_IN_A_ROW, drop_reason

# 2 student prompts at rho 0.6: round(1.5 * 2) = 3 teacher prompts a step
SMALL = ANCHOR | {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 3,
    "lambda_high": 1.0,
    "teacher_sampling_ratio": 0.6,
    "max_steps": 1,
}
DROPPED = ("anchor/dropped_wrong", "anchor/dropped_no_verdict", "anchor/dropped_empty", "anchor/dropped_filtered")


def run(folder: Path, answer: Callable[[list[int]], float | None], written: list[list[int]], **arguments: Any) -> Any:
    """A finished run whose teacher writes these completions, one after the other, for whatever prompt."""
    settings = SMALL | arguments.pop("settings", {})

    def verifier(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [answer(ids) for ids in completion_ids]

    trainer = tiny_trainer(folder, settings=settings, **({"reward_funcs": verifier} | arguments))
    inject_rollouts(trainer, lambda prompt, row: [5 + row, 7, 1])
    endless = (written * 100).__iter__()
    inject_teacher_rollouts(trainer, lambda prompt: next(endless))
    trainer.train()
    return trainer


def counted(trainer: Any) -> list[dict[str, float]]:
    names = ("anchor/rollouts", "anchor/kept", "anchor/truncated", "anchor/tokens", *DROPPED)
    return [
        {name.removeprefix("anchor/"): entry[name] for name in names}
        for entry in trainer.state.log_history
        if "anchor/rollouts" in entry
    ]


@pytest.mark.parametrize(
    ("wanted", "verdict", "completion", "reason"),
    [
        (True, 1.0, [5, 1], None),
        (True, 0.0, [5, 1], None),
        (True, None, [5, 1], None),
        (False, 0.0, [5, 1], "wrong"),
        (False, None, [5, 1], "no verdict"),
        (False, 1.0, [5, 1], "filtered"),
        (True, 1.0, [5], None),
        (True, 1.0, [], "empty"),
        (False, 0.0, [], "empty"),
        (True, 1.0, [1], "empty"),
        (False, 0.0, [2], "empty"),
        (True, 1.0, [1, 5], "empty"),
    ],
)
def test_the_reason(wanted: bool, verdict: float | None, completion: list[int], reason: str | None) -> None:
    assert drop_reason(wanted, verdict, completion, (1, 2)) == reason


def by_first(ids: list[int]) -> float | None:
    """6 is right, 7 is wrong, everything else has no verdict."""
    return {6: 1.0, 7: 0.0}.get(ids[0]) if ids else None


def test_every_rollout_is_counted_once_and_every_count_is_there(tmp_path: Path) -> None:
    trainer = run(
        tmp_path,
        by_first,
        # Two tokens without an end are no rollout that the limit of three has cut.
        [[6, 1], [7, 8, 9], [8, 6], [], [6, 6, 6], [6, 9, 1]],
        settings={"max_steps": 2},
    )
    first, second = counted(trainer)
    assert first == {
        "rollouts": 3, "kept": 1, "truncated": 1, "tokens": 2,
        "dropped_wrong": 1, "dropped_no_verdict": 1, "dropped_empty": 0, "dropped_filtered": 0,
    }  # fmt: skip
    assert second == {
        "rollouts": 3, "kept": 2, "truncated": 1, "tokens": 6,
        "dropped_wrong": 0, "dropped_no_verdict": 0, "dropped_empty": 1, "dropped_filtered": 0,
    }  # fmt: skip


def test_counts_are_zero_while_the_anchor_is_on_and_gone_after_it(tmp_path: Path) -> None:
    class FirstStep(TeacherAnchorCallback):
        def alpha(self, args: Any, step: int, total_steps: int) -> float:
            return 0.5 if step == 1 else 0.0

    trainer = run(tmp_path, lambda ids: 1.0, [[6, 1]], settings={"max_steps": 2}, callbacks=[FirstStep()])
    assert counted(trainer) == [
        {"rollouts": 3, "kept": 3, "truncated": 0, "tokens": 6} | dict.fromkeys([n[7:] for n in DROPPED], 0)
    ]
    assert logged(trainer, "anchor/alpha") == [0.5, 0.0]


def test_no_loss_and_a_loss_of_zero_are_told_apart(tmp_path: Path) -> None:
    none = run(tmp_path, lambda ids: 0.0, [[6, 1]])
    assert (logged(none, "anchor/loss"), logged(none, "anchor/kept")) == ([], [0.0])
    some = run(tmp_path, lambda ids: 1.0, [[6, 1]])
    assert logged(some, "anchor/loss")[0] > 0
    assert logged(some, "anchor/kept") == [3.0]
    # A sum over kept tokens is divided by nothing: its total does not tell whether any was kept.
    summed = run(tmp_path, lambda ids: 1.0, [[6, 1]], settings={"teacher_sft_reduction": "sum"})
    assert logged(summed, "anchor/loss")[0] > 0


def test_the_loss_of_a_window_is_the_mean_over_the_steps_that_kept_some(tmp_path: Path) -> None:
    bad, good = [[7, 1]] * 3, [[6, 1]] * 3
    settings = {"max_steps": 2, "learning_rate": 0.0}
    alone = run(tmp_path, by_first, [*bad, *good], settings=settings)
    window = run(tmp_path, by_first, [*bad, *good], settings=settings | {"logging_steps": 2})
    assert len(logged(alone, "anchor/loss")) == 1
    assert logged(window, "anchor/loss") == pytest.approx(logged(alone, "anchor/loss"))


def test_without_the_filter_only_empty_ones_are_dropped(tmp_path: Path) -> None:
    """The end token alone would teach the student to write nothing."""
    settings = {"teacher_sampling_filter_correct": False, "teacher_sampling_ratio": 0.67}
    trainer = run(tmp_path, by_first, [[7, 1], [8, 1], [], [1]], settings=settings)
    (counts,) = counted(trainer)
    assert (counts["kept"], counts["dropped_empty"], counts["tokens"]) == (2, 2, 4)
    assert logged(trainer, "anchor/verified_share") == [0.0]


def test_a_subclass_decides_and_the_reasons_stay_honest(tmp_path: Path) -> None:
    class Contrary(TeacherAnchorCallback):
        def keep(self, args: Any, verdict: float | None) -> bool:
            return verdict == 0.0

    trainer = run(tmp_path, by_first, [[6, 1], [7, 1], [8, 1]], callbacks=[Contrary()])
    (counts,) = counted(trainer)
    assert {name for name, number in counts.items() if number == 1} == {
        *("kept", "dropped_no_verdict", "dropped_filtered")
    }
    assert counts["tokens"] == 2


# --- what the verifier logs ------------------------------------------------------------------------------------------
def test_what_the_verifier_logs_of_teacher_rollouts_is_an_anchor_metric(tmp_path: Path) -> None:
    def verifier(completion_ids: list[list[int]], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        log_metric("answered", float(len(completion_ids)))
        log_metric("answered", 1.0)
        log_extra("note", ["x"] * len(completion_ids))
        return [1.0] * len(completion_ids)

    # Two steps in one window: the mean over calls of the verifier, 3 and 1 each time.
    trainer = run(
        tmp_path,
        by_first,
        [[6, 1]],
        reward_funcs=verifier,
        settings={"max_steps": 2, "logging_steps": 2},
    )
    assert logged(trainer, "anchor/answered") == [2.0]
    assert logged(trainer, "answered") == [2.5], "the student's: 4 rollouts and 1"
    assert len(trainer._logs["extra"]["note"]) == len(trainer._logs["completion"])


def test_a_name_of_the_anchors_own_is_left_out_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def verifier(completion_ids: list[list[int]], log_metric: Any, **_: Any) -> list[float]:
        log_metric("kept", 100.0)
        return [1.0] * len(completion_ids)

    trainer = run(tmp_path, by_first, [[6, 1]], reward_funcs=verifier, settings={"max_steps": 2})
    assert logged(trainer, "anchor/kept") == [3.0, 3.0]
    assert logged(trainer, "kept") == [100.0, 100.0]
    assert len([text for text in caplog.messages if "The verifier logs ['kept']" in text]) == 1


# --- what is said ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("written", "reason", "level"),
    [
        ([[6, 1], [7, 8, 1], [8, 1]], "judged wrong by the verifier", logging.INFO),
        ([[8, 8, 1], [7, 1], [6, 1]], "without a verdict", logging.WARNING),
        ([[6, 1], [], [1]], "empty: no token comes before the end token", logging.WARNING),
        ([[1], [6, 1], []], "empty: no token comes before the end token", logging.WARNING),
    ],
)
def test_the_first_dropped_one_is_shown_once_with_its_reason(
    tmp_path: Path, written: list, reason: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="sg_opd_trl"):
        trainer = run(tmp_path, by_first, written, settings={"max_steps": 2})
    (record,) = [entry for entry in first_ones(caplog) if f"is {reason}" in entry.getMessage()]
    message = record.getMessage()
    assert record.levelno == level
    assert "in step 1, " in message
    dropped = next(ids for ids in written if by_first(ids) != 1.0)
    assert f"wrote {len(dropped)} tokens: {trainer.tokenizer.decode(dropped)!r}" in message
    assert "<eos>" in message or not dropped, "special tokens are shown"
    assert "+1=" in message, "the prompt"


def first_ones(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [entry for entry in caplog.records if "first teacher rollout that the anchor" in entry.getMessage()]


def test_every_reason_is_shown_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong one in the first step does not hide that verdicts are missing in the second."""
    with caplog.at_level(logging.INFO, logger="sg_opd_trl"):
        run(tmp_path, by_first, [*[[7, 1], [6, 1], [7, 2]], *[[8, 1], [7, 1], [1]]], settings={"max_steps": 4})
    shown = [(entry.levelno, entry.getMessage()) for entry in first_ones(caplog)]
    assert [level for level, _ in shown].count(logging.WARNING) == 2
    assert len(shown) == 3
    for step, level, reason in (
        (1, logging.INFO, "judged wrong"), (2, logging.WARNING, "without a verdict"), (2, logging.WARNING, "empty")
    ):  # fmt: skip
        assert [kind for kind, text in shown if f"in step {step}, is {reason}" in text] == [level]


def test_the_prompt_that_is_shown_is_the_teachers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tiny_data().map(lambda row: {"teacher_prompt": [{"role": "user", "content": "abc"}]})
    run(tmp_path, by_first, [[8, 1]], train_dataset=data)
    (record,) = first_ones(caplog)
    assert "The teacher read 'userabc<eos>assistant' and" in record.getMessage()


def test_nothing_is_said_where_all_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sg_opd_trl"):
        run(tmp_path, by_first, [[6, 1]], settings={"max_steps": STEPS_IN_A_ROW})
    assert not [text for text in caplog.messages if "teacher rollout" in text]


def dry_spells(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "No teacher rollout was kept" in text]


def test_several_steps_that_keep_none_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, by_first, [[8, 1], [7, 1], [7, 8, 9]], settings={"max_steps": 2 * STEPS_IN_A_ROW})
    (message,) = dry_spells(caplog)
    assert f"in {STEPS_IN_A_ROW} steps in a row, the last of them step {STEPS_IN_A_ROW}" in message
    assert "6 judged wrong by the verifier, 3 without a verdict" in message
    for name in ("teacher_max_completion_length", "teacher_sampling_filter_correct=False", "enable=False", "boxed"):
        assert name in message
    # What cannot be read is wrong; what has no gold answer is without a verdict.
    wrong, no_verdict = message.split("Way out: ")[1].split("; ")[:2]
    assert "boxed" in wrong
    assert "gold answer" not in wrong
    assert "gold answer" in no_verdict
    assert "time or memory" in no_verdict
    # Of the most frequent reason, though another was first.
    assert "The first that was wrong: The teacher read '" in message
    assert "and wrote 2 tokens: '2<eos>'" in message


class Nothing(TeacherAnchorCallback):
    """Keeps no rollout."""

    def keep(self, args: Any, verdict: float | None) -> bool:
        return False


@pytest.mark.parametrize(
    ("written", "arguments", "advised"),
    [
        ([7, 1], {}, True),
        ([8, 1], {}, True),
        ([1], {}, False),
        ([1], {"settings": {"teacher_sampling_filter_correct": False}}, False),
        ([7, 1], {"callbacks": [Nothing()]}, False),
    ],
    ids=["wrong", "no verdict", "empty", "filter off", "own filter"],
)
def test_to_do_without_the_filter_is_advised_where_it_would_help(
    tmp_path: Path, written: list[int], arguments: dict, advised: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"max_steps": STEPS_IN_A_ROW} | arguments.pop("settings", {})
    run(tmp_path, by_first, [written], settings=settings, **arguments)
    (message,) = dry_spells(caplog)
    assert ("teacher_sampling_filter_correct=False" in message) is advised
    assert "teacher_sampling_enable=False" in message


class First(TeacherAnchorCallback):
    """Has the anchor in the first step alone."""

    def alpha(self, args: Any, step: int, total_steps: int) -> float:
        return 0.5 if step == 1 else 0.0


@pytest.mark.parametrize("ends", ["with the run", "before it"])
def test_an_anchor_too_short_for_a_dry_spell_is_told_when_it_ends(
    tmp_path: Path, ends: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[int] = []

    class Watching(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            told.append(len(dry_spells(caplog)))

    if ends == "with the run":
        run(tmp_path, by_first, [[7, 1]], settings={"max_steps": 2}, callbacks=[Watching()])
        assert told == [0, 0]
    else:
        run(tmp_path, by_first, [[7, 1]], settings={"max_steps": 3}, callbacks=[First(), Watching()])
        assert told == [0, 1, 1]
    (message,) = dry_spells(caplog)
    steps = "the steps 1 to 2" if ends == "with the run" else "step 1"
    assert f"in {steps}, with which the anchor ended" in message
    assert "judged wrong by the verifier" in message


def test_an_anchor_that_kept_one_ends_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, by_first, [[6, 1], *[[7, 1]] * 5], settings={"max_steps": 2})
    assert dry_spells(caplog) == []


def test_an_anchor_that_kept_one_before_it_was_resumed_ends_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    settings |= {"restore_callback_states_from_checkpoint": True, "allow_changed": ["reward_funcs"]}
    run(tmp_path, by_first, [[6, 1]], settings=settings)
    trainer = tiny_trainer(
        tmp_path, settings=SMALL | settings, reward_funcs=lambda completions, **_: [0.0] * len(completions)
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logged(trainer, "anchor/kept") == [3.0, 0.0]
    assert dry_spells(caplog) == []


def test_one_kept_rollout_ends_a_dry_spell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = [[7, 1]] * 3, [[7, 1], [6, 1], [7, 1]]
    run(tmp_path, by_first, [*bad, *bad, *good, *bad, *bad], settings={"max_steps": 5})
    assert dry_spells(caplog) == []


def test_a_long_rollout_is_shortened_and_its_end_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Answers stand at the end."""
    with caplog.at_level(logging.INFO, logger="sg_opd_trl"):
        run(tmp_path, by_first, [[7] * 1000 + [9, 1]])
    (message,) = [text for text in caplog.messages if "first teacher rollout" in text]
    assert " [...] " in message
    assert "24<eos>'." in message
    assert len(message) < 1000


# --- a schedule without an anchor ------------------------------------------------------------------------------------
def schedule_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "no teacher rollout will be drawn" in text]


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, False),
        ({"teacher_sampling_phase1_end_frac": 0.0, "teacher_sampling_phase2_end_frac": 0.0}, True),
        ({"teacher_sampling_phase1_end_frac": 0.4, "teacher_sampling_phase2_end_frac": 0.4}, True),
        ({"teacher_sft_alpha_start": 0.0, "teacher_sft_alpha_end": 0.0}, True),
        # Zero in the first step, and above it in the second: the cosine goes up.
        (
            {
                "teacher_sft_alpha_start": 0.0,
                "teacher_sft_alpha_end": 0.1,
                "teacher_sampling_phase1_end_frac": 0.5,
            },
            False,
        ),
    ],
    ids=["on", "off", "too few steps", "zero weights", "rising"],
)
def test_a_schedule_that_is_zero_throughout_is_told(
    tmp_path: Path, settings: dict, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = run(tmp_path, lambda ids: 1.0, [[6, 1]], settings=settings | {"max_steps": 2})
    messages = schedule_warnings(caplog)
    assert len(messages) == warned
    assert (max(logged(trainer, "anchor/alpha")) == 0) is warned
    assert not warned or "in all 2 steps" in messages[0]


def test_a_run_resumed_after_its_anchor_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    settings |= {"teacher_sampling_phase1_end_frac": 0.5, "teacher_sampling_phase2_end_frac": 0.5}
    settings |= {"allow_changed": ["reward_funcs"]}
    run(tmp_path, lambda ids: 1.0, [[6, 1]], settings=settings)
    assert schedule_warnings(caplog) == []
    for step, messages in ((1, 0), (2, 1), (4, 1)):
        trainer = tiny_trainer(tmp_path, settings=SMALL | settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert len(schedule_warnings(caplog)) == messages
    (message,) = schedule_warnings(caplog)
    assert "in the steps 3 to 4 that are left of this run" in message
    assert "Its schedule ended with step 2" in message
