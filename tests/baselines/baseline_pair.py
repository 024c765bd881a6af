"""A tiny teacher and student on disk, with settings of two optimizer steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Pair:
    student: str
    teacher: str

    def settings(self, folder: Path, **changes: Any) -> dict[str, Any]:
        """Two steps of 8 rows on the CPU."""
        return {
            "output_dir": str(folder),
            "teacher_model_name_or_path": self.teacher,
            "model_init_kwargs": {"dtype": "float32"},
            "per_device_train_batch_size": 8,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
        } | changes
