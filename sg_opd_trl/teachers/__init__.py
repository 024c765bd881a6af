"""Teachers: models that score the student's rollouts and write rollouts of their own."""

from .adapter import AdapterTeacher
from .base import Sampling, Teacher
from .local import LocalTeacher
from .routed import RoutedTeacher

__all__ = ["AdapterTeacher", "LocalTeacher", "RoutedTeacher", "Sampling", "Teacher"]
