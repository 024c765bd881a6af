"""What is distilled at each token: one file per `distillation_mode`."""

from .base import Objective, Positions
from .build import build_objective, check_objective

__all__ = ["Objective", "Positions", "build_objective", "check_objective"]
