"""The import graph of the package: its circles, and its arrows that point up.

`python tests/architecture.py [ROOT]` prints both for the working tree, or for another one.

An arrow is any `import` statement between two modules of the package, also one inside a function or under
`TYPE_CHECKING`: who needs the type of a thing knows the thing, and a reader has to follow. Two things are no arrows. A
package whose names are imported on first use is a table of contents: an import of one of its names is an arrow to the
module that has it. And `run.py` names the configuration's type, so that the parts below do not have to.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "sg_opd_trl"

# From the bottom to the top; "" is the package itself. A module may import what is in its own layer or below.
LAYERS = (
    (
        "",
        "checkpoints",
        "errors",
        "files",
        "folder_lock",
        "hub",
        "launcher",
        "lazy_imports",
        "precision",
        "processes",
        "random_state",
        "run",
        "saved_card",
        "scrubbing",
        "setting",
        "student_files",
    ),
    ("core",),
    ("models", "data", "evaluation_shares", "own_rollouts", "skipped_steps", "tasks"),
    ("trl_seam", "bookkeeping", "ending", "machines", "ranks", "run_folder", "run_identity"),
    ("agreement", "verifiers", "evaluation", "evaluation_files", "evaluation_plan", "evaluation_sampling"),
    ("teachers",),
    ("teacher_sampling", "objectives", "config", "noise", "prefetch", "token_weights"),
    ("baselines", "reporting"),
    ("context_room", "inspection", "preflight"),
    ("trainer",),
    ("cli", "study"),
)
ONLY_TYPES = "run"


class Arrow(NamedTuple):
    """One module imports another."""

    importer: str
    imported: str

    def __str__(self) -> str:
        return f"{self.importer or PACKAGE} -> {self.imported or PACKAGE}"


def modules_of(root: Path) -> dict[str, Path]:
    """Every module by its name inside the package, a folder by its own; the package itself is the empty string."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph(root: Path) -> set[Arrow]:
    """All arrows between the modules of the package under `root`."""
    modules = modules_of(root)
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    contents = {name: _names_on_first_use(tree) for name, tree in trees.items()}
    arrows = set()
    for importer, tree in trees.items():
        if contents[importer]:
            continue
        is_folder = modules[importer].name == "__init__.py"
        above = [PACKAGE, *filter(None, importer.split("."))]
        for module, name in _imports(tree, above if is_folder else above[:-1], importer == ONLY_TYPES):
            target = _resolved(module, name, modules, contents)
            if target != importer:
                arrows.add(Arrow(importer, target))
    return arrows


def circles(arrows: Iterable[Arrow]) -> list[list[str]]:
    """Sets of modules that can all be reached from one another, the largest first."""
    targets = defaultdict(set)
    for importer, imported in arrows:
        targets[importer].add(imported)

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        left = [start]
        while left:
            new = targets[left.pop()] - found
            found |= new
            left += new
        return found

    reach = {module: reached(module) for module in list(targets)}
    around = {frozenset(o for o in reach[module] if module in reach.get(o, ())) for module in reach}
    return sorted((sorted(circle) for circle in around if circle), key=lambda circle: (-len(circle), circle))


def between_rooms(arrows: Iterable[Arrow]) -> set[Arrow]:
    """The arrows between modules and folders at the top, whatever is inside of these."""
    rooms = (Arrow(importer.split(".")[0], imported.split(".")[0]) for importer, imported in arrows)
    return {arrow for arrow in rooms if arrow.importer != arrow.imported}


def layer_of(module: str) -> int | None:
    """Number of a module's layer; None where nobody has given it one."""
    room = module.split(".")[0]
    return next((number for number, rooms in enumerate(LAYERS) if room in rooms), None)


def upward(arrows: Iterable[Arrow]) -> list[Arrow]:
    """Arrows to a higher layer."""
    return sorted(arrow for arrow in arrows if _rank(arrow.importer) < _rank(arrow.imported))


def without_layer(modules: Iterable[str]) -> list[str]:
    """Modules that nobody has given a layer."""
    return [module for module in modules if layer_of(module) is None]


def _rank(module: str) -> float:
    """NaN, which is neither above nor below, for a module without a layer."""
    layer = layer_of(module)
    return float("nan") if layer is None else layer


def _imports(tree: ast.Module, folder: list[str], only_types: bool) -> Iterator[tuple[str, str]]:
    """`(module, name)` of what a module imports from the package, both as they are inside of it."""
    hidden = {id(inner) for node in ast.walk(tree) if only_types and _is_for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            named = [(alias.name.split("."), "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else []
            module = [*start, *filter(None, (node.module or "").split("."))]
            named = [(module, alias.name) for alias in node.names]
        else:
            continue
        for (first, *rest), name in named:
            if first == PACKAGE:
                yield ".".join(rest), name


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _resolved(module: str, name: str, modules: dict[str, Path], contents: dict[str, dict[str, str]]) -> str:
    """The module that an imported name is in."""
    inside = f"{module}.{name}".strip(".")
    if inside in modules:
        return inside
    while name in contents[module]:
        module = f"{module}.{contents[module][name]}".strip(".")
    return module


def _names_on_first_use(tree: ast.Module) -> dict[str, str]:
    """Name -> module inside the folder, of a package with a `__getattr__`; type checkers read them in its own list."""
    assigned = {name.id for node in tree.body if isinstance(node, ast.Assign) for name in _names(node.targets)}
    if "__getattr__" not in assigned:
        return {}
    listed = [node for part in tree.body if _is_for_types(part) for node in ast.walk(part)]
    return {a.name: node.module or "" for node in listed if isinstance(node, ast.ImportFrom) for a in node.names}


def _names(targets: list[ast.expr]) -> Iterator[ast.Name]:
    for target in targets:
        yield from (node for node in ast.walk(target) if isinstance(node, ast.Name))


def main(root: Path) -> None:
    """Print the numbers."""
    modules, arrows = modules_of(root), import_graph(root)
    print(f"{len(modules)} modules, {len(arrows)} imports")
    for kind, found in (("modules", circles(arrows)), ("rooms", circles(between_rooms(arrows)))):
        print(f"{len(found)} circles of {kind}{''.join(f', of {len(circle)}' for circle in found)}")
        for circle in found:
            print(f"    {' '.join(circle)}")
    up = upward(arrows)
    print(f"{len(up)} upward imports")
    for arrow in up:
        print(f"    {arrow}")
    lost = without_layer(modules)
    if lost:
        print(f"{len(lost)} modules without a layer: {' '.join(lost)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
