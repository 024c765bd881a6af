import itertools
import random
import re

import pytest

from sg_opd_trl.tasks.chains import NUM_STEPS, TASK, Problem, needs_borrow, next_total
from sg_opd_trl.tasks.problems import is_correct
from sg_opd_trl.tasks.settings import ChainSettings, SupervisedSettings
from sg_opd_trl.verifiers import math_reward


def training(slips: float = 0.0, borrows: float = 0.0) -> SupervisedSettings:
    return SupervisedSettings(
        batch_size=1,
        max_steps=1,
        schedule_steps=1,
        learning_rate=1e-3,
        slip_probability=slips,
        forgotten_borrow_probability=borrows,
    )


def steps_of(solution: str) -> list[tuple[int, int]]:
    """Changes and totals as a reader finds them."""
    return [(int(change), int(total)) for change, total in re.findall(r"([+-]\d)=(\d\d)", solution)]


def test_solution_by_hand() -> None:
    problem = Problem(5, (-3, 9, -7, 8))
    assert problem.question == "05-3=??+9=??-7=??+8=??"
    assert problem.answer == "02110412"
    # 5 - 3 = 2, 2 + 9 = 11, 11 - 7 = 4, 4 + 8 = 12.
    written = r"-3=02+9=11-7=04+8=12 \boxed{02110412}"
    assert TASK.write_solution(problem, training(), random.Random(0)) == written
    # Of these only 11 - 7 needs a borrow; forgotten, the 1 of the tens stays: 14, then 22.
    forgotten = r"-3=02+9=11-7=14+8=22 \boxed{02111422}"
    assert TASK.write_solution(problem, training(borrows=1.0), random.Random(0)) == forgotten


def test_the_right_last_total_is_not_enough() -> None:
    problem = Problem(5, (-3, 9, -7, 8))
    assert not is_correct(r"-3=03+9=11-7=04+8=12 \boxed{03110412}", problem.answer)
    assert not is_correct(r"-3=02+9=11-7=04+8=12 \boxed{12}", problem.answer)


def test_the_verifier_of_the_recipes_agrees() -> None:
    problems, clean = TASK.draw_problems(30, random.Random(6)), training()
    texts = [TASK.write_solution(problem, clean, random.Random(0)) for problem in problems]
    gold = [problem.answer for problem in problems]
    assert any(answer.startswith("0") for answer in gold)
    assert math_reward(texts, solution=gold) == [1.0] * 30
    assert math_reward(texts, solution=gold[1:] + gold[:1]) == [0.0] * 30


def test_answers_against_an_evaluator_of_the_question() -> None:
    generator, clean = random.Random(1), training()
    for problem in TASK.draw_problems(500, generator):
        expression = problem.question.replace("=??", "").lstrip("0") or "0"
        ends = [len(expression) - 2 * (NUM_STEPS - index) for index in range(1, NUM_STEPS + 1)]
        totals = [eval(expression[:end]) for end in ends]
        assert problem.answer == "".join(f"{total:02d}" for total in totals)
        solution = TASK.write_solution(problem, clean, generator)
        assert is_correct(solution, problem.answer)
        # The blanks filled in are the question's, and every total is that of the expression so far.
        assert "".join(f"{change:+d}" for change, _ in steps_of(solution)) == problem.question.replace("=??", "")[2:]
        assert [total for _, total in steps_of(solution)] == totals


def test_problems_stay_in_range() -> None:
    problems = TASK.draw_problems(2000, random.Random(2))
    borrows, totals = 0, set()
    for problem in problems:
        assert len(problem.changes) == NUM_STEPS
        total = problem.start
        for change in problem.changes:
            assert 1 <= abs(change) <= 9
            borrows += total >= 10 > total + change  # within 0 to 19 that is through the ten
            total += change
            totals.add(total)
    assert totals == set(range(20))
    # About 0.6 steps of a problem need a borrow, so a teacher that forgets 0.3 of them fails one problem in six.
    assert 0.5 <= borrows / 2000 <= 0.7


def test_one_step_digit_by_digit() -> None:
    for total, change in itertools.product(range(100), [*range(-9, 0), *range(1, 10)]):
        tens, ones = divmod(total, 10)
        borrow = change < 0 and ones < abs(change)
        carry = change > 0 and ones + change > 9
        new_ones = (ones + change) % 10
        assert needs_borrow(total, change) is borrow
        assert next_total(total, change) == 10 * ((tens - borrow + carry) % 10) + new_ones
        assert next_total(total, change, forget_borrow=True) == 10 * ((tens + carry) % 10) + new_ones


def test_share_of_forgotten_borrows() -> None:
    generator = random.Random(3)
    asked = forgotten = others_wrong = 0
    for problem in TASK.draw_problems(3000, generator):
        before = problem.start
        for change, total in steps_of(TASK.write_solution(problem, training(borrows=0.3), generator)):
            if change < 0 and before % 10 + change < 0:
                asked += 1
                forgotten += total == before + change + 10
                others_wrong += total not in (before + change, before + change + 10)
            else:
                others_wrong += total != before + change
            before = total
    # About 1800 borrows: the deviation of the share is 0.01.
    assert forgotten / asked == pytest.approx(0.3, abs=0.04)
    assert others_wrong == 0


def test_share_of_slips() -> None:
    generator = random.Random(4)
    wrong = 0
    for problem in TASK.draw_problems(2000, generator):
        before = problem.start
        for change, total in steps_of(TASK.write_solution(problem, training(slips=0.15), generator)):
            wrong += (total - before - change) % 100 != 0
            before = total
    # A slip is right one time in twenty: 0.15 * 0.95 = 0.1425.
    assert wrong / (2000 * NUM_STEPS) == pytest.approx(0.1425, abs=0.015)


def test_clean_solutions_draw_nothing() -> None:
    generator = random.Random(5)
    state = generator.getstate()
    TASK.write_solution(Problem(5, (-3, 9, -7, 8)), training(), generator)
    assert generator.getstate() == state


def test_order_of_changes_makes_another_problem() -> None:
    assert Problem(5, (1, 2)).identity != Problem(5, (2, 1)).identity
    assert Problem(5, (1, 2)).identity == Problem(5, (1, 2)).identity


def test_shipped_splits_share_no_problem() -> None:
    splits = TASK.draw_splits(ChainSettings().data)
    everything = [*splits.train, *splits.validation, *splits.test, *splits.tune]
    assert len({problem.question for problem in everything}) == len(everything) == 5500
