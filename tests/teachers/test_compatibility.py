"""Whether two tokenizers mean the same by an id."""

import logging

import pytest
from tiny import tiny_tokenizer

from sg_opd_trl import TeacherError
from sg_opd_trl.teachers.compatibility import check_tokenizers, check_vocabulary_sizes


def test_equal_tokenizers_pass() -> None:
    check_tokenizers(tiny_tokenizer(), tiny_tokenizer(), "teacher")


def test_another_chat_template_passes() -> None:
    """Only ids are exchanged, and the student's template writes them."""
    other = tiny_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}"
    check_tokenizers(tiny_tokenizer(), other, "teacher")


def test_swapped_ids() -> None:
    with pytest.raises(TeacherError) as caught:
        check_tokenizers(tiny_tokenizer(), tiny_tokenizer("0213456789+=abcdefgh "), "teacher")
    message = str(caught.value)
    assert "got 2 differences (student and teacher): '1': 6 and 7, '2': 7 and 6." in message
    assert "Choose a teacher of the student's family" in message


@pytest.mark.parametrize(
    ("student", "other", "shown"), [("01", "012", "'2': None and 7"), ("012", "01", "'2': 7 and None")]
)
def test_a_token_that_one_side_lacks(student: str, other: str, shown: str) -> None:
    with pytest.raises(TeacherError, match=shown):
        check_tokenizers(tiny_tokenizer(student), tiny_tokenizer(other), "reference")


def test_no_more_than_five_differences_are_shown() -> None:
    with pytest.raises(TeacherError) as caught:
        check_tokenizers(tiny_tokenizer("0123456789"), tiny_tokenizer("9876543210"), "reference")
    assert "got 10 differences (student and reference)" in str(caught.value)
    assert str(caught.value).count(" and ") == 1 + 5


def test_another_end_token() -> None:
    other = tiny_tokenizer()
    other.eos_token = "user"
    with pytest.raises(TeacherError) as caught:
        check_tokenizers(tiny_tokenizer(), other, "teacher")
    assert "got 'user' (3) and '<eos>' (1)" in str(caught.value)
    assert "Use two models of one kind" in str(caught.value)


def test_sizes_of_a_model_without_a_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TeacherError, match="must have all 26 ids of the student's tokenizer, got a vocabulary of 25"):
        check_vocabulary_sizes(tiny_tokenizer(), 25, "teacher")
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl"):
        check_vocabulary_sizes(tiny_tokenizer(), 26, "teacher")
        check_vocabulary_sizes(tiny_tokenizer(), 32, "teacher")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "taken on trust" in caplog.records[0].getMessage()
    assert "`teacher_processing_class`" in caplog.records[0].getMessage()
