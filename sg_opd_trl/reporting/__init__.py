"""What a run leaves for people to read: the HTML report, the model card, the progress bar.

Names are imported on first use: the report needs neither torch nor transformers, and nothing here needs matplotlib.
"""

import importlib
from typing import TYPE_CHECKING, Any

_SOURCES = {
    "CompactProgressCallback": "progress",
    "build_model_card": "model_card",
    "write_report": "report",
}

__all__ = ["CompactProgressCallback", "build_model_card", "write_report"]

if TYPE_CHECKING:
    from .model_card import build_model_card
    from .progress import CompactProgressCallback
    from .report import write_report


def __getattr__(name: str) -> Any:
    if name in _SOURCES:
        return getattr(importlib.import_module(f".{_SOURCES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
