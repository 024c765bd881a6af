"""G-OPD in full (arXiv:2602.12125): several teachers, a shared reference, gate and anchor, against a float64 oracle.

The oracle scores every row with the teacher that the row names, after the prompt that this teacher reads.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from oracle import GROUP, VERDICTS, Row, advantage, anchor_loss, float64_model, group_advantages, log_probs
from oracle import token_class as class_of
from tiny import (
    SPECIAL,
    ScriptedVerifier,
    StepRecorder,
    copied_weights,
    logged,
    relative_difference,
    script_generation,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
)

from sg_opd_trl.models.batch import pad_rows

LIMIT = 1e-5
TEACHERS = {"math": 1, "code": 3}  # seeds
SETTINGS = {
    "per_device_train_batch_size": 12, "num_generations": GROUP, "max_steps": 1, "max_grad_norm": 0.0,
    "gate_dead_zone": 0.05, "stability_tau": 0.3, "learning_rate": 1e-2,
    "teacher_sampling_ratio": 0.5, "teacher_num_generations": 3, "teacher_sampling_phase1_end_frac": 1.0,
    "teacher_sampling_phase2_end_frac": 1.0, "teacher_sft_alpha_start": 0.7,
}  # fmt: skip


def data(private: bool) -> Dataset:
    """Every third row belongs to `math`, the others to `code`; with `private`, most have a prompt of their own."""
    questions = [f"{7 * i + 10 ** (i % 4)}+1=" for i in range(16)]
    columns: dict[str, list] = {"prompt": [chat(question) for question in questions]}
    columns["teacher_id"] = ["math" if i % 3 == 0 else "code" for i in range(16)]
    if private:
        columns["teacher_prompt"] = [None if i % 4 == 1 else chat(f"ha{q}") for i, q in enumerate(questions)]
    return Dataset.from_dict(columns)


def chat(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def prompt_ids(chat: list[dict]) -> list[int]:
    vocab = tiny_tokenizer().get_vocab()
    question = [vocab[character] for character in chat[0]["content"]]
    return [SPECIAL.index("user"), *question, SPECIAL.index("<eos>"), SPECIAL.index("assistant")]


class Taught(NamedTuple):
    """A rollout, who teaches it, and the same completion after the prompt that the teacher reads."""

    row: Row
    teacher: str
    read: Row


def taught(call: tuple[list, list[list[int]]], dataset: Dataset) -> list[Taught]:
    by_question = {row["prompt"][0]["content"]: row for row in dataset}
    assert len(by_question) == len(dataset)
    found = []
    for prompt, completion in zip(*call, strict=True):
        row = by_question[prompt[0]["content"]]
        read = row.get("teacher_prompt") or row["prompt"]
        own, theirs = Row(prompt_ids(prompt), list(completion)), Row(prompt_ids(read), list(completion))
        found.append(Taught(own, row["teacher_id"], theirs))
    return found


def expected_gradient(args: Any, weights: dict, rollouts: list[Taught], anchor: list[Row]) -> tuple[dict, set[str]]:
    student, behaviour = float64_model(weights), float64_model(weights)
    reference = float64_model(copied_weights(tiny_model(2)))
    teachers = {name: float64_model(copied_weights(tiny_model(seed))) for name, seed in TEACHERS.items()}
    classes: set[str] = set()
    loss = torch.zeros((), dtype=torch.float64)
    for a1, (row, name, read) in zip(group_advantages(), rollouts, strict=True):
        with torch.no_grad():
            scored = [(behaviour, row), (teachers[name], read), (reference, row)]
            ls, lt, lr = ([float(x) for x in log_probs(model, r, args.temperature)] for model, r in scored)
        phi = [min(1.0, args.stability_tau / abs(t - s)) for s, t in zip(ls, lt, strict=True)]
        for t, logp in enumerate(log_probs(student, row, args.temperature)):
            kind = class_of(args, a1, lt[t] - ls[t])
            classes.add(f"{kind} {name}")
            a = advantage(args, kind, a1, ls[t], lt[t], lr[t]) * phi[t] / (sum(phi) / len(phi))
            loss = loss - a * logp / (len(rollouts) * len(phi))
    loss = loss + args.teacher_sft_alpha_start * anchor_loss(args, student, anchor)
    loss.backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()}, classes


@pytest.mark.parametrize("private", [False, True], ids=["own prompt", "teacher_prompt"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_whole_step(tmp_path: Path, private: bool, micro_batches: int) -> None:
    verifier, recorder, dataset = ScriptedVerifier(VERDICTS), StepRecorder(), data(private)
    # Their rollouts tell them apart: the same script over other ids.
    teachers = {
        name: script_generation(tiny_model(seed), vocab_size=26 - 3 * place)
        for place, (name, seed) in enumerate(TEACHERS.items())
    }
    sizes = {"per_device_train_batch_size": 12 // micro_batches, "gradient_accumulation_steps": micro_batches}
    trainer = tiny_trainer(
        tmp_path,
        settings=SETTINGS | sizes,
        model=script_generation(tiny_model(0)),
        reward_funcs=verifier,
        teacher_model=teachers,
        reference_model=tiny_model(2),
        train_dataset=dataset,
        callbacks=[recorder],
    )
    trainer.train()

    (student_call,) = (call for call in verifier.calls if len(call[1]) == len(VERDICTS))
    (teacher_call,) = (call for call in verifier.calls if len(call[1]) != len(VERDICTS))
    rollouts, anchor = taught(student_call, dataset), taught(teacher_call, dataset)
    gradient, classes = expected_gradient(trainer.args, recorder.weights[0], rollouts, [row.row for row in anchor])
    assert relative_difference(recorder.steps[0], gradient) < LIMIT
    assert classes >= {f"{kind} {name}" for kind in ("consensus", "conflict") for name in TEACHERS}
    for name, teacher in teachers.items():
        own = [row for row in anchor if row.teacher == name]
        assert own
        ids, mask = pad_rows([row.read.prompt for row in own], 0, left=True)
        written = teacher.generate(ids, mask)[:, ids.size(1) :]
        assert [row.row.completion for row in own] == [[token for token in row if token] for row in written.tolist()]
    assert logged(trainer, "anchor/rollouts") == [len(anchor)]
