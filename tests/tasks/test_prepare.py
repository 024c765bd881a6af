import json
import random
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sg_opd_trl.tasks import chains, prepare, resolve
from sg_opd_trl.tasks.arithmetic import TASK, Problem, worked_solution
from sg_opd_trl.tasks.models import build_model, build_tokenizer
from sg_opd_trl.tasks.problems import Task
from sg_opd_trl.tasks.settings import ArithmeticSettings, ChainSettings, SupervisedSettings, TaskSettings


def prepare_student(folder: Path, settings: ArithmeticSettings, seed: int = 0, **changes: object) -> dict[str, object]:
    folder.mkdir(exist_ok=True)
    training = replace(settings.student_training, **changes)
    return prepare.prepare_model(folder, TASK, "student", seed, settings.data, settings.student_model, training)


def weights(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_shipped_models_have_the_documented_sizes() -> None:
    settings = ArithmeticSettings()
    sizes = {}
    for role in ("teacher", "student"):
        shape = getattr(settings, f"{role}_model")
        sizes[role] = sum(parameter.numel() for parameter in build_model(shape, build_tokenizer()).parameters())
    # Layer: 4 d^2 attention + 3 d f feed-forward + 2 d norms + 2 d/4 query and key norms; embedding 32 d; last norm d.
    assert sizes["teacher"] == 3 * (4 * 96**2 + 3 * 96 * 288 + 2 * 96 + 2 * 24) + 32 * 96 + 96
    assert sizes["student"] == 2 * (4 * 64**2 + 3 * 64 * 192 + 2 * 64 + 2 * 16) + 32 * 64 + 64


def test_labels_cover_the_solution_and_its_end_alone() -> None:
    tokenizer = build_tokenizer()
    problems = [Problem(896, 246), Problem(100, 205)]
    ids, labels = prepare.encode_examples(problems, [worked_solution(problem) for problem in problems], tokenizer)
    # The answers have four and three digits, so the second row ends in one padding token.
    assert ids.shape == labels.shape == (2, 16 + 34)
    assert tokenizer.decode(ids[0]) == (
        "<|im_start|>user\n896+246=<|im_end|>\n<|im_start|>assistant\n"
        "6+6+0=12,9+4+1=14,8+2+1=11 \\boxed{1142}<|im_end|>"
    )
    for row, problem in enumerate(problems):
        counted = labels[row][labels[row] != -100]
        assert tokenizer.decode(counted) == worked_solution(problem) + "<|im_end|>"
    assert labels[1, -1] == -100
    assert ids[1, -1] == tokenizer.pad_token_id


def test_dataset_files(tmp_path: Path, tiny: ArithmeticSettings) -> None:
    assert prepare.prepare_dataset(tmp_path, TASK, tiny.data) == {
        "num_train": 12,
        "num_test": 6,
        "num_tune": 5,
    }
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["prompt", "solution"]] * 6
    for row, problem in zip(rows, TASK.draw_splits(tiny.data).test, strict=True):
        assert row["prompt"] == [{"role": "user", "content": f"{problem.first}+{problem.second}="}]
        assert row["solution"] == str(problem.first + problem.second)


def test_model_loads_through_the_auto_classes(tmp_path: Path, tiny: ArithmeticSettings) -> None:
    outcome = prepare_student(tmp_path, tiny)
    assert outcome["steps"] == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == "qwen3"
    assert model.config.max_position_embeddings == 256
    assert model.config.vocab_size == len(tokenizer) == 32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert config.bos_token_id is None
    # AutoTokenizer may choose by the model's type; it must be the tokenizer that was saved.
    text = "<|im_start|>user\n896+246=<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == build_tokenizer()(text)["input_ids"]
    assert tokenizer.chat_template == build_tokenizer().chat_template


def test_training_lowers_the_loss(tmp_path: Path, tiny: ArithmeticSettings) -> None:
    short = prepare_student(tmp_path / "short", tiny, slip_probability=0.0)
    long = prepare_student(tmp_path / "long", tiny, slip_probability=0.0, max_steps=40, schedule_steps=40)
    assert long["loss"] < short["loss"] - 0.5


def test_seed_decides_the_weights(tmp_path: Path, tiny: ArithmeticSettings) -> None:
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        prepare_student(tmp_path / name, tiny, seed=seed)
        torch.rand(5)  # the global state must not matter
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "again"))
    assert not torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_random_states_are_left_alone(tmp_path: Path, tiny: ArithmeticSettings) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), torch.rand(1).item()

    def seed_all() -> None:
        random.seed(5)
        numpy.random.seed(5)
        torch.default_generator.manual_seed(5)

    seed_all()
    expected = draw()
    seed_all()
    # With a check, so that sampling is covered too.
    prepare_student(tmp_path / "model", tiny, stop_accuracy=1.0, check_from=1, check_every=1)
    (tmp_path / "data").mkdir()
    prepare.prepare_dataset(tmp_path / "data", TASK, tiny.data)
    assert draw() == expected


def test_generator_is_given_back_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on purpose"), prepare.isolated_cpu_generator(0):
        torch.rand(3)
        raise RuntimeError("on purpose")
    assert torch.equal(torch.get_rng_state(), state)


def test_stop_rule(tmp_path: Path, tiny: ArithmeticSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0.1, 0.2, 0.3, 0.9])
    monkeypatch.setattr(prepare, "sampled_accuracy", lambda *_: next(readings))
    changes = {"max_steps": 9, "schedule_steps": 9, "stop_accuracy": 0.3, "check_from": 2, "check_every": 2}
    # Looked at after steps 2, 4 and 6; the third reading reaches 0.3.
    outcome = prepare_student(tmp_path, tiny, **changes)
    assert (outcome["steps"], outcome["validation_accuracy"]) == (6, 0.3)


def test_stop_rule_at_the_cap(
    tmp_path: Path, tiny: ArithmeticSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prepare, "sampled_accuracy", lambda *_: 0.1)
    outcome = prepare_student(tmp_path, tiny, stop_accuracy=0.3, check_from=1, check_every=1)
    assert outcome["steps"] == 3
    assert "is 0.10 after 3 steps, below the 0.30" in caplog.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.hidden_size == 16


def test_sampled_accuracy_counts_over_samples(tiny: ArithmeticSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer()
    model = build_model(tiny.student_model, tokenizer).train()
    problems = [Problem(100, 100), Problem(100, 101)]
    written = [r"\boxed{200}", r"\boxed{200}", r"\boxed{201}", r"\boxed{202}"]  # two samples for each problem
    completions = torch.tensor([tokenizer(text)["input_ids"] for text in written])

    def generate(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.cat([input_ids, completions], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    # Right: 200 for the first problem twice, 201 for the second once.
    assert prepare.sampled_accuracy(model, tokenizer, problems, 2) == 3 / 4
    assert model.training


def test_batches_pass_over_all_rows() -> None:
    settings = SupervisedSettings(batch_size=4, max_steps=5, schedule_steps=5, learning_rate=1e-3)
    batches = list(prepare._batches(10, random.Random(0), settings))
    rows = [row for batch in batches for row in batch]
    assert [len(batch) for batch in batches] == [4] * 5
    # 5 steps of 4 rows are two passes over 10 rows.
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


def test_learning_rate_schedule() -> None:
    settings = SupervisedSettings(batch_size=1, max_steps=12, schedule_steps=12, learning_rate=1.0, warmup_steps=2)
    factors = [prepare.learning_rate_factor(step, settings) for step in (0, 1, 2, 7, 12, 20)]
    # Warm-up 1/2, 2/2; then the cosine from 1 at step 2 through 1/2 halfway (step 7) to 0 at step 12 and after.
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0, 0.0])


def test_training_problems_avoid_the_held_out_ones(tiny: ArithmeticSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = TASK.draw_splits(tiny.data)
    asked: list[set[tuple[int, int]]] = []

    def draw(count: int, generator: random.Random, taken: set[tuple[int, int]]) -> list[Problem]:
        asked.append(taken)
        return [Problem(100, 100)] * count

    monkeypatch.setattr(TASK, "draw_problems", draw)
    ids, _ = prepare._training_examples(TASK, build_tokenizer(), random.Random(0), splits, tiny.student_training)
    assert len(ids) == tiny.student_training.num_problems
    ids, _ = prepare._training_examples(TASK, build_tokenizer(), random.Random(0), splits, tiny.teacher_training)
    assert len(ids) == 3 * 4  # fresh problems: 3 steps of 4
    held_out = {tuple(sorted((p.first, p.second))) for p in (*splits.test, *splits.validation)}
    assert asked == [held_out, held_out]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "settings", "greedy", "sampled", "weak"),
    [
        (TASK, ArithmeticSettings(), 0.9, (0.8, 1.0), (0.05, 0.5)),
        # A borrow forgotten 3 times in 10 holds the teacher below 0.9; the student stops at about 0.1.
        (chains.TASK, ChainSettings(), 0.9, (0.65, 0.9), (0.04, 0.2)),
    ],
    ids=["arithmetic", "chains"],
)
def test_shipped_teacher_and_student(
    task: Task[Any],
    settings: TaskSettings,
    greedy: float,
    sampled: tuple[float, float],
    weak: tuple[float, float],
    shipped_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SG_OPD_CACHE", str(shipped_cache))
    problems = task.draw_splits(settings.data).test
    folders = [resolve(f"builtin/{task.name}-{role}", settings) for role in ("teacher", "student")]
    teacher, student = map(AutoModelForCausalLM.from_pretrained, folders)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    with prepare.isolated_cpu_generator(0):
        assert prepare.sampled_accuracy(teacher, tokenizer, problems, 1, do_sample=False) >= greedy
        assert sampled[0] <= prepare.sampled_accuracy(teacher, tokenizer, problems, 4) <= sampled[1]
        assert weak[0] <= prepare.sampled_accuracy(student, tokenizer, problems, 4) <= weak[1]


def test_slips_make_the_training_text_wrong(tiny: ArithmeticSettings) -> None:
    splits, tokenizer = TASK.draw_splits(tiny.data), build_tokenizer()
    training = replace(tiny.student_training, num_problems=50, slip_probability=1.0)
    ids, _ = prepare._training_examples(TASK, tokenizer, random.Random(0), splits, training)
    answers = [text.split("=", 1) for text in islice(tokenizer.batch_decode(ids, skip_special_tokens=True), 50)]
    right = 0
    for question, rest in answers:
        numbers = [int(number) for number in question.removeprefix("user\n").split("+")]
        right += f"boxed{{{sum(numbers)}}}" in rest
    assert right <= 5


def test_forgotten_borrows_reach_the_training_text(tiny_chains: TaskSettings) -> None:
    splits, tokenizer = chains.TASK.draw_splits(tiny_chains.data), build_tokenizer()
    training = replace(tiny_chains.teacher_training, num_problems=200, forgotten_borrow_probability=1.0)
    ids, _ = prepare._training_examples(chains.TASK, tokenizer, random.Random(0), splits, training)
    wrong, borrows = 0, 0
    for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
        question, solution = text.split("assistant\n")
        before = re.findall(r"^\D*(\d\d)", question) + re.findall(r"=(\d\d)", solution)
        for left, change, total in zip(before, re.findall(r"([+-]\d)=\d\d", solution), before[1:], strict=False):
            off = int(total) - int(left) - int(change)
            borrows += int(left[1]) + int(change) < 0
            wrong += off != 0
            # 100 comes off when an earlier mistake has made the total pass 99; it never does in four steps.
            assert off == (10 if int(left[1]) + int(change) < 0 else 0)
    assert wrong == borrows > 50
