"""The one place that touches TRL's private names, and what of them the rest of the package may use.

Supported: `trl>=1.16,<1.17`; `tests/contract` fails when TRL moves a name.
"""

from trl.data_utils import is_conversational
from trl.trainer.utils import create_model_from_path, get_config_model_id, is_async_callable

from .models import (
    add_fused_head,
    add_head_output,
    compact_head,
    fused_log_probs,
    is_sharded,
    model_for_generation,
    output_head,
    prepare_frozen_model,
)
from .trainer import GRPOSeam

__all__ = [
    "GRPOSeam",
    "add_fused_head",
    "add_head_output",
    "compact_head",
    "create_model_from_path",
    "fused_log_probs",
    "get_config_model_id",
    "is_async_callable",
    "is_conversational",
    "is_sharded",
    "model_for_generation",
    "output_head",
    "prepare_frozen_model",
]
