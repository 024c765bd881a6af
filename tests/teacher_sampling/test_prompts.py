"""Which prompts a step has, who takes its rollouts, and sample indices: pure functions that need no run."""

from collections import Counter, defaultdict

import pytest

from sg_opd_trl.teacher_sampling.prompts import (
    PromptStream,
    assign_slots,
    occurrences,
    step_samples,
    stream_samples,
    teacher_prompts_per_step,
)


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


@pytest.mark.parametrize(("slots", "world", "micro"), [(1, 1, 1), (1, 4, 2), (7, 2, 3), (12, 3, 2), (5, 8, 1)])
def test_every_slot_is_assigned_once_and_evenly(slots: int, world: int, micro: int) -> None:
    assigned = [assign_slots(slots, world, micro, rank) for rank in range(world)]
    assert all(len(rows) == micro for rows in assigned)
    assert sorted(slot for rank in assigned for rows in rank for slot in rows) == list(range(slots))
    per_rank = [sum(map(len, rank)) for rank in assigned]
    per_micro_batch = [len(rows) for rank in assigned for rows in rank]
    assert max(per_rank) - min(per_rank) <= 1
    assert max(per_micro_batch) - min(per_micro_batch) <= 1


def test_slots_go_round_the_ranks_first() -> None:
    # Slot i: rank i mod 2, micro-batch (i div 2) mod 2.
    assert assign_slots(6, 2, 2, 0) == [[0, 4], [2]]
    assert assign_slots(6, 2, 2, 1) == [[1, 5], [3]]


# --- sample indices --------------------------------------------------------------------------------------------------
PROMPTS = ["a", "b", "a", "c", "a"]


def test_occurrences_are_counted_from_the_front() -> None:
    assert occurrences(PROMPTS) == [0, 0, 1, 0, 2]
    assert occurrences([]) == []


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 2), (3, 1)])
def test_a_stream_never_gives_one_prompt_the_same_index_twice(each: int, world: int, micro: int) -> None:
    """Three permutations of five rows in steps of three prompts, spread over ranks and micro-batches."""
    stream, drawn = PromptStream(len(PROMPTS), seed=3), defaultdict(list)
    for first in range(0, 15, 3):
        rows = stream.between(first, first + 3)
        for rank in range(world):
            slots = [slot for part in assign_slots(3 * each, world, micro, rank) for slot in part]
            samples = stream_samples(stream, first, slots, each, occurrences(PROMPTS))
            for slot, sample in zip(slots, samples, strict=True):
                drawn[PROMPTS[rows[slot // each]]].append(sample)
    # "a" has three rows, each with `each` samples in three permutations.
    for prompt, rows_of_it in (("a", 3), ("b", 1), ("c", 1)):
        wanted = {(repeat << 32) + sample for repeat in range(rows_of_it) for sample in range(3 * each)}
        assert sorted(drawn[prompt]) == sorted(wanted)


def test_indices_of_a_row_do_not_depend_on_the_size_of_a_step() -> None:
    stream, repeats = PromptStream(7, seed=1), [0] * 7

    def indices(prompts: int) -> list[int]:
        return [
            sample
            for first in range(0, 28, prompts)
            for sample in stream_samples(stream, first, range(prompts), 1, repeats)
        ]

    assert indices(1) == indices(4) == indices(14) == [0] * 7 + [1] * 7 + [2] * 7 + [3] * 7


def test_no_slots() -> None:
    assert stream_samples(PromptStream(7, 1), 3, [], 2, [0] * 7) == []


def test_prompts_chosen_in_another_way_are_told_apart_by_step_and_occurrence() -> None:
    drawn = [
        (prompt, sample) for step in (1, 2) for prompt, sample in zip("aab", step_samples("aab", step), strict=True)
    ]
    assert len(set(drawn)) == 6
    assert step_samples("ab", 5) == step_samples("ba", 5) == [4, 4]
