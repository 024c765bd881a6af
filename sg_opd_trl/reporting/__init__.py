"""What a run leaves for people to read: the HTML report, the model card, the progress bar.

Names are imported on first use: the report needs neither torch nor transformers, and nothing here needs matplotlib.
"""

from typing import TYPE_CHECKING

from ..lazy_imports import lazy_names

_DEFINED_IN = {
    "CompactProgressCallback": "progress",
    "build_model_card": "model_card",
    "write_report": "report",
}

__all__ = ["CompactProgressCallback", "build_model_card", "write_report"]

if TYPE_CHECKING:
    from .model_card import build_model_card
    from .progress import CompactProgressCallback
    from .report import write_report

__getattr__, __dir__ = lazy_names(__name__, _DEFINED_IN)
