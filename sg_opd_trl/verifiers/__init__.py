"""Verifiers: reward functions that say right (1.0), wrong (0.0) or "no verdict" (`None`).

Importing this package loads neither math-verify nor sympy: they live in the judging child process alone.
"""

from .judge import Judge, Judgement
from .rewards import exact_match_reward, math_reward

__all__ = ["Judge", "Judgement", "exact_match_reward", "math_reward"]
