"""Mixtures of experts whose configuration has them return router logits: only where the auxiliary loss is wanted.

Such a model computes the loss of its routers in every forward. While it writes, the sizes of mask and logits do not
match, and the forward fails; while it scores, the loss is thrown away, and its head fails for configurations that
call the number of their experts by another name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .internals import inner_model


def returns_router_logits(model: nn.Module) -> bool:
    """Whether the configuration of a model, plain or wrapped, asks for router logits in every forward."""
    settings = _text_config(model)
    return hasattr(settings, "output_router_logits") and bool(settings.output_router_logits)


@contextmanager
def without_router_logits(model: nn.Module) -> Iterator[None]:
    """Have a model, plain or wrapped, return no router logits for the block."""
    if not returns_router_logits(model):
        yield
        return
    settings = _text_config(model)
    settings.output_router_logits = False
    try:
        yield
    finally:
        settings.output_router_logits = True


def _text_config(model: nn.Module) -> Any:
    base = inner_model(model)
    return base.config.get_text_config()
