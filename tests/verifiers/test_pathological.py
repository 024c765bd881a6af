"""Answers made to keep a verifier busy: each ends in time, from any thread, and judging goes on as before."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from sg_opd_trl.verifiers import Judge
from sg_opd_trl.verifiers.extraction import answer_parts, answer_text, gold_answer, gold_text
from sg_opd_trl.verifiers.kinds import decide
from sg_opd_trl.verifiers.notation import MAX_LENGTH

PATHOLOGICAL = {
    "tower of nines": "9^{9^{9^{9}}}",
    "tower of tens": "10^{10^{10}}",
    "tower of five": "2^{3^{4^{5^6}}}",
    "huge factorial": "1000000000!",
    "giant binomial": r"\binom{10^9}{5\cdot 10^8}",
    "huge sum": r"\sum_{k=1}^{10^9}\frac{1}{k}",
    "sum of powers": r"\sum_{k=1}^{100000} k^{k}",
    "huge product": r"\prod_{k=1}^{10^8} k",
    "nested fractions": r"\frac{1}{1+" * 200 + "1" + "}" * 200,
    "nested roots": r"\sqrt{2+" * 300 + "2" + "}" * 300,
    "nested parentheses": "(" * 3000 + "1" + ")" * 3000,
    "repeated braces": "{" * 5000 + "1" + "}" * 5000,
    "nested logarithms": r"\log(" * 50 + "x" + ")" * 50,
    "polynomial of 400 terms": "+".join(f"{k}x^{{{k}}}" for k in range(1, 401)),
    "power of a sum": "(x+y+z)^{5000}",
    "100000 digits": "7" * 100_000,
    "400 roots in a set": r"\{" + ",".join(rf"\sqrt{{{k}}}" for k in range(1, 401)) + r"\}",
    "chain of equations": "=".join(["x"] * 3000),
    "integral of a tower": r"\int_0^1 \sin(x^{x^{x}}) e^{-x^5} dx",
    "open fractions": r"\frac{" * 2000,
}
# Room for the start of a new child, many times what it needs on an idle machine.
START = 15.0


def in_main_thread(question: Callable[[], None]) -> None:
    question()


def in_worker_thread(question: Callable[[], None]) -> None:
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(question).result()


@pytest.mark.slow
@pytest.mark.parametrize("run", [in_main_thread, in_worker_thread])
def test_ends_in_time_and_judging_goes_on(run: Callable[[Callable[[], None]], None]) -> None:
    assert len(PATHOLOGICAL) >= 20
    judge = Judge(time_limit=0.3, wall_limit=5.0)
    late: dict[str, float] = {}
    wrong_afterwards: list[str] = []
    verdicts: dict[str, bool | None] = {}

    def ask_all() -> None:
        for place, (name, answer) in enumerate(PATHOLOGICAL.items()):
            begin = time.monotonic()
            verdicts[name] = judge.verdicts([("$5$", answer_text(rf"\boxed{{{answer}}}"))])[0]
            if time.monotonic() - begin > judge.wall_limit + START:
                late[name] = time.monotonic() - begin
            # Another pair each time, so that the cache does not answer.
            if judge.verdicts([(f"$-{place}/4$", rf"\boxed{{-{place * 0.25}}}")]) != [True]:
                wrong_afterwards.append(name)

    run(ask_all)
    judge.close()
    assert late == {}
    assert wrong_afterwards == []
    assert set(verdicts.values()) <= {None, False}
    # Far beyond any machine's 0.3 s, hence no verdict, as opposed to "wrong".
    assert [verdicts[name] for name in ("tower of nines", "huge factorial", "huge sum")] == [None] * 3


REPEATED = [
    *(
        "1 ",
        "12 ",
        "a ",
        "A ",
        "1,",
        "1:",
        "-",
        "(",
        "[",
        "{ ",
        "~",
        " ",
        "'",
        "$",
        "0.",
        "1e5 ",
        "12cm ",
        "(A) ",
        "m.",
    ),
    *(
        "\\frac",
        "\\frac{",
        "\\frac1",
        "\\sqrt",
        "\\sqrt(",
        "\\sqrt[",
        "\\binom{1}",
        "\\text{",
        "\\text{ m}",
        "\\,",
        "1\\,",
    ),
    *(
        "123\\,",
        "\\ ",
        "^\\circ",
        "12^\\circ ",
        "\\ldots,",
        "1,\\ldots,",
        "\\mathbb{Z}",
        "\\{x|",
        "1.\\overline{3}",
        "\\left(",
    ),
    *("\\boxed{", "\\boxed{1},", "\\boxed 1 ", "\\fbox", "answer: **", "</think>", "#### "),
]


@pytest.mark.parametrize("unit", REPEATED)
def test_reading_of_texts_is_quick(unit: str) -> None:
    """This process reads texts before the child does, and nothing ends it: no text may take long."""
    short, long = (unit * MAX_LENGTH)[: MAX_LENGTH - 1] + "x", unit * (100_000 // len(unit))
    begin = time.process_time()
    for other in ("5", r"12\text{ m}", r"\textbf{(B)}\ 12", r"1,\ldots,n", short + "y"):
        decide(short, other)
        decide(other, short)
    answer_parts(long)
    gold = gold_text(long)
    if gold is not None:
        gold_answer(gold)
    assert time.process_time() - begin < 2.0  # tens of milliseconds on an idle machine; without a bound, for ever
