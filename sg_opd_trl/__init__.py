"""On-policy distillation for TRL, with a verifier as the trust signal for the teacher.

Names are imported on first use, so that `import sg_opd_trl` costs nothing and `sg_opd_trl.core` needs torch alone.
"""

import warnings
from typing import TYPE_CHECKING

from .lazy_imports import lazy_names

__version__ = "0.1.0"

# TRL's default for `gradient_checkpointing`, and its calls of the model, use the names that transformers has begun to
# replace: there is nothing that a user could set otherwise.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)

_DEFINED_IN = {
    "SGOPDConfig": "config",
    "SGOPDTrainer": "trainer",
    "TeacherAnchorCallback": "teacher_sampling.callback",
    "AdapterTeacher": "teachers",
    "LocalTeacher": "teachers",
    "RoutedTeacher": "teachers",
    "ServerTeacher": "teachers",
    "math_reward": "verifiers",
    "exact_match_reward": "verifiers",
    "evaluate_model": "evaluation",
    "EvaluationResult": "evaluation",
    "pass_at_k": "evaluation",
    "SGOPDError": "errors",
    "SGOPDConfigError": "errors",
    "DataError": "errors",
    "TeacherError": "errors",
    "VerifierError": "errors",
    "NonFiniteError": "errors",
    "CheckpointError": "errors",
    "RankError": "errors",
}
_MODULES = ("core", "evaluation", "reporting", "tasks", "teachers", "verifiers")

__all__ = [
    "AdapterTeacher",
    "CheckpointError",
    "DataError",
    "EvaluationResult",
    "LocalTeacher",
    "NonFiniteError",
    "RankError",
    "RoutedTeacher",
    "SGOPDConfig",
    "SGOPDConfigError",
    "SGOPDError",
    "SGOPDTrainer",
    "ServerTeacher",
    "TeacherAnchorCallback",
    "TeacherError",
    "VerifierError",
    "__version__",
    "evaluate_model",
    "exact_match_reward",
    "math_reward",
    "pass_at_k",
]

if TYPE_CHECKING:
    from .config import SGOPDConfig
    from .errors import (
        CheckpointError,
        DataError,
        NonFiniteError,
        RankError,
        SGOPDConfigError,
        SGOPDError,
        TeacherError,
        VerifierError,
    )
    from .evaluation import EvaluationResult, evaluate_model, pass_at_k
    from .teacher_sampling.callback import TeacherAnchorCallback
    from .teachers import AdapterTeacher, LocalTeacher, RoutedTeacher, ServerTeacher
    from .trainer import SGOPDTrainer
    from .verifiers import exact_match_reward, math_reward

__getattr__, __dir__ = lazy_names(__name__, _DEFINED_IN, _MODULES)
