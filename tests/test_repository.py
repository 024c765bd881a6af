"""The repository's commands, metadata and house rules are what they are said to be."""

import ast
import configparser
import importlib
import os
import re
import sys

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from repository import MODULES, PAGES, ROOT, check_none, code_blocks, lines_with, name_of, read, repository_files

import sg_opd_trl


# --- commands --------------------------------------------------------------------------------------------------------
def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", read("Makefile"), flags=re.MULTILINE))


def test_make_commands_of_the_pages_exist() -> None:
    known, offences = makefile_targets(), []
    for page in PAGES:
        for place, command in lines_with(re.compile(r"(?:^|`)make ([a-z][a-z-]*)"), page):
            if command.split()[-1] not in known:
                offences.append(f"{place}: {command}")
    check_none(offences)


def test_readme_opens_with_demo_and_test() -> None:
    first = code_blocks(read("README.md"), "")[0]
    assert re.findall(r"^make (\w+)", first, flags=re.MULTILINE) == ["demo", "test"]


def test_ci_runs_lint_types_and_the_readme_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make ")] == [
        *("make lint", "make type", "make test PYTEST_ARGS=--scoreboard", "make test-vllm", "make test-real"),
        "make test-distributed",
    ]


def test_make_test_leaves_out_the_full_grid_alone() -> None:
    pattern = r'^(test[a-z-]*):.*\n\t.* pytest(?: -m ("[^"]*"|\w+))?'
    commands = dict(re.findall(pattern, read("Makefile"), flags=re.MULTILINE))
    assert commands == {
        **{"test": '"not full"', "test-all": '""', "test-fast": "", "test-vllm": "vllm", "test-real": "real"},
        "test-distributed": "distributed",
    }
    assert '-m "not slow and not full"' in metadata()["tool:pytest"]["addopts"]


# --- metadata --------------------------------------------------------------------------------------------------------
def metadata() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(section: str, key: str) -> list[Requirement]:
    return [Requirement(line) for line in metadata()[section][key].splitlines() if line.strip()]


def test_extras_and_script() -> None:
    extras = metadata()["options.extras_require"]
    assert {"peft", "vllm", "plot", "notebooks", "tracking", "deepspeed", "dev"} <= set(extras)
    assert "vllm" not in {requirement.name for requirement in requirements("options.extras_require", "dev")}
    script = metadata()["options.entry_points"]["console_scripts"].strip()
    assert script == "sg-opd = sg_opd_trl.cli:program"
    assert callable(importlib.import_module("sg_opd_trl.cli").program)


def test_pyproject_holds_the_build_system_only() -> None:
    assert re.findall(r"^\[(.+)\]$", read("pyproject.toml"), flags=re.MULTILINE) == ["build-system"]


def test_versions_agree() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["version"] == sg_opd_trl.__version__
    assert sg_opd_trl.__version__ in read("CHANGELOG.md")


def test_pinned_stack_satisfies_the_requirements() -> None:
    pins = {}
    for line in read("constraints/cpu.txt").splitlines():
        if line and not line.startswith("#"):
            name, exact, version = line.partition("==")
            assert exact, line
            pins[name.lower().replace("_", "-")] = version
    declared = requirements("options", "install_requires")
    for extra in ("peft", "plot", "notebooks", "dev"):
        declared += requirements("options.extras_require", extra)
    checked = 0
    for requirement in declared:
        if requirement.name == "sg-opd-trl":
            continue
        assert SpecifierSet(str(requirement.specifier)).contains(pins[requirement.name.lower()]), str(requirement)
        checked += 1
    assert checked > 10


def test_lower_bounds_are_those_that_are_tried() -> None:
    """`make test-lowest` installs constraints/lowest.txt; torch says in setup.cfg that it is another."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", read("constraints/lowest.txt"), flags=re.MULTILINE))
    declared = requirements("options", "install_requires")
    for extra in ("peft", "plot", "notebooks", "dev"):
        declared += requirements("options.extras_require", extra)
    bounds = {
        requirement.name.lower(): Version(bound.version)
        for requirement in declared
        for bound in requirement.specifier
        if bound.operator == ">=" and requirement.name != "torch"
    }
    assert bounds == {name: Version(version) for name, version in pins.items() if name != "torch"}


def test_every_import_of_the_package_is_declared() -> None:
    declared = {requirement.name for requirement in requirements("options", "install_requires")}
    for extra in ("peft", "plot"):
        declared |= {requirement.name for requirement in requirements("options.extras_require", extra)}
    modules = {name.lower().replace("-", "_") for name in declared} | {"yaml", "math_verify", "sg_opd_trl"}
    offences = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top not in modules:
                    offences.append(f"{name_of(path)}:{node.lineno}: imports {name}")
    check_none(offences)


# --- house rules: each looks at every file and tells all offences at once, by file and line --------------------------
def test_no_machine_paths_and_no_hosts() -> None:
    folders = "|".join(("work", "root", "opt", "home", "Users", "tmp"))
    machine = rf"(?<![\w.~}}/])/(?:{folders})/\w"
    # Spelt in two parts, or this test would find itself.
    domains = (("pypi", "org"), ("pythonhosted", "org"), ("huggingface", "co"), ("pytorch", "org"), ("github", "com"))
    hosts = "|".join(re.escape(f"{name}.{ending}") for name, ending in domains)
    pattern = re.compile(f"{machine}|{hosts}")
    files = list(repository_files())
    assert len(files) > 30
    check_none([f"{place}: {found}" for path in files for place, found in lines_with(pattern, path)])


def test_nothing_is_left_unfinished() -> None:
    marks = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "raise NotImplemented" + "Error")))
    assert len(MODULES) > 30
    check_none([f"{place}: {found}" for path in MODULES for place, found in lines_with(marks, path)])
