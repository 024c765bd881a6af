"""Agreement with recorded verdicts on real responses, and with benchmark answers."""

from collections.abc import Callable
from typing import Any

import pytest

from sg_opd_trl.verifiers import math_reward

Rows = Callable[[str], list[dict[str, Any]]]


@pytest.mark.parametrize("as_chat", [False, True])
def test_agrees_with_recorded_scores(read_rows: Rows, as_chat: bool) -> None:
    rows = read_rows("verifier/math_cot_50.jsonl")
    triples = [
        (response, row["gt"], score)
        for row in rows
        for response, score in zip(row["response"], row["score"], strict=True)
    ]
    assert len(triples) == 400
    texts: list[Any] = [response for response, _, _ in triples]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if as_chat else texts
    verdicts = math_reward(completions, [gold for _, gold, _ in triples])
    differing = [
        (gold, score, verdict)
        for (_, gold, score), verdict in zip(triples, verdicts, strict=True)
        if verdict != float(score)
    ]
    assert differing == []


def test_answer_pairs_of_public_complaints(read_rows: Rows) -> None:
    rows = read_rows("verifier/answer_pairs.jsonl")
    verdicts = math_reward([row["answer"] for row in rows], [row["gold"] for row in rows])
    judged = list(zip(rows, verdicts, strict=True))
    assert len(judged) == 178
    others = [(row, verdict) for row, verdict in judged if verdict != float(row["right"])]
    assert len(others) <= 4, others
    assert [row for row, verdict in others if verdict == 1.0] == []  # A wrong "right" would teach.


@pytest.mark.parametrize("writer", ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"])
def test_agrees_with_graded_gsm8k_solutions(read_rows: Rows, writer: str) -> None:
    rows = read_rows("verifier/gsm8k_model_solutions_300.jsonl")
    assert len(rows) == 300
    answers = [row[writer]["solution"].rpartition("A: ")[2].strip() for row in rows]
    golds = [row["ground_truth"].rpartition("A: ")[2].strip() for row in rows]
    verdicts = math_reward([rf"\boxed{{{answer}}}" for answer in answers], golds)
    assert verdicts == [float(row[writer]["is_correct"]) for row in rows]


def test_golds_word_for_word(read_rows: Rows) -> None:
    golds = [row["gt"] for row in read_rows("verifier/math_cot_50.jsonl")]
    golds += [row["answer"] for name in ("aime24", "hmmt25_feb") for row in read_rows(f"benchmarks/{name}.jsonl")]
    assert len(golds) == 110
    wrong = [gold for gold in golds if math_reward([rf"Hence \boxed{{{gold}}}."], [gold]) != [1.0]]
    assert wrong == []


@pytest.mark.parametrize(("name", "rows_expected"), [("aime24", 30), ("hmmt25_feb", 30)])
def test_benchmark_golds(read_rows: Rows, name: str, rows_expected: int) -> None:
    golds = [row["answer"] for row in read_rows(f"benchmarks/{name}.jsonl")]
    assert len(golds) == rows_expected
    assert math_reward([rf"Hence \boxed{{{gold}}}." for gold in golds], golds) == [1.0] * rows_expected
    # No gold is as large, nor an integer multiple of pi or the like: certainly another number.
    assert math_reward([r"Hence \boxed{987654321}."] * rows_expected, golds) == [0.0] * rows_expected
    # Near misses, too: the gold plus one is another number.
    nearby = [rf"\boxed{{({gold})+1}}" for gold in golds if "," not in gold]
    assert math_reward(nearby, [gold for gold in golds if "," not in gold]) == [0.0] * len(nearby)
