"""The extraction rule, case by case."""

import pytest

from sg_opd_trl.errors import VerifierError
from sg_opd_trl.verifiers.extraction import answer_text, completion_text, final_text, gold_text, last_box


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{5}. Wait, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \\{b}} c}", r"a \\{b}"),  # `\\` is a line break, so the brace after it counts.
        (r"\boxed{\left\{ x : x > \frac{1}{2} \right\}} }", r"\left\{ x : x > \frac{1}{2} \right\}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{x = \boxed{3}}", "3"),
        ("\\boxed{\n 1\n}", "1"),
        (r"\boxed{}", ""),
        (r"\boxed{5} then \boxed{12", ""),
        (r"\boxed{\}", ""),
        (r"put it into \boxed please", None),
        ("the answer is 12", None),
        ("", None),
    ],
)
def test_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (r"<think>\boxed{1}</think> It is \boxed{2}.", r"\boxed{2}"),
        (r"<think>\boxed{1}</think> I do not know.", "I do not know."),
        (r"a</think>\boxed{1}</think>the answer is $3$", "the answer is $3$"),
        (r"<think>it is \boxed{4}", r"\boxed{4}"),
        (r"\boxed{1} and \boxed{2", ""),
        (r"the answer is $12$", "the answer is $12$"),
    ],
)
def test_answer_text(text: str, asked: str) -> None:
    assert answer_text(text) == asked


def test_final_text_takes_the_last_end_of_thought() -> None:
    assert final_text("a</think>b</think>c") == "c"


@pytest.mark.parametrize(
    ("solution", "asked"),
    [
        ("(1,2)", "$(1,2)$"),
        (" 5 ", "$5$"),
        ("$5$", "$5$"),
        (r"so \boxed{1}. No: \boxed{2}", r"\boxed{2}"),
        (7, "$7$"),
        (0.5, "$0.5$"),
        (None, None),
        ("", None),
        ("  ", None),
        (r"\boxed{}", None),
        (r"\boxed{3", None),
        ("True", "$True$"),
        ("proof", None),
        ("N/A", None),
        (r"\text{notfound}", None),
        ("see proof", None),
        ("truer", "$truer$"),
        (r"\$18.90", r"$\$18.90$"),
        ("$18.90", r"$\$18.90$"),
        ("9+9=$<<9+9=18>>18 \n#### 18", "$18$"),
    ],
)
def test_gold_text(solution: object, asked: str | None) -> None:
    assert gold_text(solution) == asked


def test_gold_of_another_type_is_refused() -> None:
    with pytest.raises(VerifierError, match="`solution` must hold strings, numbers or None, got list"):
        gold_text(["5"])


def test_completion_text_takes_the_last_assistant_message() -> None:
    chat = [
        {"role": "assistant", "content": "first"},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "last"},
        {"role": "user", "content": "thanks"},
    ]
    assert completion_text(chat) == "last"
    assert completion_text("plain") == "plain"


@pytest.mark.parametrize(
    ("content", "text"), [(None, ""), ([{"type": "text", "text": "a"}, {"type": "image"}, {"text": "b"}], "ab")]
)
def test_completion_text_of_other_contents(content: object, text: str) -> None:
    assert completion_text([{"role": "assistant", "content": content}]) == text


def test_completion_without_assistant_message_is_empty() -> None:
    assert completion_text([]) == ""
    assert completion_text([{"role": "user", "content": "x"}]) == ""


@pytest.mark.parametrize("completion", [5, None, ["a"], [{"role": "assistant", "content": 5}]])
def test_completion_of_another_type_is_refused(completion: object) -> None:
    with pytest.raises(VerifierError, match="Because the answer is read from text"):
        completion_text(completion)
