"""The fields of `SGOPDConfig`, one file per group; `config.py` puts them together."""

from .anchor import AnchorFields
from .gate import GateFields
from .objective import ObjectiveFields
from .running import RunningFields
from .teacher import TeacherFields
from .weights import WeightFields

__all__ = ["AnchorFields", "GateFields", "ObjectiveFields", "RunningFields", "TeacherFields", "WeightFields"]
