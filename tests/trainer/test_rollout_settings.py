"""What a run's settings say of completions holds for student, teacher, loss, metrics and evaluation alike."""

import logging
from pathlib import Path
from typing import Any

import pytest
from tiny import ANCHOR, logged, parity_verifier, tiny_data, tiny_model, tiny_tokenizer, tiny_trainer
from transformers import AutoModelForCausalLM

from sg_opd_trl import SGOPDConfigError
from sg_opd_trl.evaluation import evaluate_model

OFF = {"teacher_sampling_enable": False}
ONE_STEP = {"max_steps": 1, "max_completion_length": 12}
STOP = [20, 21, 22, 23, 24, 25]
ENDS = {1, *STOP}


def student_rollouts(trainer: Any) -> list[list[int]]:
    """Completions that the loss sees, after one step."""
    seen: list[list[int]] = []
    own = trainer.on_rollouts

    def watch(rollouts: dict, examples: list[dict]) -> dict:
        for ids, mask in zip(rollouts["completion_ids"], rollouts["completion_mask"], strict=True):
            seen.append(ids[mask != 0].tolist())
        return own(rollouts, examples)

    trainer.on_rollouts = watch
    trainer.train()
    return seen


def ends_where_it_should(ids: list[int]) -> bool:
    inside = ENDS.isdisjoint(ids[:-1])
    return inside and (ids[-1] in ENDS or len(ids) == 12)


# --- own end tokens --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given", [STOP, 20], ids=["several", "one"])
def test_own_end_tokens_end_the_students_completions(tmp_path: Path, given: Any) -> None:
    """They are sampled until one of them, and nothing behind it is trained on."""
    ends = {1, *(given if isinstance(given, list) else [given])}
    trainer = tiny_trainer(tmp_path, settings=OFF | ONE_STEP | {"generation_kwargs": {"eos_token_id": given}})
    rows = student_rollouts(trainer)
    assert all(ends.isdisjoint(ids[:-1]) and (ids[-1] in ends or len(ids) == 12) for ids in rows)
    ended = [ids[-1] in ends for ids in rows]
    assert any(ended), "the case occurs"
    assert logged(trainer, "completions/clipped_ratio") == [1 - sum(ended) / len(ended)]


def test_mask_truncated_completions_knows_own_end_tokens(tmp_path: Path) -> None:
    settings = OFF | ONE_STEP | {"generation_kwargs": {"eos_token_id": STOP}, "mask_truncated_completions": True}
    rows = student_rollouts(tiny_trainer(tmp_path, settings=settings))
    assert any(rows)
    assert all(not ids or ids[-1] in ENDS for ids in rows)


def test_own_end_tokens_end_the_teachers_completions(tmp_path: Path) -> None:
    judged: list[list[int]] = []

    def verifier(completions: list, completion_ids: list, **_: Any) -> list[float]:
        judged.extend(completion_ids)
        return parity_verifier(completions, completion_ids)

    settings = ANCHOR | ONE_STEP | {"generation_kwargs": {"eos_token_id": STOP}}
    trainer = tiny_trainer(tmp_path, reward_funcs=verifier, settings=settings)
    trainer.train()
    assert len(judged) > 8, "the teacher's are among them"
    assert all(map(ends_where_it_should, judged))
    assert any(ids[-1] in STOP for ids in judged)
    assert set(trainer.teacher_sampling.eos_token_ids) == ENDS


def test_an_evaluation_of_the_saved_student_ends_where_the_training_did(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=OFF | ONE_STEP | {"generation_kwargs": {"eos_token_id": STOP}})
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    found: list[list[int]] = []

    def verifier(completion_ids: list, **_: Any) -> list[float]:
        found.extend(completion_ids)
        return [1.0] * len(completion_ids)

    evaluate_model(
        model, tiny_tokenizer(), tiny_data(), num_samples=2, max_new_tokens=12, reward_func=verifier, progress=False
    )
    assert all(map(ends_where_it_should, found))
    assert any(ids[-1] in STOP for ids in found)


# --- the student's own generation config -----------------------------------------------------------------------------
OWN = [{"min_new_tokens": 9}, {"no_repeat_ngram_size": 1}, {"typical_p": 0.2}, {"suppress_tokens": [*range(3, 20)]}]


def talkative(own: dict[str, Any]) -> Any:
    model = tiny_model(0)
    model.generation_config.update(**own)
    return model


@pytest.mark.parametrize("own", OWN, ids=lambda own: next(iter(own)))
def test_the_students_own_settings_are_left_out_and_named(tmp_path: Path, own: dict, caplog: Any) -> None:
    settings = OFF | ONE_STEP
    plain = student_rollouts(tiny_trainer(tmp_path, settings=settings))
    assert "generation_config sets" not in caplog.text
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path, model=talkative(own), settings=settings)
    ((name, value),) = own.items()
    assert f"The student's generation_config sets {name}={value!r}." in caplog.text
    assert student_rollouts(trainer) == plain


@pytest.mark.parametrize("own", OWN, ids=lambda own: next(iter(own)))
def test_the_same_in_generation_kwargs_is_used(tmp_path: Path, own: dict, caplog: Any) -> None:
    settings = OFF | ONE_STEP
    plain = student_rollouts(tiny_trainer(tmp_path, settings=settings))
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path, model=talkative(own), settings=settings | {"generation_kwargs": own})
    assert "generation_config sets" not in caplog.text
    assert student_rollouts(trainer) != plain


# --- refused by name -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"stop_strings": ["7"]}, r"`generation_kwargs` must not set 'stop_strings'.*Set eos_token_id"),
        ({"num_return_sequences": 4}, r"got num_return_sequences=4.*Set `num_generations`"),
        ('{"no_repeat_ngrams": 2}', r"got no_repeat_ngrams=2.*Did you mean 'no_repeat_ngram_size'"),
    ],
    ids=["stop strings", "several sequences", "JSON text"],
)
def test_what_cannot_be_honoured_is_refused_at_construction(tmp_path: Path, kwargs: Any, said: str) -> None:
    with pytest.raises(SGOPDConfigError, match=said):
        tiny_trainer(tmp_path, settings=OFF | {"generation_kwargs": kwargs})
