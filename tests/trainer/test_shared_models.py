"""A model object in two runs, and a copy of one: each run has its own numerics, each model its own weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ANCHOR, logged, tiny_data, tiny_model, tiny_tokenizer, tiny_trainer
from trl.trainer.utils import add_fused_lm_head

from sg_opd_trl import SGOPDConfigError, evaluate_model
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.teachers import LocalTeacher
from sg_opd_trl.teachers.routed import RoutedTeacher

OFF = {"teacher_sampling_enable": False}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
BATCH = TokenBatch.from_lists([[5, 6], [7, 8, 9]], [[4, 5, 6], [10, 11]], 0, torch.device("cpu"))
EVERY_ROW = torch.ones(2, dtype=torch.bool)


def scores(scorer: Any) -> torch.Tensor:
    return scorer.score(BATCH, EVERY_ROW, 999).clone()


def of_student(trainer: Any) -> torch.Tensor:
    with torch.no_grad():
        return trainer.run_policy(trainer.model, *BATCH.joined(), 3).logps.clone()


def plain(model: Any, temperature: float) -> torch.Tensor:
    """The same from logits of each row alone."""
    result = torch.zeros(2, 3)
    for row, (prompt, completion) in enumerate((([5, 6], [4, 5, 6]), ([7, 8, 9], [10, 11]))):
        with torch.no_grad():
            logps = (
                type(model).forward(model, torch.tensor([prompt + completion])).logits[0] / temperature
            ).log_softmax(-1)
        for i, token in enumerate(completion):
            result[row, i] = logps[len(prompt) + i - 1, token]
    return result


def assert_close(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def with_weights_of(model: Any, seed: int) -> Any:
    model.load_state_dict(tiny_model(seed).state_dict())
    return model


def written(model: Any) -> list[list[int]]:
    """Greedy completions, by the model's own `generate`."""
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(IDS.repeat(2, 1), attention_mask=torch.ones(2, 6, dtype=torch.long), **options).tolist()


# --- copies ----------------------------------------------------------------------------------------------------------
def copy_of_a_student(folder: Path) -> Any:
    return copy.deepcopy(tiny_trainer(folder, settings=OFF).model)


def copy_of_a_teacher(folder: Path) -> Any:
    teacher = tiny_model(2)
    tiny_trainer(folder, settings=OFF, teacher_model=teacher)
    return copy.deepcopy(teacher)


def copy_of_a_cast_head(folder: Path) -> Any:
    return copy.deepcopy(tiny_trainer(folder, settings=OFF | {"cast_lm_head_to_fp32": True}).model)


def copy_of_a_copy(folder: Path) -> Any:
    first = tiny_trainer(folder, settings=OFF).model
    return copy.deepcopy(tiny_trainer(folder, settings=OFF, model=copy.deepcopy(first)).model)


def copy_of_trls(folder: Path) -> Any:
    """From TRL's own trainers, that never had ours."""
    model = tiny_model(0)
    add_fused_lm_head(model, temperature=0.7)
    add_fused_lm_head(model, temperature=0.3)
    return copy.deepcopy(model)


COPIES = [copy_of_a_student, copy_of_a_teacher, copy_of_a_cast_head, copy_of_a_copy, copy_of_trls]


@pytest.mark.parametrize("made", COPIES)
def test_a_copy_given_as_teacher_scores_and_writes_with_its_own_weights(tmp_path: Path, made: Any) -> None:
    teacher = with_weights_of(made(tmp_path), 1).float()
    trainer = tiny_trainer(tmp_path, settings=OFF | {"temperature": 0.8}, teacher_model=teacher)
    assert_close(scores(trainer.teacher), plain(tiny_model(1), 0.8))
    assert written(teacher) == written(tiny_model(1)) != written(tiny_model(0))
    fresh = tiny_trainer(tmp_path, settings=OFF | {"temperature": 0.8}, teacher_model=tiny_model(1))
    prompts = [[5, 6, 7], [9]] * 3
    expected = fresh.teacher.generate(prompts, fresh.teacher_sampling, 0, 10**6)
    assert trainer.teacher.generate(prompts, trainer.teacher_sampling, 0, 10**6) == expected


@pytest.mark.parametrize("made", COPIES)
def test_a_copy_given_as_student_or_reference_is_itself(tmp_path: Path, made: Any) -> None:
    model = with_weights_of(made(tmp_path), 1).float().requires_grad_(True)
    settings = OFF | {"lambda_high": 1.5, "temperature": 0.9}
    trainer = tiny_trainer(tmp_path, settings=settings, model=model, reference_model=copy.deepcopy(model))
    for found in (of_student(trainer), scores(trainer.reference)):
        assert_close(found * BATCH.completion_mask, plain(tiny_model(1), 0.9))
    assert written(trainer.model) == written(tiny_model(1))


@pytest.mark.parametrize("made", COPIES)
def test_a_copy_is_evaluated_with_its_own_weights(tmp_path: Path, made: Any) -> None:
    def sampled(model: Any, name: str) -> str:
        options: dict = {"num_samples": 1, "temperature": 0.0, "max_new_tokens": 6, "progress": False}
        path = tmp_path / name
        evaluate_model(model, tiny_tokenizer(), tiny_data(6), samples_path=path, **options)
        return path.read_text(encoding="utf-8")

    copied = with_weights_of(made(tmp_path), 1).float()
    assert sampled(copied, "copied") == sampled(tiny_model(1), "fresh") != sampled(tiny_model(0), "first")


def test_a_copy_needs_no_trainer_to_run_its_own_weights(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=OFF)
    copied = with_weights_of(copy.deepcopy(trainer.model), 1)
    assert written(copied) == written(tiny_model(1))
    # And the original keeps its own.
    assert written(trainer.model) == written(tiny_model(0))


# --- one object in two runs ------------------------------------------------------------------------------------------
def test_two_runs_at_two_temperatures_share_student_and_teacher(tmp_path: Path) -> None:
    teacher = tiny_model(1)
    first = tiny_trainer(tmp_path, settings=OFF | {"temperature": 1.0}, teacher_model=teacher)
    second = tiny_trainer(tmp_path, settings=OFF | {"temperature": 0.5}, teacher_model=teacher, model=first.model)
    for trainer, temperature in ((first, 1.0), (second, 0.5), (first, 1.0)):
        assert_close(scores(trainer.teacher), plain(tiny_model(1), temperature))
        assert_close(of_student(trainer) * BATCH.completion_mask, plain(tiny_model(0), temperature))


@pytest.mark.parametrize("mode", ["topk_logits", "full_logits"])
def test_distributions_too_are_at_the_temperature_of_the_run_that_asks(tmp_path: Path, mode: str) -> None:
    teacher, settings = tiny_model(1), OFF | {"distillation_mode": mode, "distillation_topk": 8}
    alone = tiny_trainer(tmp_path / "alone", settings=settings | {"temperature": 0.7})
    alone.train()
    shared = tiny_trainer(tmp_path / "shared", settings=settings | {"temperature": 0.7}, teacher_model=teacher)
    tiny_trainer(tmp_path / "other", settings=settings | {"temperature": 1.3}, teacher_model=teacher)
    shared.train()
    for name in ("loss", "grad_norm", "teacher/matching_loss"):
        assert logged(shared, name) == logged(alone, name)


def test_one_local_teacher_in_two_runs(tmp_path: Path) -> None:
    teacher = LocalTeacher(tiny_model(1))
    first = tiny_trainer(tmp_path, settings=OFF, teacher_model=teacher)
    assert first.teacher is teacher
    expected = scores(first.teacher)
    second = tiny_trainer(tmp_path, settings=OFF | {"temperature": 0.5}, teacher_model=teacher)
    assert second.teacher.model is teacher.model
    # Counts belong to a run: the second one begins at 0.
    assert (teacher.tokens_scored, second.teacher.tokens_scored) == (5, 0)
    assert_close(scores(second.teacher), plain(tiny_model(1), 0.5))
    assert torch.equal(scores(first.teacher), expected)


def test_the_teachers_of_one_run_can_be_those_of_another(tmp_path: Path) -> None:
    data = tiny_data(16).add_column("teacher_id", ["a", "b"] * 8)
    teachers = {"a": tiny_model(1), "b": tiny_model(2)}
    first = tiny_trainer(tmp_path, settings=OFF, teacher_model=teachers, train_dataset=data)
    assert isinstance(first.teacher, RoutedTeacher)
    options = {"settings": OFF | {"temperature": 0.5}, "teacher_model": first.teacher, "train_dataset": data}
    second = tiny_trainer(tmp_path, **options)
    for label, seed in (("a", 1), ("b", 2)):
        assert_close(scores(second.teacher.teachers[label]), plain(tiny_model(seed), 0.5))
        assert_close(scores(first.teacher.teachers[label]), plain(tiny_model(seed), 1.0))


def test_one_model_is_teacher_and_reference(tmp_path: Path) -> None:
    model = tiny_model(1)
    settings = ANCHOR | {"lambda_high": 1.5}
    trainer = tiny_trainer(tmp_path, settings=settings, teacher_model=model, reference_model=model)
    assert torch.equal(scores(trainer.teacher), scores(trainer.reference))
    trainer.train()
    assert_close(scores(trainer.reference), plain(tiny_model(1), 1.0))


def test_a_student_is_trained_by_two_runs_in_turn(tmp_path: Path) -> None:
    settings = OFF | {"lambda_high": 1.5, "learning_rate": 0.05}
    first = tiny_trainer(tmp_path / "a", settings=settings)
    first.train()
    now = of_student(first)
    second = tiny_trainer(tmp_path / "b", settings=settings, model=first.model)
    assert_close(scores(second.reference), now * BATCH.completion_mask)
    second.train()
    # Each keeps the student that it began with.
    assert_close(scores(second.reference), now * BATCH.completion_mask)
    assert_close(scores(first.reference), plain(tiny_model(0), 1.0))


def test_a_student_that_another_run_has_frozen_is_told(tmp_path: Path) -> None:
    message = r"must have a parameter that is trained.*teacher or the reference of another run.*deepcopy"
    first = tiny_trainer(tmp_path, settings=OFF)
    first.train()
    second = tiny_trainer(tmp_path, settings=OFF, teacher_model=first.model, model=tiny_model(3))
    second.train()
    with pytest.raises(SGOPDConfigError, match=message):
        first.train()
    with pytest.raises(SGOPDConfigError, match=message):
        tiny_trainer(tmp_path, settings=OFF, model=first.model)
    third = copy.deepcopy(first.model).requires_grad_(True)
    tiny_trainer(tmp_path, settings=OFF, model=third).train()


def test_the_base_of_a_peft_model_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    base = tiny_model(0)
    tiny_trainer(tmp_path, settings=OFF, model=base, peft_config=config)
    for arguments in ({"peft_config": config}, {}):
        with pytest.raises(SGOPDConfigError, match=r"`model` must be a model of its own.*PeftModel was made"):
            tiny_trainer(tmp_path, settings=OFF, model=base, **arguments)
    with pytest.raises(SGOPDConfigError, match=r"`teacher_model` must be a model of its own.*load it again"):
        tiny_trainer(tmp_path, settings=OFF, model=tiny_model(0), teacher_model=base)
