"""The same token ids get the same verdict, whoever wrote them: student, teacher, evaluation, baselines."""

from pathlib import Path
from typing import Any

import pytest
from tiny import ANCHOR, inject_rollouts, inject_teacher_rollouts, tiny_model, tiny_tokenizer, tiny_trainer

from sg_opd_trl.baselines.rollouts import RolloutRequest, _judged
from sg_opd_trl.evaluation import evaluate_model
from sg_opd_trl.verifiers.calls import read_completions

CHAT = [{"role": "user", "content": "1+1="}]


def parsing_tokenizer() -> Any:
    """`a ... b` plays the part of <think> ... </think>."""
    tokenizer = tiny_tokenizer()
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "assistant",
        "fields": {
            "reasoning_content": {"open": "a", "close_pattern": "b", "content": "text"},
            "content": {"close_pattern": "<eos>", "content": "text"},
        },
    }
    return tokenizer


def thinking(tokenizer: Any) -> list[int]:
    return [*tokenizer("a5b3")["input_ids"], tokenizer.eos_token_id]


@pytest.fixture
def seen() -> list[Any]:
    return []


@pytest.fixture
def verifier(seen: list[Any]) -> Any:
    def look(completions: list, **_: Any) -> list[float]:
        seen.extend(completions)
        return [1.0] * len(completions)

    return look


def test_student_and_teacher(tmp_path: Path, seen: list[Any], verifier: Any) -> None:
    tokenizer = parsing_tokenizer()
    trainer = tiny_trainer(
        tmp_path, reward_funcs=verifier, processing_class=tokenizer, settings=ANCHOR | {"max_steps": 1}
    )
    inject_rollouts(trainer, lambda prompt, row: thinking(tokenizer))
    inject_teacher_rollouts(trainer, lambda prompt: thinking(tokenizer))
    trainer.train()
    assert len(seen) > 8, "the teacher's are among them"
    assert [(answer[0]["content"], answer[0]["reasoning_content"]) for answer in seen] == [("3", "5")] * len(seen)


def test_evaluation(seen: list[Any], verifier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = parsing_tokenizer()
    written = [thinking(tokenizer)] * 2
    monkeypatch.setattr("sg_opd_trl.evaluation_sampling.generate_completions", lambda *_, **__: written)
    rows = [{"prompt": CHAT, "solution": "3"}]
    evaluate_model(tiny_model(0), tokenizer, rows, num_samples=2, reward_func=verifier, progress=False)
    assert [answer[0]["content"] for answer in seen] == ["3", "3"]


def test_baselines() -> None:
    tokenizer, seen = parsing_tokenizer(), []

    def judge(rows: list[dict], completions: list, ids: list[list[int]]) -> list[float | None]:
        seen.extend(completions)
        return [1.0] * len(ids)

    prompt_ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    request = RolloutRequest([prompt_ids], [{"prompt": CHAT}], 4, 1.0, 1.0, 0, 1)
    _judged(tokenizer, request, 0, [thinking(tokenizer)], judge)
    assert [answer[0]["content"] for answer in seen] == ["3"]


def test_without_a_schema_completions_are_texts_and_messages() -> None:
    tokenizer = tiny_tokenizer()
    ids = thinking(tokenizer)

    def refuse(prompts: list) -> list:
        raise AssertionError("nothing is rendered without a schema")

    found = read_completions(tokenizer, ["1+1=", CHAT], [ids, ids], refuse)
    assert found == ["a5b3", [{"role": "assistant", "content": "a5b3"}]]
    assert read_completions(tokenizer, [], [], refuse) == []
