"""What the fields of a configuration are where nothing is set."""

from dataclasses import MISSING, fields
from typing import Any


def defaults_of(config_class: type) -> dict[str, Any]:
    """The default of every field of a dataclass; `MISSING` where it has none."""
    return {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(config_class)
    }
