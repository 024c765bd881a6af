"""The arrows between the modules of the package go one way: no circle, and none that points up."""

import ast
import re
from itertools import chain
from pathlib import Path

import pytest
from architecture import (
    LAYERS,
    Arrow,
    between_rooms,
    circles,
    import_graph,
    layer_of,
    main,
    modules_of,
    upward,
    without_layer,
)
from repository import ROOT, check_none, code_blocks, read


def test_no_circle() -> None:
    check_none([" ".join(circle) for circle in circles(import_graph(ROOT))])


def test_no_circle_of_rooms() -> None:
    """Two folders may not need one another, even where none of their modules does."""
    check_none([" ".join(circle) for circle in circles(between_rooms(import_graph(ROOT)))])


def test_no_arrow_points_up() -> None:
    check_none([str(arrow) for arrow in upward(import_graph(ROOT))])


def test_every_module_has_a_layer() -> None:
    modules = modules_of(ROOT)
    check_none([f"{module}: add it to LAYERS in tests/architecture.py" for module in without_layer(modules)])
    rooms = {module.split(".")[0] for module in modules}
    check_none([f"{room}: gone from the package, not from LAYERS" for room in {*chain(*LAYERS)} - rooms])


def test_parts_take_a_protocol_and_not_the_trainer() -> None:
    """What stands below the trainer says what it needs of a run; it does not take all of it as `Any`."""
    top = layer_of("trainer") or 0
    below = {name: path for name, path in modules_of(ROOT).items() if (layer_of(name) or 0) < top}
    check_none([f"{name}:{line}" for name, path in below.items() for line in taking_the_trainer(path.read_text())])


@pytest.mark.parametrize(
    ("signature", "taken"),
    [
        ("trainer: Any", True),
        ("x: int, *, trainer: 'SGOPDTrainer | None' = None", True),
        ("trainer", True),
        ("trainer: AnchorRun", False),
        ("run: Any", False),
    ],
)
def test_what_taking_the_trainer_means(signature: str, taken: bool) -> None:
    assert taking_the_trainer(f"def f({signature}):\n    pass") == [1] * taken


def taking_the_trainer(text: str) -> list[int]:
    """Lines of arguments that are the trainer, or anything."""
    signatures = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.arguments)]
    given = [arg for node in signatures for arg in (*node.posonlyargs, *node.args, *node.kwonlyargs)]
    kinds = {arg: ast.unparse(arg.annotation) if arg.annotation else "Any" for arg in given if arg.arg == "trainer"}
    return [arg.lineno for arg, kind in kinds.items() if kind == "Any" or "SGOPDTrainer" in kind]


def test_the_map_for_developers_has_the_same_layers() -> None:
    block = next(block for block in code_blocks(read("CONTRIBUTING.md"), "") if "trainer.py" in block)
    layers = [set(re.findall(r"^(\w+)(?:/|\.py) ", layer, flags=re.MULTILINE)) for layer in block.split("  v\n")]
    assert layers[::-1] == [set(layer) - {""} for layer in LAYERS]


# --- what counts as an arrow -----------------------------------------------------------------------------------------
def graph(folder: Path, **files: str) -> set[Arrow]:
    """Of a package with these modules; `a__b` is the module `b` in the folder `a`."""
    for name, text in files.items():
        *folders, module = name.split("__")
        place = folder.joinpath("sg_opd_trl", *folders)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{module}.py").write_text(text)
        (place / "__init__.py").touch()
    (folder / "sg_opd_trl" / "__init__.py").touch()
    return import_graph(folder)


FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "


@pytest.mark.parametrize(
    ("text", "imported"),
    [
        ("from .config import SGOPDConfig", "config"),
        ("from . import config", "config"),
        ("from sg_opd_trl.config import SGOPDConfig", "config"),
        ("import sg_opd_trl.config", "config"),
        ("def f():\n    from .config import SGOPDConfig", "config"),
        (FOR_TYPES + "from .config import SGOPDConfig", "config"),
        ("from .core.gate import gate", "core.gate"),
        ("from .core import gate", "core.gate"),
        ("import config", None),
        ("from config import x", None),
    ],
)
def test_arrows(tmp_path: Path, text: str, imported: str | None) -> None:
    found = graph(tmp_path, data=text, config="", core__gate="from ..data import x")
    assert found == {Arrow("core.gate", "data")} | ({Arrow("data", imported)} if imported else set())


def test_a_table_of_contents_is_looked_through(tmp_path: Path) -> None:
    listing = FOR_TYPES + "from .local import LocalTeacher\n__getattr__, __dir__ = lazy()\n"
    found = graph(
        tmp_path, teachers__local="", teachers__build="from . import LocalTeacher", cli="from .teachers import Other"
    )
    (tmp_path / "sg_opd_trl/teachers/__init__.py").write_text(listing)
    found = import_graph(tmp_path)
    assert found == {Arrow("teachers.build", "teachers.local"), Arrow("cli", "teachers")}


def test_run_may_name_the_configuration(tmp_path: Path) -> None:
    assert graph(tmp_path / "types", run=FOR_TYPES + "from .config import SGOPDConfig", config="") == set()
    assert graph(tmp_path / "always", run="from .config import SGOPDConfig", config="") == {Arrow("run", "config")}


def test_circles_and_upward_arrows_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "trainer": "from . import preflight",
        "preflight": "from .teachers import build",
        "teachers__build": "from .. import trainer\nfrom ..core import gate",
        "core__gate": "",
        "attic": "from .core import gate",
    }
    found = graph(tmp_path, **files)
    assert circles(found) == [["preflight", "teachers.build", "trainer"]]
    assert circles(between_rooms(found)) == [["preflight", "teachers", "trainer"]]
    assert circles({Arrow("config", "teachers.urls"), Arrow("teachers.build", "config")}) == []
    assert circles(between_rooms({Arrow("config", "teachers.urls"), Arrow("teachers.build", "config")})) != []
    assert list(map(str, upward(found))) == ["teachers.build -> trainer"]
    assert without_layer(modules_of(tmp_path)) == ["attic"]
    main(tmp_path)
    printed = capsys.readouterr().out
    for line in (
        "1 circles of modules, of 3",
        "1 circles of rooms, of 3",
        "1 upward imports",
        "    teachers.build -> trainer",
        "layer: attic",
    ):
        assert line in printed
