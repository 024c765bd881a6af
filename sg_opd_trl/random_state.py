"""The random state of the process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def forked_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch (the CPU's and the device's) after the block."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)
