"""What can be seen of a run without training: rows in green, yellow and red, and what to change."""

from .report import Report, Row
from .run import first_seconds, inspect_run

__all__ = ["Report", "Row", "first_seconds", "inspect_run"]
