"""`setting`: declarations, and the readings of them."""

import math
from dataclasses import MISSING, dataclass, field
from typing import Any

import pytest

from sg_opd_trl.setting import ON, Rule, declared, defaults_of, setting, unused, value_problems


@dataclass
class Base:
    """Fields that another library declares."""

    warmth: float = 1.0
    name: str = field(default="plain", metadata={"help": "Not ours."})


@dataclass
class Settings(Base):
    """A lamp: its switch, its brightness, and the colour that only a bright one has."""

    lit: bool = setting(True, group="Lamp", off=False, help="Whether it is on.")
    watts: int | None = setting(
        5, at_least=1, at_most=60, why="It burns out.", off=None, used_if={"lit": ON}, help="W"
    )
    colour: str = setting(
        "red", choices=("red", "blue"), why="Light has one.", used_if={"watts": (40, 50)}, help="As seen."
    )
    shade: float = setting(0.5, above=0, below=1, why="It dims.", way_out="Take it off.", help="Share.")
    sockets: list[int] = setting([1], group="House", used_if=({"lit": (False,)}, {"colour": ("blue",)}), help="Where.")


SETTINGS = declared(Settings, {"warmth": Rule(at_least=-1, why="It is felt.")})


@pytest.mark.parametrize(
    ("rule", "whole", "words"),
    [
        (Rule(), False, ""),
        (Rule(above=0), False, "a number in (0, inf)"),
        (Rule(at_least=0, at_most=1), False, "a number in [0, 1]"),
        (Rule(at_most=0), False, "a number in (-inf, 0]"),
        (Rule(below=0.5), False, "a number in (-inf, 0.5)"),
        (Rule(at_least=1), True, "a whole number of at least 1"),
        (Rule(at_least=1, below=4), True, "a whole number in [1, 4)"),
        (Rule(choices=("a", "b")), False, "one of 'a', 'b'"),
    ],
)
def test_allowed_values_in_words(rule: Rule, whole: bool, words: str) -> None:
    assert rule.allowed(whole=whole) == words


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None, [1.0]])
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    for rule in (Rule(above=0), Rule(at_least=0), Rule(below=2), Rule(at_most=2)):
        assert repr(value) in rule.problem("x", value, 1.0)


def test_a_count_is_whole() -> None:
    rule = Rule(at_least=1, why="It counts.")
    assert rule.problem("x", 2, 1, whole=True) is None
    assert rule.problem("x", 2.0, 1, whole=True) == (
        "`x` must be a whole number of at least 1, got 2.0. It counts. Set it to 1, the default."
    )


def test_declarations_in_their_order() -> None:
    assert list(SETTINGS) == ["warmth", "lit", "watts", "colour", "shade", "sockets"]
    assert [each.group for each in SETTINGS.values()] == ["", "Lamp", "Lamp", "Lamp", "Lamp", "House"]
    assert [each.default for each in SETTINGS.values()] == [1.0, True, 5, "red", 0.5, [1]]
    assert [name for name, each in SETTINGS.items() if each.whole] == ["watts"]
    assert [name for name, each in SETTINGS.items() if each.optional] == ["watts"]
    assert SETTINGS["watts"].values == "a whole number in [1, 60], or None: off"
    assert SETTINGS["shade"].off is MISSING
    assert Settings().sockets is not Settings().sockets
    assert defaults_of(Settings) == {"name": "plain"} | {name: each.default for name, each in SETTINGS.items()}


def test_problems_of_all_values_at_once() -> None:
    bad = Settings(warmth=-2, watts=61, colour="green", shade=1.0)
    assert list(value_problems(bad, SETTINGS)) == [
        "`warmth` must be a number in [-1, inf), got -2. It is felt. Set it to 1.0, the default.",
        "`watts` must be a whole number in [1, 60], got 61. It burns out. Set it to 5, the default.",
        "`colour` must be one of 'red', 'blue', got 'green'. Light has one. Set it to 'red'.",
        "`shade` must be a number in (0, 1), got 1.0. It dims. Take it off.",
    ]
    assert list(value_problems(Settings(watts=None), SETTINGS)) == []


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, {}),
        ({"watts": 40, "colour": "blue", "sockets": [2]}, {}),
        ({"colour": "blue"}, {"colour": "watts=5"}),
        # Off at the root: the switch is what a reader has to look at, not what hangs on it.
        ({"lit": False, "watts": 40, "colour": "blue"}, {"watts": "lit=False", "colour": "lit=False"}),
        # One of two ways to be used is enough; without either the last is named.
        ({"lit": False, "sockets": [2]}, {}),
        ({"watts": 40, "sockets": [2]}, {"sockets": "colour='red'"}),
    ],
)
def test_unused_settings(values: dict[str, Any], found: dict[str, str]) -> None:
    assert unused(Settings(**values), SETTINGS) == found
