"""Links, tables and examples of the pages are true."""

import ast
import importlib
import importlib.util
import inspect
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from repository import PAGES, ROOT, check_none, code_blocks, name_of, read, tables

import sg_opd_trl
from sg_opd_trl import core


def heading_anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def without_code(text: str) -> str:
    """A page with its code blocks empty, and every line where it was."""
    return re.sub(r"^```.*?^```", lambda block: "\n" * block.group().count("\n"), text, flags=re.DOTALL | re.MULTILINE)


def test_links_resolve() -> None:
    offences = []
    for page in PAGES:
        for number, line in enumerate(without_code(page.read_text(encoding="utf-8")).splitlines(), start=1):
            for target in re.findall(r"\]\(([^)\s]+)\)", line):
                path, _, anchor = target.partition("#")
                linked = page.parent / path if path else page
                there = linked.exists()
                if not there or (anchor and anchor not in heading_anchors(linked.read_text(encoding="utf-8"))):
                    offences.append(f"{name_of(page)}:{number}: {target}")
    check_none(offences)


def test_equation_table_names_functions_where_they_are() -> None:
    rows = tables(read("README.md"), "paper")
    assert len(rows) >= 10
    for row in rows:
        name = row["function"].strip("`")
        label, link = re.fullmatch(r"\[(.+)\]\((.+)\)", row["file"]).groups()
        assert link.endswith("/" + label)
        owner = sg_opd_trl if name.startswith("SGOPD") else core
        assert Path(inspect.getfile(inspect.unwrap(attrgetter(name)(owner)))).resolve() == (ROOT / link).resolve()


def test_places_for_new_things_exist() -> None:
    rows = tables(read("CONTRIBUTING.md"), "a new")
    assert len(rows) >= 6
    places = re.findall(r"`([\w/]+(?:/|\.py))`", " ".join(" ".join(row.values()) for row in rows))
    assert {"config.py", "objectives.py"} <= set(places)
    check_none([place for place in places if not any((base / place).exists() for base in (ROOT, ROOT / "sg_opd_trl"))])


def test_performance_page_names_functions_where_they_are() -> None:
    found = re.findall(r"\[[\w./]+\]\(([\w./]+\.py)\), `(\w+)`", read("docs/performance.md"))
    assert len(found) >= 5
    check_none([f"{link}: {name}" for link, name in found if f"def {name}(" not in read(f"docs/{link}")])


def test_worked_examples_are_what_the_core_computes() -> None:
    rows = tables(read("docs/methods.md"), "#")
    assert [row["#"] for row in rows] == [f"E{number}" for number in range(1, 9)]
    modes = {
        "interp 1": {"disagree_mode": "interp", "disagree_interp_beta": 1.0},
        "interp 0.7": {"disagree_mode": "interp", "disagree_interp_beta": 0.7},
        "interp_lambda 0.7": {"disagree_mode": "interp_lambda", "disagree_interp_beta": 0.7},
        "preserve": {"disagree_mode": "preserve", "lambda_base": 1.25},
        "grpo": {"disagree_mode": "grpo"},
    }
    for row in rows:
        verifier = torch.tensor([float(row["a1"])])
        log_probs = (torch.tensor([[float(row[key])]]) for key in ("student", "teacher", "reference"))
        student, teacher, reference = log_probs
        ratio = core.reverse_kl_advantage(student, teacher)
        assert ratio.item() == pytest.approx(float(row["a2"]), abs=1e-6)
        gate = core.sign_consistency_gate(verifier, ratio).item()
        assert {1: "consensus", -1: "conflict", 0: "neutral"}[gate] == row["gate"]
        for column, settings in modes.items():
            routed = core.route_advantages(student, teacher, reference, verifier, lambda_high=1.8, **settings)
            assert routed.item() == pytest.approx(float(row[column]), abs=1e-6), (row["#"], column)


@pytest.mark.parametrize("module", ["advantage", "anchor", "coefficients", "matching", "routing", "weights"])
def test_methods_page_names_every_equation_of_the_core(module: str) -> None:
    page, owner = read("docs/methods.md"), f"{core.__name__}.{module}"
    names = [name for name in core.__all__ if getattr(getattr(core, name), "__module__", "") == owner]
    functions = [name for name in names if inspect.isfunction(getattr(core, name))]
    assert functions
    assert [name for name in functions if f"`{name}`" not in page] == []


def test_methods_page_has_every_mode_of_the_gate() -> None:
    rows = tables(read("docs/methods.md"), "`disagree_mode`")
    named = {re.match("`(\\w+)`", row["`disagree_mode`"])[1] for row in rows}
    assert named == set(core.DISAGREE_MODES)


def test_configuration_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("build_configuration", ROOT / "docs" / "build_configuration.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    assert read("docs/configuration.md") == builder.render(), "run `make docs`"


def test_recipe_example_of_the_readme_has_known_keys_and_types(tmp_path: Path) -> None:
    from sg_opd_trl.cli.parsing import read_command_line

    (block,) = code_blocks(read("README.md"), "yaml")
    recipe = tmp_path / "my_run.yaml"
    recipe.write_text(block, encoding="utf-8")
    command = read_command_line(["--config", str(recipe)])
    assert command.launch == {}
    assert command.fields["lambda_high"] == 1.8


def test_python_examples_compile_and_import_what_exists() -> None:
    offences = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in code_blocks(text, "python"):
            before = text[: text.index(block)].count("\n")
            for node in ast.walk(ast.parse(block, filename=name_of(page))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sg_opd_trl"):
                    place = f"{name_of(page)}:{before + node.lineno}"
                    offences += [f"{place}: {name}" for name in missing_names(node)]
    check_none(offences)


def missing_names(node: ast.ImportFrom) -> list[str]:
    if importlib.util.find_spec(node.module) is None:
        return [node.module]
    module = importlib.import_module(node.module)
    return [f"{node.module}.{alias.name}" for alias in node.names if not hasattr(module, alias.name)]


def test_examples_override_methods_as_they_are() -> None:
    overridden = 0
    for block in code_blocks(read("docs/extending.md"), "python"):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.ClassDef):
                continue
            base = getattr(sg_opd_trl, node.bases[0].id)
            for method in (item for item in node.body if isinstance(item, ast.FunctionDef)):
                names = [argument.arg for argument in method.args.args]
                assert names == list(inspect.signature(getattr(base, method.name)).parameters), method.name
                overridden += 1
    assert overridden >= 4


def test_table_of_overridable_methods_is_true() -> None:
    rows = tables(read("docs/extending.md"), "to change")
    assert len(rows) >= 8
    for row in rows:
        owner = ""
        for name in re.findall(r"`([\w.]+)`", row["override"]):
            owner = name.rpartition(".")[0] or owner
            assert callable(getattr(getattr(sg_opd_trl, owner), name.rpartition(".")[2])), name


@pytest.mark.parametrize("page", ["docs/robustness.md", "docs/reliability.md"])
def test_every_test_that_a_page_of_kinds_names_is_there(page: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", read(page))
    assert len(named) > 40
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (ROOT / path).is_file() or (name and f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8"))
    ]
    assert missing == []
