"""Where the phases of a run end: a share of its steps as a step."""

import math


def phase_end(share: float, total_steps: int) -> int:
    """Last step of a phase; the small number saves 0.3 of 10 from ending at 2."""
    return math.floor(share * total_steps + 1e-9)
