"""Teachers: models that score the student's rollouts and write rollouts of their own."""

from .base import Sampling, Teacher
from .local import LocalTeacher

__all__ = ["LocalTeacher", "Sampling", "Teacher"]
