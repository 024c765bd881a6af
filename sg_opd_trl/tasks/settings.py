"""Every number that shapes the built-in tasks. The cache key is a hash of these, so a change here builds anew."""

import hashlib
import json
from dataclasses import asdict, dataclass, is_dataclass

FORMAT_VERSION = 1
"""Raised when the code changes what the same settings produce; part of every cache key."""


@dataclass(frozen=True)
class DataSettings:
    """Sizes and seed of the problem sets; `validation` is used by preparation only and never leaves it.

    `tune` is a split for choosing settings of a training run, on problems that no table of results uses.
    """

    seed: int = 0
    num_train: int = 4000
    num_validation: int = 100
    num_test: int = 200
    num_tune: int = 200


@dataclass(frozen=True)
class ModelSettings:
    """Shape of a Qwen3-architecture model; attention has as many key-value heads as query heads."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int = 4
    max_position_embeddings: int = 256


@dataclass(frozen=True)
class SupervisedSettings:
    """Supervised training of one model.

    `num_problems` None draws fresh problems at every step; a number trains on that many, over and over.
    `schedule_steps` is the length of the cosine schedule, `max_steps` where training ends at the latest. With
    `stop_accuracy`, training ends once sampled accuracy on the validation problems reaches it; it is looked at every
    `check_every` steps from `check_from` on, with `check_samples` samples for each problem. The two probabilities are
    the chances of a mistake in each step of the solutions trained on: any wrong number, or (`chains` only) a borrow
    forgotten.
    """

    batch_size: int
    max_steps: int
    schedule_steps: int
    learning_rate: float
    warmup_steps: int = 20
    num_problems: int | None = None
    slip_probability: float = 0.0
    forgotten_borrow_probability: float = 0.0
    stop_accuracy: float | None = None
    check_from: int = 200
    check_every: int = 10
    check_samples: int = 4


_TEACHER = ModelSettings(hidden_size=96, num_layers=3, intermediate_size=288)
_STUDENT = ModelSettings(hidden_size=64, num_layers=2, intermediate_size=192)


@dataclass(frozen=True)
class TaskSettings:
    """A whole built-in task: problem sets, teacher and student, and a teacher that vLLM can serve on a CPU."""

    data: DataSettings
    teacher_model: ModelSettings
    teacher_training: SupervisedSettings
    student_model: ModelSettings
    student_training: SupervisedSettings
    # On a CPU vLLM has no heads below 32; the teacher's shape stays as it is for the results that were made with it.
    servable_teacher_model: ModelSettings = ModelSettings(
        hidden_size=96, num_layers=3, intermediate_size=288, num_heads=3
    )

    @property
    def servable_teacher_training(self) -> SupervisedSettings:
        """That of the teacher."""
        return self.teacher_training


# A student stops at a quarter (arithmetic) or a tenth (chains) of right answers: far enough for a verifier to have
# right rollouts to tell from wrong ones, and early enough for a teacher to have something to teach.
@dataclass(frozen=True)
class ArithmeticSettings(TaskSettings):
    """The task `arithmetic`: a good teacher. All values are our choice, picked by measurement."""

    data: DataSettings = DataSettings()
    teacher_model: ModelSettings = _TEACHER
    teacher_training: SupervisedSettings = SupervisedSettings(
        batch_size=48, max_steps=250, schedule_steps=250, learning_rate=3e-3
    )
    student_model: ModelSettings = _STUDENT
    student_training: SupervisedSettings = SupervisedSettings(
        batch_size=32,
        max_steps=400,
        schedule_steps=400,
        learning_rate=4e-3,
        num_problems=600,
        slip_probability=0.15,
        stop_accuracy=0.25,
    )


@dataclass(frozen=True)
class ChainSettings(TaskSettings):
    """The task `chains`: a teacher that is wrong on some steps, a weaker student. Our choice, picked by measurement.

    Picked for the accuracy of teacher and student and for the time they take, before any method was compared.
    """

    data: DataSettings = DataSettings(num_train=5000)
    teacher_model: ModelSettings = _TEACHER
    teacher_training: SupervisedSettings = SupervisedSettings(
        batch_size=48,
        max_steps=400,
        schedule_steps=400,
        learning_rate=4e-3,
        forgotten_borrow_probability=0.3,
    )
    student_model: ModelSettings = _STUDENT
    student_training: SupervisedSettings = SupervisedSettings(
        batch_size=32,
        max_steps=800,
        schedule_steps=800,
        learning_rate=4e-3,
        num_problems=2400,  # of 600 most students learn the slips by heart before they learn to calculate
        slip_probability=0.15,
        stop_accuracy=0.10,
        check_from=300,
    )


def settings_key(*parts: object) -> str:
    """Hash of settings, stable across processes and machines.

    Args:
        *parts: Dataclass instances or JSON-able values, in a fixed order.

    Returns:
        str: Twelve hexadecimal digits.
    """
    plain = [
        asdict(part) if is_dataclass(part) and not isinstance(part, type) else part
        for part in (FORMAT_VERSION, *parts)
    ]
    # Twelve digits: part of a folder's name, and a handful of settings will never collide in 48 bits.
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
