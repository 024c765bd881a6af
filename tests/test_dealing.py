"""Sample indices: no two rollouts of one prompt in a run have the same, however the run is split up."""

from collections import defaultdict

import pytest

from sg_opd_trl.teacher_sampling.prompts import PromptStream, deal, occurrences, step_samples, stream_samples

PROMPTS = ["a", "b", "a", "c", "a"]


def test_occurrences_are_counted_from_the_front() -> None:
    assert occurrences(PROMPTS) == [0, 0, 1, 0, 2]
    assert occurrences([]) == []


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 2), (3, 1)])
def test_a_stream_never_gives_one_prompt_the_same_index_twice(each: int, world: int, micro: int) -> None:
    """Three permutations of five rows in steps of three prompts, dealt over ranks and micro-batches."""
    stream, drawn = PromptStream(len(PROMPTS), seed=3), defaultdict(list)
    for first in range(0, 15, 3):
        rows = stream.between(first, first + 3)
        for rank in range(world):
            slots = [slot for part in deal(3 * each, world, micro, rank) for slot in part]
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
