import random
import re

import pytest

from sg_opd_trl.tasks.arithmetic import TASK, Problem, solution_with_slips, worked_solution
from sg_opd_trl.tasks.settings import DataSettings


def test_worked_solution_by_hand() -> None:
    # 6 + 6 = 12: write 2, carry 1; 9 + 4 + 1 = 14: write 4, carry 1; 8 + 2 + 1 = 11. Read backwards: 1142.
    assert worked_solution(Problem(896, 246)) == r"6+6+0=12,9+4+1=14,8+2+1=11 \boxed{1142}"
    # 0 + 5 = 5, 0 + 0 = 0, 1 + 2 = 3: no carry anywhere, no leading zero in the answer.
    assert worked_solution(Problem(100, 205)) == r"0+5+0=05,0+0+0=00,1+2+0=03 \boxed{305}"


def schoolbook_solution(first: int, second: int) -> str:
    """Oracle without carries passed along: the carry into a place is the overflow of everything to its right."""
    steps = []
    for size in (1, 10, 100):
        carry = (first % size + second % size) // size
        left, right = (int(str(number)[::-1][len(str(size)) - 1]) for number in (first, second))
        steps.append(f"{left}+{right}+{carry}={left + right + carry:02d}")
    return ",".join(steps) + " \\boxed{" + str(first + second) + "}"


def test_worked_solution_against_oracle() -> None:
    generator = random.Random(1)
    pairs = [(generator.randint(100, 999), generator.randint(100, 999)) for _ in range(500)]
    for first, second in [*pairs, (999, 999), (100, 100), (999, 100), (505, 495)]:
        assert worked_solution(Problem(first, second)) == schoolbook_solution(first, second)


def test_slip_is_carried_on() -> None:
    # 6 + 6 written as 09: write 9, carry 0; then 9 + 4 + 0 = 13, 8 + 2 + 1 = 11: 1139.
    assert worked_solution(Problem(896, 246), (9, None, None)) == r"6+6+0=09,9+4+0=13,8+2+1=11 \boxed{1139}"
    # The last digit sum written as 03: the answer has three digits.
    assert worked_solution(Problem(896, 246), (None, None, 3)) == r"6+6+0=12,9+4+1=14,8+2+1=03 \boxed{342}"


def test_share_of_slips() -> None:
    generator = random.Random(2)
    problems = TASK.draw_problems(2000, generator)
    assert all(solution_with_slips(problem, 0.0, generator) == worked_solution(problem) for problem in problems)
    wrong_steps = 0
    for problem in problems:
        steps = re.findall(r"(\d)\+(\d)\+(\d)=(\d\d)", solution_with_slips(problem, 0.15, generator))
        assert len(steps) == 3
        wrong_steps += sum(int(a) + int(b) + int(c) != int(total) for a, b, c, total in steps)
    # A slip is wrong 19 times in 20: 0.15 * 0.95 = 0.1425; the deviation over 6000 steps is 0.0045.
    assert wrong_steps / 6000 == pytest.approx(0.1425, abs=0.015)


def test_splits_share_no_problem_even_swapped() -> None:
    splits = TASK.draw_splits(DataSettings())
    sizes = (len(splits.train), len(splits.validation), len(splits.test), len(splits.tune))
    assert sizes == (4000, 100, 200, 200)
    everything = [*splits.train, *splits.validation, *splits.test, *splits.tune]
    assert len({frozenset((problem.first, problem.second)) for problem in everything}) == 4500
    assert all(100 <= number <= 999 for problem in everything for number in (problem.first, problem.second))


def test_shipped_problems_are_those_of_the_published_numbers() -> None:
    splits = TASK.draw_splits(DataSettings())
    # Written down from the version whose results were published: a new split or task must not move these.
    assert [problem.question for problem in splits.test[:3]] == ["450+581=", "237+251=", "856+869="]
    assert [problem.question for problem in splits.train[:3]] == ["689+730=", "656+809=", "418+441="]
    assert sum(problem.first * 7 + problem.second for problem in splits.train) == 17_500_410
    assert sum(problem.first * 7 + problem.second for problem in splits.test) == 877_032


def test_splits_depend_on_the_seed_alone() -> None:
    assert TASK.draw_splits(DataSettings()) == TASK.draw_splits(DataSettings())
    assert TASK.draw_splits(DataSettings(seed=1)).test != TASK.draw_splits(DataSettings()).test
    assert TASK.draw_splits(DataSettings(num_train=7)).test == TASK.draw_splits(DataSettings()).test


def test_draws_avoid_taken_problems() -> None:
    held_out = {(first, second) for first in range(100, 1000) for second in range(first, 1000) if first != 500}
    drawn = TASK.draw_problems(5, random.Random(0), held_out)
    assert all(min(problem.first, problem.second) == 500 for problem in drawn)


def test_boxed_answer_is_accepted_by_math_verify() -> None:
    math_verify = pytest.importorskip("math_verify")
    for problem in TASK.draw_problems(20, random.Random(3)):
        written = math_verify.parse(worked_solution(problem))
        assert math_verify.verify(math_verify.parse(problem.answer), written)
        assert not math_verify.verify(math_verify.parse(str(problem.first + problem.second + 1)), written)
