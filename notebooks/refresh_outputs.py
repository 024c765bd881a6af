"""Executes every notebook in full and keeps the outputs worth reading: printed text, results and figures.

Warnings, progress bars, counters and timings go, so that a page holds nothing of the machine it ran on.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent


def refresh(path: Path) -> None:
    """Execute one notebook in a folder of its own and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)

    def show(cell: Any, cell_index: int) -> None:
        print(f"{path.name}: cell {cell_index + 1} of {len(notebook.cells)}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(
            notebook, timeout=1800, kernel_name="python3", resources=resources, on_cell_start=show
        ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in map(clean, cell.outputs) if output is not None]
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def clean(output: Any) -> Any:
    """The output without counters, or None if it is not worth keeping."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    if output.output_type == "execute_result":
        output.execution_count = None
        return output
    return output if "image/png" in output.get("data", {}) else None


if __name__ == "__main__":
    os.environ.pop("SG_OPD_SMOKE", None)
    for name in sorted(FOLDER.glob("*.ipynb")):
        refresh(name)
