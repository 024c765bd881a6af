"""Settings small enough to prepare everything in about a second, and a cache of the test's own."""

from dataclasses import replace
from pathlib import Path

import pytest

from sg_opd_trl.tasks.settings import (
    ArithmeticSettings,
    ChainSettings,
    DataSettings,
    ModelSettings,
    SupervisedSettings,
    TaskSettings,
)


def tiny_settings(kind: type[ArithmeticSettings] | type[ChainSettings] = ArithmeticSettings) -> TaskSettings:
    model = ModelSettings(hidden_size=16, num_layers=1, intermediate_size=32, num_heads=2)
    training = SupervisedSettings(batch_size=4, max_steps=3, schedule_steps=3, learning_rate=1e-2, warmup_steps=1)
    return kind(
        data=DataSettings(num_train=12, num_validation=4, num_test=6, num_tune=5),
        teacher_model=model,
        teacher_training=training,
        student_model=model,
        student_training=replace(training, num_problems=8, slip_probability=0.5),
    )


@pytest.fixture
def tiny() -> TaskSettings:
    return tiny_settings()


@pytest.fixture
def tiny_chains() -> TaskSettings:
    return tiny_settings(ChainSettings)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("SG_OPD_CACHE", str(root))
    return root
