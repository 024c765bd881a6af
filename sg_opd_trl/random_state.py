"""The random state of the process."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor


class RandomState(NamedTuple):
    """The random state of Python, NumPy and torch, the CPU's and the device's.

    Attributes:
        python: of `random`.
        numpy: of `numpy.random`.
        torch_cpu: of torch's CPU generator.
        torch_device: of the device's generator, None on a CPU.
        device: whose it is.
    """

    python: Any
    numpy: Any
    torch_cpu: Tensor
    torch_device: Tensor | None
    device: torch.device

    @classmethod
    def of(cls, device: torch.device) -> "RandomState":
        """As it is now."""
        own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), numpy.random.get_state(), torch.random.get_rng_state(), own, device)

    def restore(self) -> None:
        """Make it so again."""
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        torch.random.set_rng_state(self.torch_cpu)
        if self.torch_device is not None:
            torch.cuda.set_rng_state(self.torch_device, self.device)


@contextmanager
def forked_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random state after the block."""
    before = RandomState.of(device)
    try:
        yield
    finally:
        before.restore()


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, the same on every machine."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
