"""Reward functions by name."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import SGOPDConfigError, did_you_mean

BUILTIN = ("math_reward", "exact_match_reward")


def load_reward_funcs(names: Sequence[str]) -> list[Callable[..., Any]]:
    """Reward functions in the order of their names.

    Args:
        names: `math_reward`, `exact_match_reward`, or a dotted import path such as `my_package.rewards.my_reward`;
            modules of the current folder are found too.

    Returns:
        TRL reward functions.

    Raises:
        SGOPDConfigError: unknown name, a module that cannot be imported, or not a function.
    """
    return [_load(name) for name in names]


def _load(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        if name not in BUILTIN:
            raise SGOPDConfigError(
                f"`reward_funcs` must be among {list(BUILTIN)} or dotted import paths, got {name!r}."
                f"{did_you_mean(name, BUILTIN)}"
            )
        module_name, attribute = "sg_opd_trl.verifiers", name
    elif os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end: a file here must not stand in for an installed package
    try:
        module = importlib.import_module(module_name)
        reward_func = getattr(module, attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise SGOPDConfigError(
            f"`reward_funcs` must be importable, got {name!r}: {error}. It is looked up on the Python path and in the "
            "current folder. Check the spelling, or start from the folder that holds the module."
        ) from error
    except Exception as error:
        # Whatever a user's own module does while it is imported.
        raise SGOPDConfigError(
            f"`reward_funcs` must be importable, got {name!r}: importing {module_name} ends in "
            f"{type(error).__name__}: {error}. Mend the module."
        ) from error
    if not callable(reward_func):
        raise SGOPDConfigError(
            f"`reward_funcs` must name functions, got {name!r}, a {type(reward_func).__name__}. It is called once per "
            "batch. Name a function with TRL's reward signature."
        )
    return reward_func
