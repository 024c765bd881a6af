"""Tiny untrained models and problems of the built-in task, made once in about a second."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sg_opd_trl.tasks import resolve
from sg_opd_trl.tasks.settings import ArithmeticSettings, DataSettings, ModelSettings, SupervisedSettings


@dataclass(frozen=True)
class Tiny:
    data: str
    teacher: str
    student: str

    def recipe(self, folder: Path) -> Path:
        """A recipe of two steps over two prompts x two rollouts."""
        path = folder / "tiny.yaml"
        path.write_text(
            f"model_name_or_path: {self.student}\nteacher_model_name_or_path: {self.teacher}\n"
            f"dataset_name: {self.data}\noutput_dir: {folder / 'student'}\n"
            "max_steps: 2\nper_device_train_batch_size: 4\nnum_generations: 2\n"
            "max_completion_length: 8\nuse_cpu: true\nbf16: false\ngradient_checkpointing: false\n"
            "save_strategy: 'no'\nlogging_steps: 1\nlearning_rate: 1e-3\ndisable_tqdm: true\n",
            encoding="utf-8",
        )
        return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    model = ModelSettings(hidden_size=16, num_layers=1, intermediate_size=32, num_heads=2)
    training = SupervisedSettings(batch_size=4, max_steps=3, schedule_steps=3, learning_rate=1e-2, warmup_steps=1)
    settings = ArithmeticSettings(
        data=DataSettings(num_train=12, num_validation=4, num_test=6),
        teacher_model=model,
        teacher_training=training,
        student_model=model,
        student_training=replace(training, num_problems=8, slip_probability=0.5),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SG_OPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Tiny(
            data=resolve("builtin/arithmetic", settings),
            teacher=resolve("builtin/arithmetic-teacher", settings),
            student=resolve("builtin/arithmetic-student", settings),
        )


@pytest.fixture
def tiny_recipe(tiny, tmp_path):
    return tiny.recipe(tmp_path)
