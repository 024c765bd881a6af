"""Runs an example of the pages as a newcomer would, in a process of its own, and keeps every warning that it shows."""

import json
import subprocess
import sys
from pathlib import Path

from repository import PATIENCE

#: What a program sees of logging and warnings, also from libraries that keep their loggers to themselves.
_LISTENING = """
import json, logging, pathlib
import transformers

shown = []


class Keep(logging.Handler):
    def emit(self, record):
        shown.append(f"{record.name}: {record.getMessage()}")


transformers.utils.logging.enable_propagation()
logging.captureWarnings(True)
logging.getLogger().addHandler(Keep(logging.WARNING))
try:
    code = pathlib.Path("example.py").read_text(encoding="utf-8")
    exec(compile(code, "example.py", "exec"), {"__name__": "__main__"})
finally:
    pathlib.Path("shown.json").write_text(json.dumps(shown), encoding="utf-8")
"""


def run_example(source: str, folder: Path) -> list[str]:
    """Run Python code in a folder; returns the warnings that it showed, logged or raised."""
    (folder / "example.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-c", _LISTENING]
    subprocess.run(command, cwd=folder, check=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    return json.loads((folder / "shown.json").read_text(encoding="utf-8"))
