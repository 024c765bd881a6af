"""Rows as text, as a table, for a notebook and for machines."""

import json

import pytest

from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.inspection.report import Report, Row, rows_of_error

REPORT = Report(
    (
        Row("a", "green", "fine"),
        Row("b", "yellow", "1 < 2 & so on", "Lower it."),
        Row("b", "red", "wrong", "Mend it."),
        Row("c", "green", "fine too"),
    ),
    seconds=1.23456,
)


def test_the_worst_row_is_the_report_and_the_row_of_a_name():
    assert REPORT.state == "red"
    assert Report(REPORT.rows[:2]).state == "yellow"
    assert Report(()).state == "green"
    assert REPORT.of("b").found == "wrong"
    with pytest.raises(KeyError):
        REPORT.of("absent")
    assert [row.name for row in REPORT.in_state("green")] == ["a", "c"]


def test_a_row_is_one_line_of_text():
    assert str(REPORT).splitlines() == [
        "green  a: fine",
        "yellow b: 1 < 2 & so on Lower it.",
        "red    b: wrong Mend it.",
        "green  c: fine too",
    ]


def test_machines_get_plain_values():
    told = json.loads(json.dumps(REPORT.as_dict()))
    assert (told["state"], told["seconds"], len(told["rows"])) == ("red", 1.235, 4)
    assert told["rows"][1] == {"name": "b", "state": "yellow", "found": "1 < 2 & so on", "change": "Lower it."}


def test_a_notebook_gets_a_table_in_which_nothing_found_is_markup():
    shown = REPORT._repr_html_()
    assert shown.count("<tr>") == 5
    assert "1 &lt; 2 &amp; so on" in shown


def test_the_console_shows_every_row():
    assert REPORT.table().row_count == 4


def test_an_error_is_a_row_whose_last_sentence_is_the_way_out():
    error = SGOPDConfigError("`a` must be 1, got 2. It counts. Set it to 1.\n`b` is wrong")
    assert rows_of_error("settings", error) == [
        Row("settings", "red", "`a` must be 1, got 2. It counts.", "Set it to 1."),
        Row("settings", "red", "`b` is wrong"),
    ]
