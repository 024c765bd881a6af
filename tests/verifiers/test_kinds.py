"""Answers by kind: what math-verify alone gets wrong, with cases that are right, wrong, and not to be told."""

from typing import Any

import pytest

from sg_opd_trl.verifiers import math_reward

# (gold, answer, verdict): 1 right, 0 wrong, None no verdict.
Case = tuple[Any, str, float | None]

BRACELESS: list[Case] = [
    (r"\frac{3}{4}", r"\frac34", 1),
    (r"\frac{3}{4}", r"\dfrac 34", 1),
    (r"\frac{3}{4}", r"\frac3{4}", 1),
    (r"\frac{3}{4}", r"\frac43", 0),
    (r"\frac{x}{7}", r"\frac x7", 1),
    (r"\frac{2}{\sqrt{5}}", r"\frac2{\sqrt5}", 1),
    (r"\frac{\sqrt{5}}{2}", r"\frac{\sqrt5}2", 1),
    (r"\frac{\sqrt{3}}{2}", r"\frac\sqrt32", 1),
    (r"\frac{\sqrt{5}}{2}", r"\frac{\sqrt5}3", 0),
    (r"\frac{3\pi}{2}", r"3\frac\pi2", 1),
    (r"\frac{7}{2}", r"3\frac12", 1),
    (r"\frac{7}{2}", r"2\frac12", 0),
    (r"2\sqrt{3}", r"2\sqrt3", 1),
    (r"\sqrt{23}", r"\sqrt23", 0),
    (r"3\sqrt{2}", r"\sqrt23", 1),
    (r"\sqrt[3]{2}", r"\sqrt[3]2", 1),
    (r"\sqrt[3]{2}", r"\sqrt2", 0),
    (r"4\sqrt{2}", r"4\sqrt(2)", 1),
    (r"\binom{5}{2}", r"\binom52", 1),
    (r"2^{\frac{1}{2}}", r"2^{\frac12}", 1),
    (r"\frac59", r"\frac{5}{9}", 1),
]
WORD_FOR_WORD: list[Case] = [
    (r"\frac{270}7\text{ degrees}", r"\frac{270}7\text{ degrees}", 1),
    (r"p - q", r"p - q", 1),
    (r"\text{Monday}", r"\text{Monday}", 1),
    (r"x \equiv 3 \pmod{5}", r"x \equiv 3 \pmod{5}", 1),
    (r"\begin{cases}1\\2\end{cases}", r"\begin{cases}1\\2\end{cases}", 1),
    (r"\{x | x>3\}", r"\{ x|x > 3 \}", 1),
    (r"1,2,\ldots,n", r"1, 2, \dots, n", 1),
    (r"f'(x) = 2x", r"f'(x)=2x", 1),
    (r"\left( \frac{1}{2},\, 3 \right)", r"(\frac{1}{2}, 3)", 1),
    ("True", r"\text{True}", 1),
    ("9^{9^{9^{9}}}", "9^{9^{9^{9}}}", 1),
]
SPACED_NUMBERS: list[Case] = [
    ("12345", r"12\,345", 1),
    ("12345", r"12\ 345", 1),
    ("12345", "12 345", 1),
    ("12345", "12{,}345", 1),
    ("12345", "12\u202f345", 1),
    ("12345", "12~345", 1),
    (r"12\,345", "12346", 0),
    (r"1\,234\,567", "1234567", 1),
    ("12", "1 2", 0),
    ("1922", "19,22", 0),
    ("1, 200", "1, 200", 1),
    (r"3\,125.5", "3125.5", 1),
]
MONEY: list[Case] = [
    (r"\$12.50", "12.5", 1),
    (r"\$12.50", r"\$12.50", 1),
    ("$12.50", "12.50", 1),
    ("12.50", r"\$12.50", 1),
    (r"\$12.50", "12.05", 0),
    (r"\$1{,}250", r"\$1250", 1),
    (r"\$5", r"5\text{ dollars}", 1),
    (r"\$5", r"500\text{ cents}", 1),
    (r"\$5", r"5\text{ cents}", 0),
]
CHOICES: list[Case] = [
    (r"\textbf{(C)}\ 30", "C", 1),
    (r"\textbf{(C)}\ 30", "(C)", 1),
    (r"\textbf{(C)}\ 30", "30", 1),
    (r"\textbf{(C)}\ 30", r"\text{(C) } 30", 1),
    (r"\textbf{(C)}\ 30", "D", 0),
    (r"\textbf{(C)}\ 30", "31", 0),
    (r"\textbf{(C)}\ 30", "(C) 31", None),
    (r"\textbf{(C)}\ 30", r"\textbf{(D)}\ 30", 0),
    (r"\textbf{(A)}\ \frac{1}{2}", "0.5", 1),
    (r"\textbf{(A)}\ -3", "-3", 1),
    ("D", "D. 17", 1),
    ("D", "(D) 17", 1),
    ("D", r"\mathbf{D}", 1),
    ("D", "C. 17", 0),
    ("(D)", "d", 1),
    ("D", "d", None),
    ("（D）", "D", 1),
    ("B. increasing", "increasing", 1),
    ("E", "2.718", 0),
    ("12", r"\textbf{(D)}\ 12", 1),
    ("12", r"\textbf{(D)}\ 13", 0),
]
INTERVALS: list[Case] = [
    (r"(-\infty, 5]", r"x \le 5", 1),
    (r"(-\infty, 5]", r"x < 5", 0),
    (r"(-\infty, 5)", r"5 > x", 1),
    ("[1,4)", r"1 \leq x < 4", 1),
    ("[1,4)", r"1 < x < 4", 0),
    ("[1,4)", r"1 \le x \le 4", 0),
    ("x > 2", r"(2, \infty)", 1),
    ("x > 2", r"[2, \infty)", 0),
    (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x>2", 1),
    (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x>3", 0),
    ("(3,7)", r"\{x \mid 3<x<7\}", 1),
    ("(3,7)", r"\{x \mid 3<x<8\}", 0),
    ("[3,7]", r"x \in [3,7]", 1),
]
UNREADABLE: list[Case] = [
    (r"2 + \frac{1}{\mathrm{e}}", "2", 0),
    (r"2 + \frac{1}{\mathrm{e}}", r"2+e^{-1}", 1),
    (r"3\mathrm{e}", "3", 0),
    (r"3\mathrm{e}", "3e", 1),
    (r"\operatorname{arctan} 2", r"\arctan 2", 1),
    (r"\operatorname{arctan} 2", "2", 0),
    (r"\operatorname{Gal}(7)", "7", None),
    (r"x \equiv 3 \pmod{5}", "5", None),
    (r"\begin{cases}1\\2\end{cases}", "2", None),
    ("the answer follows from 5", "5", None),
    (r"0.\overline{3}", r"\frac{1}{3}", 1),
    (r"0.1\overline{6}", r"\frac{1}{6}", 1),
    (r"0.\overline{3}", "0", 0),
    (r"0.\overline{3}", "0.3", 0),
    (r"\mathbb{Z}/5\mathbb{Z}", r"\mathbb{Z}_5", 1),
    (r"\mathbb{Z}/5\mathbb{Z}", r"\mathbb{Z}_7", 0),
]
SENTINELS: list[Case] = [
    ("proof", "proof", None),
    ("notfound", "3", None),
    ("N/A", r"\text{N/A}", None),
    (r"\text{Not found}", "not found", None),
    ("None", "0", None),
    ("see solution", "5", None),
    ("null", "null", None),
    (r"\boxed{\text{proof}}", "12", None),
]
FLOAT_TEXT: list[Case] = [
    ("1e-05", r"10^{-5}", 1),
    ("1e-05", "0.00001", 1),
    ("1e-05", r"10^{-6}", 0),
    ("2.5e-07", r"2.5 \times 10^{-7}", 1),
    ("2.5e-07", r"2.6 \times 10^{-7}", 0),
    ("1e+20", "100000000000000000000", 1),
    ("6.02e23", r"6.02 \cdot 10^{23}", 1),
    (1e-07, r"10^{-7}", 1),
    (1e-07, "0", 0),
    ("3e-5", "0.00003", None),
    ("3e-5", "3e - 5", 1),
]
CASES_OF_LETTERS: list[Case] = [
    ("xY", "Xy", 0),
    ("xY", "Yx", 1),
    ("R^2 - r^2", "r^2 - R^2", 0),
    ("R^2 - r^2", "(R-r)(R+r)", 1),
    ("a_1 B_2", "b_2 A_1", 0),
    ("n", "N", 0),
    (r"\Gamma", r"\gamma", None),
    (r"\Pi", r"\pi", 0),
    ("even", "Even", 1),
]
BASES: list[Case] = [
    ("101_2", "101_2", 1),
    ("101_2", "101_{2}", 1),
    ("101_2", r"101_{\text{two}}", 1),
    ("101_2", "101", 1),
    ("101_2", "101_3", 0),
    ("101_2", "5", 0),
    ("101_2", "5_{10}", None),
    ("101_2", "110_2", 0),
    ("5", "101_2", None),
    ("5", "5_{10}", 1),
    ("5", "5_6", None),
    ("AF_{16}", "AF_{17}", 0),
    (r"\log_2 8", "3", 1),
]
SMALL_NUMBERS: list[Case] = [
    (r"\frac{1}{3^{80}}", r"\frac{1}{3^{79}}", 0),
    (r"\frac{1}{3^{80}}", r"3^{-80}", 1),
    ("0.0000001", "0.0000002", 0),
    ("0.0000001", "0", 0),
    (r"10^{-20}x", r"2\cdot 10^{-20}x", 0),
    (r"\{10^{-8}, 1\}", r"\{10^{-9}, 1\}", 0),
    (r"(10^{-8}, 1)", r"(10^{-9}, 1)", 0),
    ("2.7182818", "2.7182819", 0),
    ("0.5", "0.5000001", 0),
    (r"\frac{1}{3}", "0.333333", 1),
    (r"\frac{1}{3}", "0.333334", 0),
    (r"\frac{1}{3}", "0.33", 0),
    ("0.3333333333333333", r"\frac{1}{3}", 1),
    (r"\frac{1}{400!}", r"\frac{1}{401!}", 0),
    (r"\frac{1}{400!}", r"\frac{400}{400 \cdot 400!}", 1),
    ("28 = 2^2 * 7", "28 = 2^2 * 7", 1),
    ("28 = 2^2 * 7", "28 = 2^2 * 6", 0),
    ("28 = 2^2 * 7", "28 = 7 * 2^2", 1),
]
DOTS: list[Case] = [
    (r"1,2,\ldots,n", "1,2,n", 0),
    (r"1,2,\ldots,n", r"1,3,\ldots,n", 0),
    (r"2,4,\ldots,10", "2,4,6,8,10", 1),
    (r"2,4,\ldots,10", "2,4,10", 0),
    (r"1,\dots,5", r"1,2,\ldots,5", 1),
    (r"1+2+\cdots+n", r"\frac{n(n+1)}{2}", None),
    (r"1+2+\cdots+n", r"1+2+n", None),
]
UNITS: list[Case] = [
    (r"12\text{ m}", r"12\text{ cm}", 0),
    (r"12\text{ m}", "12", 1),
    ("12", r"12\text{ m}", 1),
    (r"12\text{ m}", r"1200\text{ cm}", 1),
    (r"12\text{ m}", r"12\mathrm{m}", 1),
    (r"12\text{ m}", r"12\text{ meters}", 1),
    (r"12\text{ m}", r"13\text{ m}", 0),
    (r"12\text{ m}^2", r"12\text{ square meters}", 1),
    (r"12\text{ m}^2", r"12\text{ m}", 0),
    (r"12\text{ apples}", r"12\text{ pears}", None),
    (r"12\text{ apples}", r"12\text{ apple}", 1),
    (r"2\text{ hours}", r"120\text{ minutes}", 1),
    (r"2\text{ hours}", r"2\text{ minutes}", 0),
    (r"30^\circ", r"30\text{ degrees}", 1),
    (r"3\text{ million}", "3", 0),
    (r"3\text{ million}", "3000000", 1),
    ("3", "3t", 0),
    ("3t", "3", 0),
    (r"5\text{ a.m.}", r"5\text{ p.m.}", 0),
    ("5 cm", "5", 1),
    ("5", "5 apples", 1),
    ("5", "6 apples", 0),
    ("5 apples", "5 cm", None),
]
STATEMENTS: list[Case] = [
    (r"7 \in S", r"7 \notin S", 0),
    (r"a \le b", r"a \ge b", 0),
    (r"\gcd(m,n)", "1", None),
    (r"\gcd(12,18)", "6", 1),
    (r"AB \parallel CD", r"AB \perp CD", 0),
    ("x = 3", r"x \ne 3", 0),
    (r"A \subset B", r"A \supset B", 0),
    (r"f^{-1}(x)", r"\frac{1}{f(x)}", None),
    ("f'(x)", "f(x)", None),
    ("1:2:3", "1:3:2", 0),
    ("1:2:3", "2:4:6", 1),
    ("10:30", "1:3", None),
    ("12:00", "2:00", 0),
]
WORDS: list[Case] = [
    ("listen", "silent", None),
    ("odd", r"\text{even}", 0),
    (r"\text{Monday}", "Tuesday", 0),
    ("Yes", "No", 0),
    ("True", "yes", None),
    ("No", r"\text{no}", 1),
    ("three", "3", 1),
    ("three", "4", 0),
    ("3", r"\text{three}", 1),
    (r"\text{no solution}", r"\emptyset", None),
]

KINDS = {
    "braceless": BRACELESS,
    "word for word": WORD_FOR_WORD,
    "spaced numbers": SPACED_NUMBERS,
    "money": MONEY,
    "choices": CHOICES,
    "intervals": INTERVALS,
    "unreadable": UNREADABLE,
    "sentinels": SENTINELS,
    "float text": FLOAT_TEXT,
    "case of letters": CASES_OF_LETTERS,
    "bases": BASES,
    "small numbers": SMALL_NUMBERS,
    "dots": DOTS,
    "units": UNITS,
    "statements": STATEMENTS,
    "words": WORDS,
}


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind: str) -> None:
    cases = KINDS[kind]
    verdicts = math_reward(
        [rf"So it is \boxed{{{answer}}}." for _, answer, _ in cases], [gold for gold, _, _ in cases]
    )
    wrong = [(*case, verdict) for case, verdict in zip(cases, verdicts, strict=True) if verdict != case[2]]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    ("completion", "gold", "verdict"),
    [
        (r"They are \boxed{2}, \boxed{3} and \boxed{5}.", "2,3,5", 1),
        (r"They are $\boxed{2}$ and $\boxed{3}$.", r"\{2,3\}", 1),
        (r"$x = \boxed{2}$ and $y = \boxed{3}$", "(2,3)", 1),
        (r"They are \boxed{2}, \boxed{3} and \boxed{5}.", "2,3", 0),
        (r"They are \boxed{2}, \boxed{3} and \boxed{5}.", "5", 0),  # Who names several has not answered.
        (r"\boxed{\frac{1}{2}} or \boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{2}. Then I saw that it is \boxed{3}", "2,3", 0),
        (r"\boxed{2} and \boxed{3", "2,3", 0),
        (r"so \fbox{7}", "7", 1),
        (r"so \fbox{7}", "8", 0),
        (r"so \boxed 7", "7", 1),
        (r"so $\boxed 12$.", "12", 1),
        (r"so $\boxed12$.", "13", 0),
        (r"so $\boxed \frac{1}{2}$", "0.5", 1),
        (r"\boxed{3}, or \fbox{7}", "7", 0),
        (r"put it into \boxed please, the answer is $7$", "7", 1),
        ("Final Answer: **73**", "73", 1),
        ("**Answer:** 1,073.", "1073", 1),
        ("The answer is 73", "73", 1),
        ("The answer is 73", "37", 0),
        ("The answer is 73 or so", "73", 0),
    ],
)
def test_boxes(completion: str, gold: str, verdict: float) -> None:
    assert math_reward([completion], [gold]) == [verdict]
