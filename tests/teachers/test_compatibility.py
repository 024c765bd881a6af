"""Whether two tokenizers mean the same by an id."""

import logging
from typing import Any

import pytest
from tiny import TEMPLATE, tiny_tokenizer

from sg_opd_trl import TeacherError
from sg_opd_trl.teachers.fit import check_chat_templates, check_tokenizers, check_vocabulary_sizes


def test_equal_tokenizers_pass() -> None:
    check_tokenizers(tiny_tokenizer(), tiny_tokenizer(), "teacher")


def test_another_chat_template_passes() -> None:
    """Only ids are exchanged, and the student's template writes them; what it writes is compared below."""
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


def test_another_first_token() -> None:
    other = tiny_tokenizer()
    other.bos_token = "user"
    with pytest.raises(TeacherError) as caught:
        check_tokenizers(tiny_tokenizer(), other, "reference")
    assert "The reference's first token must be the student's, got 'user' (3) and None (None)" in str(caught.value)


def test_padding_may_differ() -> None:
    """Qwen's base and chat models pad with different ids; padding is never scored."""
    other = tiny_tokenizer()
    other.pad_token = "<unk>"
    check_tokenizers(tiny_tokenizer(), other, "teacher")


# --- chat templates --------------------------------------------------------------------------------------------------
CHATS = [[{"role": "user", "content": "1+2="}], [{"role": "user", "content": "12+3="}]]
# The student's, with a switch that adds a token to the prompt, as for thinking.
THINKING = TEMPLATE.replace("assistant{% endif %}", "assistant{% if think %}h{% endif %}{% endif %}")


def rendered(template: str = TEMPLATE, **kwargs: Any) -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    return [tokenizer.apply_chat_template(c, chat_template=template, add_generation_prompt=True, tokenize=True,
                                          return_dict=True, **kwargs)["input_ids"] for c in CHATS]  # fmt: skip


def with_template(template: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_templates_that_render_alike_pass(caplog: pytest.LogCaptureFixture) -> None:
    check_chat_templates(CHATS, rendered(), with_template(TEMPLATE), "teacher")
    check_chat_templates(CHATS, rendered(), with_template(THINKING), "teacher")
    check_chat_templates(
        CHATS, rendered(THINKING, think=True), with_template(THINKING), "teacher", template_kwargs={"think": True}
    )
    assert not caplog.records


def test_templates_that_render_otherwise_are_refused() -> None:
    with pytest.raises(TeacherError) as caught:
        check_chat_templates(CHATS, rendered(), with_template(THINKING), "teacher", template_kwargs={"think": True})
    message = str(caught.value)
    assert "a difference in row 0 (student and teacher): '2=<eos>assistant' and '2=<eos>assistanth' from" in message
    assert "Set `chat_template_kwargs`" in message
    assert "pass the student's tokenizer as `teacher_processing_class`" in message
    with pytest.raises(TeacherError, match="pass the reference as a model"):
        check_chat_templates(CHATS, rendered(), with_template("{{ messages[0]['content'] }}"), "reference")


def test_a_difference_in_a_later_prompt_is_found() -> None:
    odd = TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] | replace('12', '21') }}")
    with pytest.raises(TeacherError, match=r"row 1 .*'user12\+3=?.*' and 'user21\+3=?"):
        check_chat_templates(CHATS, rendered(), with_template(odd), "teacher math")


def test_a_template_that_refuses_the_prompt() -> None:
    refusing = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(TeacherError, match="and the error no system message, please"):
        check_chat_templates(CHATS, rendered(), with_template(refusing), "teacher")


def test_without_a_template_there_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_chat_templates(CHATS, rendered(), with_template(None), "teacher")
    assert "The teacher's tokenizer has no chat template" in caplog.text
