"""Versions of libraries against the tested ones."""

from repository import read

from sg_opd_trl.inspection.stack import TESTED, compared_with_tested, stack_row


def test_the_tested_versions_are_those_of_the_constraints():
    pins = dict(line.split("==") for line in read("constraints/cpu.txt").splitlines() if "==" in line)
    assert {name: pins[name] for name in TESTED} == dict(TESTED)


def test_this_environment_is_the_tested_one():
    assert stack_row().state == "green"


def test_another_patch_is_as_good_and_another_minor_version_is_named():
    assert compared_with_tested({"torch": "2.13.4+cu130"}).state == "green"
    row = compared_with_tested({"trl": "1.16.0", "transformers": "5.24.0"})
    assert (row.name, row.state) == ("versions", "yellow")
    assert row.found == f"Not tested with transformers 5.24.0 (tested: {TESTED['transformers']})."
