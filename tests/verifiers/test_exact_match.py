"""String comparison of boxed answers."""

import pytest

from sg_opd_trl.errors import VerifierError
from sg_opd_trl.verifiers import exact_match_reward


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        (r"\boxed{42}", "42", 1.0),
        (r"\boxed{ 42. }", "$42$", 1.0),
        (r"\boxed{41} or \boxed{42}", 42, 1.0),
        (r"\boxed{1{,}000}", "1000", 0.0),
        (r"\boxed{1,000,000}", "1000000", 1.0),
        (r"\boxed{-1,234.5}", "-1234.5", 1.0),
        (r"\boxed{1,2}", "12", 0.0),  # A list, not thousands.
        (r"\boxed{\dfrac{1}{2}}", r"\boxed{\frac 12}", 0.0),
        (r"\boxed{\dfrac{1}{2}}", r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{\left( 1,\, 2 \right)}", "(1,2)", 1.0),
        (r"\boxed{\leftarrow}", "arrow", 0.0),
        (r"\boxed{\$5}", "5", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 0.0),
        ("42", "42", 0.0),
        (r"\boxed{42", "42", 0.0),
        (r"<think>\boxed{42}</think>", "42", 0.0),
        (r"\boxed{42}", None, None),
    ],
)
def test_exact_match(completion: str, solution: object, reward: float | None) -> None:
    assert exact_match_reward([completion], [solution], other_column=["x"]) == [reward]


def test_lengths_must_agree() -> None:
    with pytest.raises(VerifierError, match="`solution` must be a list of 2 entries"):
        exact_match_reward(["a", "b"], ["1"])
