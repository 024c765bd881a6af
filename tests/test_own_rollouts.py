"""What a `rollout_func` may return, and what becomes of a rollout without a token."""

import math
from pathlib import Path
from typing import Any

import pytest
from tiny import changed_weights, copied_weights, logged, tiny_tokenizer, tiny_trainer

from sg_opd_trl.errors import DataError
from sg_opd_trl.own_rollouts import checked_rollouts

OFF = {"teacher_sampling_enable": False, "max_steps": 1, "learning_rate": 1e-2}


def written(ids: list[list[int]], **more: Any) -> Any:
    """A function that returns these completions, whatever the prompts."""

    def roll(prompts: list, trainer: Any = None) -> dict:
        prompt_ids = [trainer.tokenize_prompts([prompt])[0] if trainer else [6] for prompt in prompts[: len(ids)]]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None} | more

    return roll


def test_what_is_whole_is_left_as_it_is() -> None:
    roll = written([[5, 6], [7]], extra=["a", "b"])
    assert checked_rollouts(roll, end=1, size=10)(["x", "y"]) == roll(["x", "y"])


def test_one_without_a_token_gets_an_end_that_counts_nowhere() -> None:
    roll = checked_rollouts(written([[5, 6], []], logprobs=[[-1.0, -2.0], []]), end=1, size=10)
    rolled = roll(["x", "y"])
    assert rolled["completion_ids"] == [[5, 6], [1]]
    assert rolled["env_mask"] == [[1, 1], [0]]
    assert rolled["logprobs"] == [[-1.0, -2.0], [0.0]]


def test_a_mask_of_the_functions_own_stays() -> None:
    rolled = checked_rollouts(written([[5, 6], []], env_mask=[[1, 0], []]), end=1, size=10)(["x", "y"])
    assert rolled["env_mask"] == [[1, 0], [0]]


@pytest.mark.parametrize(
    ("roll", "said"),
    [
        (written([[5]]), "one rollout per prompt, got 1 entries in `prompt_ids` for 2 prompts"),
        (written([[5], [6]], env_mask=[[1]]), "got 1 entries in `env_mask` for 2 prompts"),
        (written([[5], [10]]), "0 to 9, got 10 in `completion_ids` of rollout 1"),
        (written([[5], [-1]]), "got -1 in `completion_ids` of rollout 1"),
    ],
)
def test_what_cannot_be_trained_on_names_the_function_and_the_rollout(roll: Any, said: str) -> None:
    with pytest.raises(DataError, match="`rollout_func` must return") as caught:
        checked_rollouts(roll, end=1, size=10)(["x", "y"])
    assert said in str(caught.value)


ROWS = [[5 + row % 2, 7 + row % 5, 9] for row in range(8)]


def test_a_row_without_a_token_changes_nothing_but_its_groups_baseline(tmp_path: Path) -> None:
    """The same update as where its tokens are masked out, which is an older way with tests of its own."""
    empty = [*ROWS[:3], [], *ROWS[4:]]
    masked = [[1] * 3] * 3 + [[0] * 3] + [[1] * 3] * 4

    def judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(row % 2) for row in range(len(completion_ids))]

    settings = {"settings": OFF, "reward_funcs": judge}
    ours = tiny_trainer(tmp_path / "empty", rollout_func=written(empty), **settings)
    other = tiny_trainer(tmp_path / "masked", rollout_func=written(ROWS, env_mask=masked), **settings)
    before = copied_weights(ours.model)
    ours.train()
    other.train()
    assert all(math.isfinite(loss) for loss in logged(ours, "loss"))
    assert changed_weights(ours.model, before) != []
    assert logged(ours, "loss") == pytest.approx(logged(other, "loss"), rel=1e-5)


def test_no_row_with_a_token_is_a_step_without_a_loss(tmp_path: Path) -> None:
    # The decay of weights is not of the batch.
    trainer = tiny_trainer(tmp_path, settings=OFF | {"weight_decay": 0.0}, rollout_func=written([[]] * 8))
    before = copied_weights(trainer.model)
    trainer.train()
    assert logged(trainer, "loss") == [0.0]
    assert changed_weights(trainer.model, before) == []


def test_no_padding_token_of_its_own_trains_the_same_student(tmp_path: Path) -> None:
    """Masks are made of lengths: the end token, which then pads, still counts where it was written."""
    students = []
    for padding in ("<pad>", None):
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = padding
        trainer = tiny_trainer(tmp_path / str(padding), settings=OFF, processing_class=tokenizer)
        trainer.train()
        students.append(trainer.model)
    assert changed_weights(students[1], copied_weights(students[0])) == []
