"""The recipe files, and how tests read them."""

from functools import cache
from pathlib import Path
from unittest.mock import patch

import yaml

from sg_opd_trl.cli.parsing import build_settings, read_command_line

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml")) + sorted(FOLDER.rglob("*.yml"))
ACCELERATE = [path for path in FILES if path.parent.name == "accelerate_configs"]
STUDIES = [path for path in FILES if path.parent.name == "studies"]
TRAIN = [path for path in FILES if path not in ACCELERATE and path not in STUDIES]
SCALES = ("arithmetic", "chains", "Qwen3-1.7B")
BUILTIN = [path for path in TRAIN if path.parent.name in SCALES[:2]]


def name(path):
    return str(path.relative_to(FOLDER))


def of_scale(scale):
    return [path for path in TRAIN if path.is_relative_to(FOLDER / scale)]


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def header(path):
    return path.read_text(encoding="utf-8").split("\n\n")[0]


@cache
def parse(path, *flags):
    """Once for the many tests that read it. `use_cpu`: bfloat16 recipes are refused where there is no GPU."""
    # So is a server of rollouts.
    with patch("sg_opd_trl.config.can_send_weights", return_value=True):
        return build_settings(read_command_line(["--config", str(path), "--use_cpu", "true", *flags]))


def index():
    return (FOLDER / "README.md").read_text(encoding="utf-8")


def index_table(heading):
    """Cells of the first table below a heading of the index, its own heading left out."""
    lines = index().split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]


def named(cell):
    """The recipe a cell of the index names, or None."""
    return FOLDER / cell.strip("`") if cell.startswith("`") else None
