import subprocess
import sys

import pytest
from repository import PATIENCE

from sg_opd_trl.cli import COMMANDS, main
from sg_opd_trl.errors import SGOPDConfigError


def test_help_imports_none_of_the_heavy_libraries():
    code = (
        "import sys\nfrom sg_opd_trl.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    for name in COMMANDS:
        assert name in outcome.stdout


def test_the_package_is_a_program():
    outcome = subprocess.run(
        [sys.executable, "-m", "sg_opd_trl.cli"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert outcome.returncode == 0
    assert "COMMAND" in outcome.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"sg-opd {command}" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["trian"])
    assert end.value.code == 2
    assert "trian" in capsys.readouterr().err


def test_an_error_of_the_package_is_one_message_and_status_2(capsys):
    assert main(["train", "--max_stepz", "3"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: Unknown key `max_stepz` in the command line. Did you mean `max_steps`?")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("words", [["--debug", "train", "--max_stepz", "3"], ["train", "--max_stepz", "3", "--debug"]])
def test_debug_shows_the_traceback(words):
    with pytest.raises(SGOPDConfigError):
        main(words)


def test_debug_with_a_value_is_a_field_of_the_training_arguments(monkeypatch):
    seen = []
    monkeypatch.setattr("sg_opd_trl.cli.train.train", lambda settings: seen.append(settings.training.debug))
    assert main(["train", "--use_cpu", "true", "--debug", "underflow_overflow"]) == 0
    assert [str(option.value) for option in seen[0]] == ["underflow_overflow"]


def test_other_errors_are_not_hidden(monkeypatch):
    def fail(argv, *, debug):
        raise ZeroDivisionError

    monkeypatch.setattr("sg_opd_trl.cli.train.run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_an_interruption_has_its_own_status(monkeypatch):
    def stop(argv, *, debug):
        raise KeyboardInterrupt

    monkeypatch.setattr("sg_opd_trl.cli.train.run", stop)
    assert main(["train"]) == 130
