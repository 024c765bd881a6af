import importlib.metadata
import re
import subprocess
import sys

import pytest
from repository import PATIENCE

import sg_opd_trl
from sg_opd_trl.cli import COMMANDS, main
from sg_opd_trl.cli.help_text import GROUPS
from sg_opd_trl.cli.methods import METHODS
from sg_opd_trl.cli.parsing import accelerate_defaults, own_names
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


def test_the_version_names_the_stack_and_imports_none_of_it():
    code = (
        "import sys\nfrom sg_opd_trl.cli import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith(f"sg-opd {sg_opd_trl.__version__} (Python ")
    assert f"trl {importlib.metadata.version('trl')}" in outcome.stdout
    assert outcome.stdout.count("\n") == 1


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main(["train", *words])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_of_train_is_short_and_in_groups(capsys):
    text = help_of(capsys, "--help")
    lines = text.splitlines()
    assert len(lines) < 110
    assert max(map(len, lines)) <= 110
    assert [line for line in lines if line.endswith(":")] == [f"{title}:" for title in GROUPS]
    for flag in ("--config", "--accelerate_config", "--num_processes", "--help_all", "--lambda_high"):
        assert f"  {flag} " in text


@pytest.mark.parametrize("method", METHODS)
def test_help_names_the_fields_of_its_method_alone(capsys, method):
    text = help_of(capsys, "--method", method, "--help")
    flags = set(re.findall(r"^  --(\w+)", text, flags=re.MULTILINE))
    assert flags <= own_names(method) | accelerate_defaults().keys() | {"config", "help_all"}
    assert ("lambda_high" in flags) == (method == "sg_opd")


def test_all_fields_are_in_the_long_help(capsys):
    text = help_of(capsys, "--help_all")
    assert [name for name in own_names("sg_opd") if f"--{name}" not in text] == []


def test_every_name_of_the_short_help_is_a_field():
    known = own_names("sg_opd") | accelerate_defaults().keys() | {"config", "help_all"}
    assert [name for names in GROUPS.values() for name in names if name not in known] == []


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
