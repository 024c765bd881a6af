"""The parts of phased teacher sampling that need no run: prompts, seeds, dealing, counting, and the callback alone."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_tokenizer

from sg_opd_trl import TeacherAnchorCallback
from sg_opd_trl.teacher_sampling.callback import (
    AnchorStep,
    PromptStream,
    TeacherRollout,
    deal,
    mixed_seed,
    sampling_of,
    teacher_prompts_per_step,
)
from sg_opd_trl.teachers.fit import SharedVocabulary

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("ratio", "student_prompts", "expected"),
    [
        (0.125, 28, 4),  # 28 / 7
        (0.125, 1024, 146),  # 146.29
        (0.125, 2, 1),  # 0.29: never none
        (0.5, 6, 6),
        (0.6, 2, 3),
        (0.2, 4, 1),
        (0.25, 10, 3),  # 3.33
    ],
)
def test_teacher_prompts_are_the_share_rho_of_all_prompts(ratio: float, student_prompts: float, expected: int) -> None:
    assert teacher_prompts_per_step(ratio, student_prompts) == expected


def test_the_share_is_met_for_large_batches() -> None:
    for ratio in (0.05, 0.125, 0.3, 0.5, 0.75):
        teacher = teacher_prompts_per_step(ratio, 10_000)
        assert teacher / (teacher + 10_000) == pytest.approx(ratio, abs=1e-4)


def test_a_stream_shows_every_row_once_per_permutation() -> None:
    stream = PromptStream(num_rows=10, seed=3)
    drawn = [row for step in range(1, 11) for row in stream.rows(step, 3)]
    epochs = [drawn[start : start + 10] for start in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(10))


def test_a_stream_is_a_function_of_seed_and_step() -> None:
    stream = PromptStream(100, 3)
    late = PromptStream(100, 3).rows(7, 4)
    assert [stream.rows(step, 4) for step in (1, 7, 2)][1] == late
    assert PromptStream(100, 4).rows(7, 4) != late


def test_positions_of_a_stream_are_those_of_its_steps() -> None:
    stream = PromptStream(num_rows=10, seed=3)
    assert stream.between(4, 13) == [row for step in range(1, 14) for row in stream.rows(step, 1)][4:13]
    assert stream.between(5, 5) == []


def test_a_step_may_draw_more_rows_than_there_are() -> None:
    assert Counter(PromptStream(3, 0).rows(1, 6)) == Counter({0: 2, 1: 2, 2: 2})


def test_seeds_differ_by_every_part_and_fit_a_generator() -> None:
    seeds = {mixed_seed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3
    assert mixed_seed(1, 2) != mixed_seed(2, 1)
    assert all(0 <= seed < 2**63 for seed in (*seeds, mixed_seed(-1), mixed_seed(2**70)))
    torch.Generator().manual_seed(max(seeds))


def test_seeds_are_the_same_on_every_machine_and_in_every_version() -> None:
    """A run resumed elsewhere must draw the same teacher prompts and rollouts."""
    assert mixed_seed(1) == 832573481945861485
    assert mixed_seed(0, 2**63, -5) == 8553183840552491972


@pytest.mark.parametrize(("slots", "world", "micro"), [(1, 1, 1), (1, 4, 2), (7, 2, 3), (12, 3, 2), (5, 8, 1)])
def test_every_slot_is_dealt_once_and_evenly(slots: int, world: int, micro: int) -> None:
    dealt = [deal(slots, world, micro, rank) for rank in range(world)]
    assert all(len(rows) == micro for rows in dealt)
    assert sorted(slot for rank in dealt for rows in rank for slot in rows) == list(range(slots))
    per_rank = [sum(map(len, rank)) for rank in dealt]
    per_micro_batch = [len(rows) for rank in dealt for rows in rank]
    assert max(per_rank) - min(per_rank) <= 1
    assert max(per_micro_batch) - min(per_micro_batch) <= 1


def test_slots_go_round_the_ranks_first() -> None:
    # Slot i: rank i mod 2, micro-batch (i div 2) mod 2.
    assert deal(6, 2, 2, 0) == [[0, 4], [2]]
    assert deal(6, 2, 2, 1) == [[1, 5], [3]]


def rollout(prompt: list[int], completion: list[int]) -> TeacherRollout:
    return TeacherRollout(prompt, completion, kept=True, verdict=1.0)


def test_a_step_hands_out_its_micro_batches_in_order_and_pads_them() -> None:
    step = AnchorStep(
        alpha=0.2, total=5.0, micro_batches=[[rollout([3, 4], [5]), rollout([6], [7, 8])], [], [rollout([9], [9])]]
    )
    first = step.take(0, CPU)
    assert first is not None
    assert first.prompt_ids.tolist() == [[3, 4], [0, 6]]
    assert first.prompt_mask.tolist() == [[1, 1], [0, 1]]
    assert first.completion_ids.tolist() == [[5, 0], [7, 8]]
    assert first.completion_mask.tolist() == [[1, 0], [1, 1]]
    assert step.take(0, CPU) is None
    last = step.take(0, CPU)
    assert last is not None
    assert last.completion_ids.tolist() == [[9]]
    assert step.take(0, CPU) is None, "rows of a step are never used twice"


@pytest.mark.parametrize(
    ("verdict", "filtered", "unfiltered"), [(1.0, True, True), (0.0, False, True), (None, False, True)]
)
def test_the_filter(verdict: float | None, filtered: bool, unfiltered: bool) -> None:
    callback = TeacherAnchorCallback()
    assert callback.keep(SimpleNamespace(teacher_sampling_filter_correct=True), verdict) is filtered
    assert callback.keep(SimpleNamespace(teacher_sampling_filter_correct=False), verdict) is unfiltered


def test_a_callback_without_a_trainer_says_so() -> None:
    state, control = SimpleNamespace(global_step=0, max_steps=1), SimpleNamespace()
    with pytest.raises(RuntimeError, match="must be passed in `callbacks` of an SGOPDTrainer"):
        TeacherAnchorCallback().on_step_begin(SimpleNamespace(), state, control)  # type: ignore[arg-type]


def test_state_survives_a_round_trip() -> None:
    callback = TeacherAnchorCallback()
    callback.rollouts, callback.verified, callback.tokens = 7, 5, 300
    restored = TeacherAnchorCallback.from_state(callback.state())
    assert (restored.rollouts, restored.verified, restored.tokens) == (7, 5, 300)


def test_the_teacher_writes_as_the_student_does() -> None:
    args = SimpleNamespace(
        teacher_completion_length=9,
        temperature=0.7,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.2,
        generation_kwargs={"suppress_tokens": [3]},
    )
    tokenizer = SimpleNamespace(pad_token_id=0)
    vocabulary = SharedVocabulary(tiny_tokenizer(), [26, 26])
    run = SimpleNamespace(args=args, eos_token_ids=[1, 5], tokenizer=tokenizer, vocabulary=vocabulary)
    sampling = sampling_of(run)  # type: ignore[arg-type]
    assert (sampling.max_new_tokens, sampling.eos_token_ids, sampling.pad_token_id) == (9, (1, 5), 0)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.9, 4, 0.1)
    assert (sampling.repetition_penalty, sampling.generation_kwargs) == (1.2, {"suppress_tokens": [3]})
