"""Nothing that a command prints, logs or ends with shows a token, in whatever form a message quotes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sg_opd_trl.cli import main
from sg_opd_trl.cli.output import scrubbed_output

# As a library shows it in a header, a mapping, a traceback: the last command of a process that nobody has caught.
FAILING = """
import logging, os, sys, warnings
import sg_opd_trl.cli.study as study
from sg_opd_trl.cli import main

def run(words, debug=False):
    token = "canary\\\\of\\tthe 'flag"
    print(f"out {token} {token!r} {os.environ['MY_API_KEY']}")
    logging.getLogger("any.library").error("asked with %s", {"authorization": f"Bearer {token}"})
    warnings.warn(f"the address https://host/v1/{'k3y' * 8}/chat")
    raise RuntimeError(f"refused: {token!r}, header b'Bearer canary-of-the-header', {os.environ['MY_API_KEY']}")

study.run = run
main(["study", "--hub_token", "canary\\\\of\\tthe 'flag"])
"""


def test_prints_logs_warnings_and_the_traceback_of_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING],
        env=os.environ | {"MY_API_KEY": "canary-of-the-environment"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "RuntimeError: refused: " in done.stderr, "the traceback is there"
    assert "asked with" in done.stderr
    assert "the address https://host/v1/(hidden)/chat" in done.stderr
    assert "out (hidden)" in done.stdout
    assert "canary-of" not in said
    assert "the 'flag" not in said.replace("""token = "canary""", "")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('hub_token: "canary\\frac of the recipe"', "`hub_token`"),
        ('model_init_kwargs: {token: "canary\\frac of the recipe"}', "`model_init_kwargs.token`"),
        ('model_init_kwargs: {token: "canary\\qof the recipe"}', "cannot be read as YAML"),
        ('model_init_kwargs: \'{"token": "canary\\qof the recipe"}\'', "model_init_kwargs"),
        ("hub_token: [canary of the recipe]", "`hub_token`"),
        ("hub_tokn: canary of the recipe", "hub_token"),
    ],
)
def test_a_recipe_that_cannot_be_read(
    tmp_path: Path, lines: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: a\n{lines}\n", encoding="utf-8")
    assert main(["train", "--config", str(recipe)]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "canary" not in said.out + said.err


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", "canary-x", "--hub_token", "canary-x", "--max_steps", "canary-x"],
        ["--model_init_kwargs", '{"token": "canary\\qx"}'],
        ['--model_init_kwargs={"token": "canary-x",}'],
        ["--teacher_model_server_url", "http://me:canary@host", "--teacher_model_init_kwargs", '{"api_key": 1'],
    ],
)
def test_flags_that_cannot_be_read(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model_name_or_path", "a", "--output_dir", "out", *words]) == 2
    said = capsys.readouterr()
    assert said.err
    assert "canary" not in said.out + said.err


def test_the_streams_are_given_back_and_are_what_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with scrubbed_output(["--hub_token", "canary-x"]):
        assert sys.stdout.encoding == before[0].encoding
        assert sys.stdout.isatty() == before[0].isatty()
        sys.stdout.writelines(["one ", "canary-x"])
        assert sys.stdout.write("four") == 4
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "one (hidden)four"
