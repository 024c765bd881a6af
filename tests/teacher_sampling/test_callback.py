"""The callback and the rows of a step, without a run."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_tokenizer

from sg_opd_trl import TeacherAnchorCallback
from sg_opd_trl.teacher_sampling.rollouts import TeacherRollout
from sg_opd_trl.teacher_sampling.step import AnchorStep, sampling_of
from sg_opd_trl.teachers.fit import SharedVocabulary

CPU = torch.device("cpu")


def rollout(prompt: list[int], completion: list[int]) -> TeacherRollout:
    return TeacherRollout(prompt, prompt, completion, verdict=1.0)


def test_a_step_hands_out_its_micro_batches_in_order_and_pads_them() -> None:
    step = AnchorStep(
        alpha=0.2,
        kept=3,
        total=5.0,
        micro_batches=[[rollout([3, 4], [5]), rollout([6], [7, 8])], [], [rollout([9], [9])]],
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
