"""Has every Python process of a test run see a machine with bfloat16 (SG_OPD_TEST_BF16=1) or without (0).

Python imports a module of this name when it starts. The tests' own process does so in `conftest.py`, those that it
starts find this folder in PYTHONPATH.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

VARIABLE = "SG_OPD_TEST_BF16"
#: Module -> its functions that tell whether there is bfloat16.
TELLING = {
    "transformers.utils.import_utils": "is_torch_bf16_gpu_available",
    "sg_opd_trl.precision": "cpu_has_bf16",
}


class Switch(importlib.abc.MetaPathFinder):
    """Changes what these modules tell once they are loaded: others import the functions by name.

    Args:
        has_bf16: what they tell.
    """

    def __init__(self, has_bf16: bool) -> None:
        self.has_bf16 = has_bf16

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """The module as Python finds it, its function replaced behind its loading."""
        if name not in TELLING:
            return None
        spec: Any = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            setattr(module, TELLING[name], lambda: self.has_bf16)

        spec.loader.exec_module = load_and_change
        return spec


if os.environ.get(VARIABLE, "") not in ("", "0", "1"):
    raise ValueError(
        f"{VARIABLE} must be 0 or 1, got {os.environ[VARIABLE]!r}. Leave it out for this machine as it is."
    )
if os.environ.get(VARIABLE):
    if loaded := TELLING.keys() & sys.modules.keys():
        raise RuntimeError(f"{VARIABLE} came too late: {sorted(loaded)} are loaded.")
    sys.meta_path.insert(0, Switch(os.environ[VARIABLE] == "1"))
