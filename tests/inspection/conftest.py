"""A recipe on tiny random models that is as it should be, for tests that break one thing at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import save_pair, tiny_data

from sg_opd_trl.inspection import Report

Look = Callable[..., Report]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `student`, `teacher` and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder / "student", 0)
    save_pair(folder / "teacher", 1)
    tiny_data(24).to_json(folder / "rows.jsonl")
    return folder


@pytest.fixture
def look(pair: Path, tmp_path: Path) -> Look:
    """Inspect the recipe with some settings changed; None leaves one out."""
    from sg_opd_trl.cli.check import check

    settings = {
        "model_name_or_path": pair / "student",
        "teacher_model_name_or_path": pair / "teacher",
        "dataset_name": pair / "rows.jsonl",
        "reward_funcs": "inspection.own_verifiers.first_digit",
        "output_dir": tmp_path / "student",
        "max_steps": 2,
        "per_device_train_batch_size": 16,
        "num_generations": 8,
        "max_completion_length": 64,
        "use_cpu": "true",
        "bf16": "false",
        "gradient_checkpointing": "false",
        "save_strategy": "no",
        "report_to": "none",
    }

    def inspected(**changes: object) -> Report:
        given = {name: value for name, value in (settings | changes).items() if value is not None}
        return check([word for name, value in given.items() for word in (f"--{name}", str(value))], 4)

    return inspected
