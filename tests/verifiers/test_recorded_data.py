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
    assert len(differing) <= 2, differing  # 99.5% of 400


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
