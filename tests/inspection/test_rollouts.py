"""What is said of first rollouts, from plain numbers."""

from dataclasses import replace

import pytest

from sg_opd_trl.inspection.rollouts import FirstRollouts, rollout_rows

GOOD = FirstRollouts(
    limit=64, rollouts=16, tokens=300, cut_off=1, right=5, judged=16, groups=2, mixed=2, consensus=0.4, conflict=0.3,
    dead_zone=1e-4, mean_gap=0.5, largest_gap=3.0, dropped={"wrong": 3}, written=8,
)  # fmt: skip


def states(found, gated=True):
    return {row.name: row.state for row in rollout_rows(found, gated=gated)}


def test_what_is_as_it_should_be_is_green():
    assert states(GOOD) == dict.fromkeys(("rollouts", "verdicts", "teacher", "gate", "anchor"), "green")
    assert states(replace(GOOD, dropped=None), gated=False).keys() == {"rollouts", "verdicts", "teacher"}


@pytest.mark.parametrize(
    ("change", "name", "state", "said"),
    [
        ({"cut_off": 8}, "rollouts", "yellow", "8 of 16 rollouts are cut off at 64 tokens"),
        ({"cut_off": 16}, "rollouts", "red", "No answer is finished"),
        ({"judged": 0, "mixed": 0}, "verdicts", "red", "0 have a verdict"),
        ({"right": 0, "mixed": 0}, "verdicts", "yellow", "easier"),
        ({"right": 16, "mixed": 0}, "verdicts", "yellow", "harder"),
        ({"mean_gap": None, "tokens": 0}, "teacher", "red", "No token"),
        ({"largest_gap": 1e-4}, "teacher", "red", "says what the student says"),
        ({"mean_gap": 5.5}, "teacher", "yellow", "hardly have written"),
        ({"consensus": 0.004, "conflict": 0.004}, "gate", "yellow", "99% neutral"),
        ({"dropped": {"wrong": 6, "empty": 2}}, "anchor", "yellow", "0 of 8 teacher rollouts would be kept, 6 judged"),
    ],
)
def test_what_is_not_is_named(change, name, state, said):
    row = next(row for row in rollout_rows(replace(GOOD, **change), gated=True) if row.name == name)
    assert row.state == state
    assert said in str(row)


def test_a_gate_without_mixed_groups_is_told_with_the_verdicts():
    assert states(replace(GOOD, mixed=0, consensus=0.0, conflict=0.0))["gate"] == "green"
