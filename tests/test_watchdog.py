"""`conftest` ends a run whose worker died or hangs, in bounded time, and names the test."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import PATIENCE

TESTS = Path(__file__).parent
GOOD = "def test_good():\n    pass\n\n\n"
#: name -> body of the test that does not end, pytest-timeout's seconds, and what the run says: on a machine too busy
#: for pytest-timeout the watchdog speaks for it.
BAD = {
    "it dies": ("import os; os._exit(3)", 100, "crashed while running"),
    "it sleeps": ("import time; time.sleep(1000)", 8, "crashed while running|it waits for ever"),
    # PyDLL keeps the interpreter's lock: not even pytest-timeout's timer runs.
    "it holds the lock": ("import ctypes; ctypes.PyDLL(None).sleep(1000)", 8, "in progress for"),
}


def run_pytest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(TESTS / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\ntimeout_method = thread\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", *words]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow
@pytest.mark.parametrize("bad", BAD)
def test_a_test_that_does_not_end_ends_the_run_with_its_name(tmp_path: Path, bad: str) -> None:
    body, seconds, said = BAD[bad]
    (tmp_path / "test_bad.py").write_text(f"{GOOD}def test_the_culprit():\n    {body}\n", encoding="utf-8")
    (tmp_path / "test_other.py").write_text(GOOD, encoding="utf-8")
    done = run_pytest(tmp_path, "--timeout", str(seconds))
    output = done.stdout + done.stderr
    assert done.returncode not in (0, None), output
    assert re.search(said, output), output
    assert "test_bad.py::test_the_culprit" in output
    assert "gw2" not in output, "nobody runs it again"


@pytest.mark.slow
def test_files_with_slow_tests_come_first(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(f"{GOOD}def test_another():\n    pass\n", encoding="utf-8")
    (tmp_path / "test_b.py").write_text(f"import pytest\n\n\n@pytest.mark.slow\n{GOOD}", encoding="utf-8")
    done = run_pytest(tmp_path, "-n", "1", "-v", "--timeout", "100", "-W", "ignore")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"PASSED (\S+)", done.stdout)[0] == "test_b.py::test_good"


@pytest.mark.slow
def test_a_run_without_such_a_test_passes(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(GOOD, encoding="utf-8")
    done = run_pytest(tmp_path, "--timeout", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
