"""The verifier and the golds, from plain values: a judge is a function from answers to verdicts."""

import re

import pytest

from sg_opd_trl.inspection.verifier import GOLDS_TRIED, gold_column, is_built_in, verifier_rows
from sg_opd_trl.verifiers import exact_match_reward, math_reward

ROWS = [{"prompt": f"{number}+1=", "solution": str(number + 1)} for number in range(30)]


def reads(pattern):
    """A judge that compares what a pattern finds with the gold."""

    def judge(examples, texts):
        found = [re.search(pattern, text) for text in texts]
        return [
            float(each is not None and each[1] == row["solution"]) for each, row in zip(found, examples, strict=True)
        ]

    return judge


@pytest.mark.parametrize("pattern", [r"\\boxed\{(.*)\}$", r"^(-?\d+)$", r"#### (.*)$", r"<answer>(.*)</answer>"])
def test_the_verifiers_own_way_of_writing_an_answer_is_found(pattern):
    rows = verifier_rows("own", reads(pattern), "solution", {"train_dataset": ROWS})
    assert [(row.name, row.state) for row in rows] == [("verifier", "green"), ("golds", "green")]
    assert rows[0].found == "`own` says yes to 20 of 20 golds and no to a wrong answer."
    assert rows[1].found == "All of the first 30 golds of `train_dataset` can be judged."


def test_no_answer_is_judged_twice():
    asked = []

    def judge(examples, texts):
        asked.extend(texts)
        return reads(r"\\boxed\{(.*)\}$")(examples, texts)

    verifier_rows("own", judge, "solution", {"train_dataset": ROWS})
    # Of 30 golds each once, and a wrong answer beside the first 20.
    assert len(asked) == 30 + GOLDS_TRIED


@pytest.mark.parametrize(("refused", "state"), [(1, "yellow"), (9, "yellow"), (10, "red")])
def test_golds_that_it_says_no_to_are_counted_and_one_is_shown(refused, state):
    def judge(examples, texts):
        right = reads(r"\\boxed\{(.*)\}$")(examples, texts)
        return [float(one and int(row["solution"]) > refused) for one, row in zip(right, examples, strict=True)]

    row, *_ = verifier_rows("own", judge, "solution", {"train_dataset": ROWS})
    assert row.state == state
    assert row.found == f"`own` says no to {refused} of 20 golds of the data, such as '1'."


def test_a_yes_to_a_wrong_answer_is_worse_than_a_no_to_golds():
    row, *_ = verifier_rows("own", lambda examples, texts: [1.0] * len(texts), "solution", {"train_dataset": ROWS})
    assert (row.state, "yes to a wrong answer (-86028121) in 20 of 20 rows" in row.found) == ("red", True)


def test_without_golds_that_are_known_nothing_is_asked():
    rows = verifier_rows("own", lambda *_: pytest.fail("it was asked"), None, {"train_dataset": ROWS})
    assert [(row.name, row.state) for row in rows] == [("verifier", "yellow")]


def test_golds_of_every_data_set_are_counted():
    def judge(examples, texts):
        verdicts = reads(r"\\boxed\{(.*)\}$")(examples, texts)
        return [None if row["solution"] == "proof" else one for one, row in zip(verdicts, examples, strict=True)]

    eval_rows = [{"prompt": "a", "solution": "proof"}, {"prompt": "b", "solution": "2"}]
    rows = verifier_rows("own", judge, "solution", {"train_dataset": ROWS, "eval_dataset": eval_rows})
    assert [(row.name, row.state) for row in rows] == [("verifier", "green"), ("golds", "green"), ("golds", "yellow")]
    assert rows[2].found == "1 of 2 golds of `eval_dataset` cannot be judged (row 0: 'proof')."


def test_the_column_of_the_golds_is_a_parameter():
    def own(completions, answer, **kwargs):
        return []

    def without(completions, **kwargs):
        return []

    assert [gold_column(each) for each in (math_reward, own, without)] == ["solution", "answer", None]
    assert [is_built_in(each) for each in (math_reward, exact_match_reward, own)] == [True, True, False]
