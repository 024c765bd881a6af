"""How a setting is declared, all at once: default, bounds or choices, help, its off, and what leaves it unused.

`setting` makes a field of a dataclass; the checks, the warning of settings without effect, the documentation and the
tables of defaults are readings of it (`declared`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Final, get_args, get_type_hints

ON: Final = object()
"""In `used_if`: whatever value the other setting has, so long as it is not its `off`."""

AUTO: Final = "auto"
"""The word for a number that the run chooses from what it measures."""


class NumberOrWord(float):
    """The type of a field that holds a number or one of a few words, for parsers, which call the one type of a field.

    What it gives is a plain number or the text, whose word the setting's rule knows.
    """

    def __new__(cls, text: Any) -> Any:
        """The number that a text says, else the text."""
        try:
            return float(text)
        except ValueError:
            return text


UsedIf = Mapping[str, Any]
"""Other setting -> the values, a tuple, of which it must have one; or `ON`. All entries must hold."""


@dataclass(frozen=True)
class Rule:
    """What a value may be, and why.

    Attributes:
        above: a number must be larger than it.
        at_least: a number must not be smaller.
        below: a number must be smaller.
        at_most: a number must not be larger. Without an upper bound everything finite is allowed.
        choices: all values there are, in place of bounds.
        words: values beside the numbers within the bounds, of a `NumberOrWord`.
        why: a sentence for messages: what the value does, by which a reader sees why the rest makes no sense.
        way_out: a sentence for messages: what to set instead; "" names the default.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: Sequence[str] = ()
    why: str = ""
    way_out: str = ""
    words: Sequence[str] = ()

    @property
    def bounded(self) -> bool:
        """Whether it is of numbers."""
        return any(bound is not None for bound in (self.above, self.at_least, self.below, self.at_most))

    def allowed(self, *, whole: bool = False) -> str:
        """The allowed values in words, as messages and the documentation have them; "" where anything goes."""
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        if not self.bounded:
            return ""
        if whole and self.at_least is not None and self.below is None and self.at_most is None:
            return f"a whole number of at least {self.at_least:g}"
        low = f"[{self.at_least:g}" if self.at_least is not None else f"({_or(self.above, -math.inf):g}"
        high = f"{self.at_most:g}]" if self.at_most is not None else f"{_or(self.below, math.inf):g})"
        words = "".join(f", or {word!r}" for word in self.words)
        return f"a {'whole ' if whole else ''}number in {low}, {high}{words}"

    def problem(
        self, name: str, value: object, default: object, *, whole: bool = False, optional: bool = False
    ) -> str | None:
        """What is wrong with a value: the setting, the value, the reason, the way out; None if nothing is.

        Args:
            name: of the setting.
            value: as given, of whatever type.
            default: of the setting.
            whole: for numbers, whether they count something.
            optional: whether None is a value too.
        """
        allowed = self.allowed(whole=whole)
        if not allowed or (value is None and optional) or self._admits(value, whole):
            return None
        suggestion = f"Set it to {default!r}." if self.choices else f"Set it to {default}, the default."
        return f"`{name}` must be {allowed}, got {value!r}. {self.why} {self.way_out or suggestion}"

    def _admits(self, value: object, whole: bool) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, str) and value in self.words:
            return True
        # True is an int in Python, and a flag where a number belongs is a mistake. NaN fails every comparison.
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return False
        above_low = value >= self.at_least if self.at_least is not None else value > _or(self.above, -math.inf)
        return above_low and (value <= self.at_most if self.at_most is not None else value < _or(self.below, math.inf))


@dataclass(frozen=True)
class Setting:
    """A declared field, as its readers see it.

    Attributes:
        name: of the field.
        default: its value if nothing is set; `MISSING` without one.
        whole: whether it holds an `int`.
        optional: whether None is a value.
        help: its meaning, with its source.
        rule: what it may be.
        group: heading under which it is documented.
        off: the value that switches its part off, `MISSING` where there is none.
        used_if: when anything reads it: if one of these alternatives holds. None: always.
    """

    name: str
    default: Any
    whole: bool
    optional: bool
    help: str
    rule: Rule
    group: str
    off: Any
    used_if: tuple[UsedIf, ...]

    def problem(self, value: object) -> str | None:
        """What is wrong with a value of it; None if nothing is."""
        return self.rule.problem(self.name, value, self.default, whole=self.whole, optional=self.optional)

    @property
    def values(self) -> str:
        """What it may be, for the documentation; "" where the type says it all."""
        allowed = self.rule.allowed(whole=self.whole)
        if not allowed or self.off is MISSING:
            return f"{allowed}, or None" if allowed and self.optional else allowed
        return f"{allowed}, or None: off" if self.off is None else f"{allowed}; {self.off:g} is off"


class _Help(str):
    """A help text that carries the rest of its declaration.

    The parsers of TRL and transformers pass all of a field's metadata to argparse, which refuses a key that it does
    not know and would check `choices` with a message of its own. So `help` is the only key, the rest travels on it.
    """

    rule: Rule
    group: str
    off: Any
    used_if: tuple[UsedIf, ...]


def setting(
    default: Any,
    *,
    help: str,  # the word of argparse and of the dataclass parsers
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] = (),
    words: Sequence[str] = (),
    why: str = "",
    way_out: str = "",
    rule: Rule | None = None,
    off: Any = MISSING,
    used_if: UsedIf | Sequence[UsedIf] = (),
    group: str = "",
) -> Any:
    """A field of a configuration. Whether it counts and whether it may be None is read from its annotation.

    Args:
        default: its value if nothing is set; a list is copied for each configuration.
        help: its meaning, what None stands for, and its source: paper and equation, or "our choice".
        above: as in `Rule`, as for all up to `way_out`.
        at_least: see there.
        below: see there.
        at_most: see there.
        choices: see there.
        words: see there.
        why: see there.
        way_out: see there.
        rule: all of these in one, for a rule that is kept outside of the configuration too.
        off: the value that switches its part off.
        used_if: what must hold for anything to read it; of several alternatives one must hold.
        group: begins a group of settings: this one, and those after it that name none.

    Returns:
        A `dataclasses.Field`.
    """
    text = _Help(help)
    text.rule = rule or Rule(above, at_least, below, at_most, choices, why, way_out, words)
    text.group, text.off = group, off
    text.used_if = (used_if,) if isinstance(used_if, Mapping) else tuple(used_if)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def declared(config_class: type, rules: Mapping[str, Rule] | None = None) -> dict[str, Setting]:
    """The settings of a dataclass in the order of declaration: fields made by `setting`, and those with a rule.

    Args:
        config_class: the dataclass.
        rules: of inherited fields, which another class declares.
    """
    hints, rules, group = get_type_hints(config_class), rules or {}, ""
    found = {}
    for each in fields(config_class):
        text = each.metadata.get("help", "")
        if isinstance(text, _Help):
            group = text.group or group
            own = {"rule": text.rule, "group": group, "off": text.off, "used_if": text.used_if}
        elif each.name in rules:
            own = {"rule": rules[each.name], "group": "", "off": MISSING, "used_if": ()}
        else:
            continue
        hint = hints[each.name]
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        found[each.name] = Setting(each.name, default_of(each), int in kinds, NoneType in kinds, str(text), **own)
    return found


def default_of(each: "Field[Any]") -> Any:
    """The default of a field; `MISSING` where it has none."""
    return each.default_factory() if each.default_factory is not MISSING else each.default


def defaults_of(config_class: type) -> dict[str, Any]:
    """The default of every field of a dataclass; `MISSING` where it has none."""
    return {each.name: default_of(each) for each in fields(config_class)}


def value_problems(config: Any, settings: Mapping[str, Setting]) -> Iterator[str]:
    """What is wrong with the values of a configuration, each looked at for itself."""
    for name, each in settings.items():
        problem = each.problem(getattr(config, name))
        if problem is not None:
            yield problem


def unused(config: Any, settings: Mapping[str, Setting]) -> dict[str, str]:
    """Settings that differ from their default and that nothing reads under this configuration.

    Returns:
        name -> what switches its part off, as `setting=value`.
    """
    changed = [name for name, each in settings.items() if getattr(config, name) != each.default]
    reasons = {name: _switched_off(config, settings, name) for name in changed}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _switched_off(config: Any, settings: Mapping[str, Setting], name: str) -> str | None:
    """Why nothing reads a setting: the last alternative's first condition that does not hold; None if it is read."""
    reason = None
    for conditions in settings[name].used_if if name in settings else ():
        reason = next(filter(None, (_unmet(config, settings, *each) for each in conditions.items())), None)
        if reason is None:
            return None
    return reason


def _unmet(config: Any, settings: Mapping[str, Setting], switch: str, wanted: Any) -> str | None:
    # A switch that is itself without effect switches nothing on: what matters is what turned that one off.
    above = _switched_off(config, settings, switch)
    value = getattr(config, switch)
    holds = value != settings[switch].off if wanted is ON else value in wanted
    return above or (None if holds else f"{switch}={value!r}")


def _or(bound: float | None, otherwise: float) -> float:
    return otherwise if bound is None else bound
