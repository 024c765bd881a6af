"""What tests share that look at the repository or start processes in it: its files and pages, and how long to wait."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sg_opd_trl"
#: Seconds after which another process hangs, however busy the machine is: half of pytest-timeout's limit.
PATIENCE = 600
SKIPPED_FOLDERS = {"build", "dist", "outputs", "__pycache__", "wandb", "trackio"}
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".cfg", ".toml", ".txt", ".cff", ".ipynb", ".html", ".jinja", ""}


def python_path(*folders: Path) -> str:
    """PYTHONPATH of a process that a test starts: these folders before what this process was given."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))


def repository_files() -> Iterator[Path]:
    """Text files that belong to the repository, without what tools and runs leave behind."""
    for folder, names, files in os.walk(ROOT):
        names[:] = [
            name
            for name in names
            if name not in SKIPPED_FOLDERS
            and not name.endswith(".egg-info")
            and (name == ".ci" or not name.startswith("."))
            and not (Path(folder) / name / "pyvenv.cfg").exists()
        ]
        for file in files:
            # In a worktree .git is a file, with a path of the machine.
            if Path(file).suffix in TEXT_SUFFIXES and file != ".git":
                yield Path(folder) / file


PAGES = sorted(path for path in repository_files() if path.suffix == ".md")
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def check_none(offences: list[str]) -> None:
    """Fail with all offences, one a line: pytest shortens the lists that it compares."""
    assert not offences, "\n".join([f"{len(offences)} offences", *offences])


def lines_with(pattern: re.Pattern[str], path: Path) -> Iterator[tuple[str, str]]:
    """`file:line` and what was found there, for each match of a pattern in a file."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for found in pattern.finditer(line):
            yield f"{name_of(path)}:{number}", found.group()


def tables(text: str, first_column: str) -> list[dict[str, str]]:
    """Rows of every Markdown table whose first header cell is `first_column`."""
    rows: list[dict[str, str]] = []
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            header = []
        elif cells[0] == first_column:
            header = cells
        elif header and not set(line) <= set("|-: "):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
