import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.tasks import KNOWN_NAMES, prepare, resolve
from sg_opd_trl.tasks.settings import ArithmeticSettings, settings_key


@pytest.mark.parametrize("name", ["org/model", "./builtin/arithmetic", "builtin", "/some/where", "org/model@main", ""])
def test_other_names_are_returned_unchanged(name: str, cache: Path) -> None:
    assert resolve(name) == name
    assert not cache.exists()


@pytest.mark.parametrize("task", ["arithmetic", "chains"])
def test_dataset_loads_with_its_splits(task: str, cache: Path, tiny: ArithmeticSettings, tmp_path: Path) -> None:
    folder = resolve(f"builtin/{task}", tiny)
    loaded = datasets.load_dataset(folder, cache_dir=str(tmp_path / "datasets"))
    assert {split: rows.num_rows for split, rows in loaded.items()} == {"train": 12, "test": 6, "tune": 5}
    assert loaded["train"].column_names == ["prompt", "solution"]
    row = loaded["test"][0]
    assert [message["role"] for message in row["prompt"]] == ["user"]
    terms = re.findall(r"[+-]?\d+", row["prompt"][0]["content"])
    assert row["solution"][-2:] == f"{sum(int(term) for term in terms):02d}"[-2:]
    assert len(terms) == {"arithmetic": 2, "chains": 5}[task]
    questions = {row["prompt"][0]["content"] for split in loaded for row in loaded[split]}
    assert len(questions) == 12 + 6 + 5


@pytest.mark.parametrize(
    "name", ["builtin/arithmetic-teacher", "builtin/chains-student", "builtin/arithmetic-servable-teacher"]
)
def test_model_folder_loads(name: str, cache: Path, tiny: ArithmeticSettings) -> None:
    folder = resolve(name, tiny)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "1+1="}], add_generation_prompt=True)["input_ids"]
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits
    assert logits.shape == (1, len(ids), 32)
    assert torch.isfinite(logits).all()


def test_second_call_prepares_nothing(cache: Path, tiny: ArithmeticSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["builtin/arithmetic", "builtin/arithmetic-teacher", "builtin/arithmetic-student@3"]
    folders = [resolve(name, tiny) for name in names]
    for function in ("prepare_model", "prepare_dataset"):
        monkeypatch.delattr(prepare, function)
    assert [resolve(name, tiny) for name in names] == folders
    assert len(set(folders)) == 3
    assert all(Path(folder).is_absolute() and Path(folder).parent == cache for folder in folders)


def test_seed_after_the_name(cache: Path, tiny: ArithmeticSettings) -> None:
    plain, zero, one, padded_one = (
        resolve(f"builtin/arithmetic-student{suffix}", tiny) for suffix in ("", "@0", "@1", "@01")
    )
    assert plain == zero != one == padded_one
    first, second = (AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in (zero, one))
    assert not torch.equal(first, second)


def test_settings_decide_the_folder(cache: Path, tiny: ArithmeticSettings) -> None:
    changed = replace(tiny, student_training=replace(tiny.student_training, learning_rate=1e-3))
    student = "builtin/arithmetic-student"
    assert resolve(student, tiny) != resolve(student, changed)
    assert resolve("builtin/arithmetic-teacher", tiny) == resolve("builtin/arithmetic-teacher", changed)
    more_data = replace(tiny, data=replace(tiny.data, num_test=7))
    # Held-out problems are kept out of training, so they shape the models as well.
    assert resolve(student, tiny) != resolve(student, more_data)


def test_tasks_share_no_folder(cache: Path, tiny: ArithmeticSettings) -> None:
    # The same settings for both, so that only the task tells them apart.
    names = [f"builtin/{task}{role}" for task in ("arithmetic", "chains") for role in ("", "-teacher@1", "-student@1")]
    assert names[0] in KNOWN_NAMES
    assert len({resolve(name, tiny) for name in names}) == 6


def test_shipped_settings_are_the_tasks_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    def build(
        folder: Path, task: Any, title: str, seed: int, data: Any, shape: Any, training: Any
    ) -> dict[str, object]:
        asked.append((f"{title} {task.name} {seed}", training.forgotten_borrow_probability))
        return {}

    monkeypatch.setattr(prepare, "prepare_model", build)
    for name in ("builtin/chains-teacher@2", "builtin/chains-student", "builtin/arithmetic-teacher"):
        resolve(name)
    assert asked == [
        ("chains-teacher chains 2", 0.3),
        ("chains-student chains 0", 0.0),
        ("arithmetic-teacher arithmetic 0", 0.0),
    ]


def test_key_is_stable_and_tells_settings_apart(tiny: ArithmeticSettings) -> None:
    assert settings_key("student", 0, tiny) == settings_key("student", 0, tiny)
    keys = {settings_key("student", 0, tiny), settings_key("student", 1, tiny), settings_key("student", 0)}
    assert len(keys) == 3
    assert all(len(key) == 12 and int(key, 16) >= 0 for key in keys)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("builtin/arithmetic-techer", "builtin/arithmetic-teacher"),
        ("builtin/arithmetic-studnet@1", "builtin/arithmetic-student"),
        ("builtin/", "builtin/chains"),
        ("builtin/arithmetic@1", "builtin/arithmetic"),
        ("builtin/chain-teacher", "builtin/chains-teacher"),
        ("builtin/chains@0", "builtin/chains"),
    ],
)
def test_unknown_name(name: str, near: str, cache: Path) -> None:
    with pytest.raises(SGOPDConfigError) as caught:
        resolve(name)
    message = str(caught.value)
    assert repr(name) in message
    assert all(known in message for known in KNOWN_NAMES)
    assert f"Set it to {near!r}" in message
    assert not cache.exists()


@pytest.mark.parametrize("seed", ["", "x", "-1", "1.5", "1@2", " 1", "²"])
def test_seed_must_be_a_whole_number(seed: str, cache: Path) -> None:
    with pytest.raises(SGOPDConfigError, match="must be a whole number >= 0, got 'builtin/chains-teacher@") as caught:
        resolve(f"builtin/chains-teacher@{seed}")
    assert "as in 'builtin/chains-teacher@1'" in str(caught.value)
    assert not cache.exists()


def test_import_is_cheap() -> None:
    script = (
        "import sys, sg_opd_trl.tasks as tasks; tasks.resolve('org/model'); "
        "print(sorted({'torch', 'transformers', 'tokenizers', 'datasets', 'trl'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_cached_model_is_found_without_torch(cache: Path, tiny: ArithmeticSettings) -> None:
    folder = resolve("builtin/arithmetic-teacher", tiny)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from conftest import tiny_settings; "
        "from sg_opd_trl.tasks import resolve; "
        "print(resolve('builtin/arithmetic-teacher', tiny_settings()), 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [folder, "False"]
