r"""Units behind a number, so that `12\text{ cm}` is not `12\text{ m}`."""

import re
from fractions import Fraction
from typing import NamedTuple

from .notation import canonical, unwrapped

UNKNOWN = ""


class Unit(NamedTuple):
    """A unit: its dimension, the number of basic units of that dimension in it, its name."""

    dimension: str
    factor: Fraction | int
    name: str


def _family(dimension: str, **factors: str) -> dict[str, Unit]:
    """Units of one dimension: `factor="name name"`, the factor written with `n` in front, `o` for over."""
    units = {}
    for factor, names in factors.items():
        over, _, under = factor.removeprefix("n").partition("o")
        for name in names.split():
            units[name] = Unit(dimension, Fraction(int(over), int(under or 1)), names.split()[0])
    return units


_UNITS = {
    **_family(
        "length",
        n1="mm millimeter millimetre",
        n10="cm centimeter centimetre",
        n1000="m meter metre",
        n1000000="km kilometer kilometre",
    ),
    **_family("imperial length", n1="in inch inche", n12="ft foot feet", n36="yd yard", n63360="mi mile"),
    **_family("mass", n1="mg milligram", n1000="g gram", n1000000="kg kilogram"),
    **_family("imperial mass", n1="oz ounce", n16="lb pound"),
    **_family("time", n1="s sec second", n60="min minute", n3600="h hr hour", n86400="day", n604800="week"),
    **_family("long time", n1="month", n12="year yr"),
    **_family("volume", n1="ml milliliter millilitre", n1000="l liter litre"),
    **_family("angle", n1="deg degree"),
    **_family("radians", n1="rad radian"),
    **_family("money", n1="cent", n100="dollar usd"),
    **_family("speed", n1="mph"),
    **_family("metric speed", n1="kmh kph"),
    **_family("morning", n1="am"),
    **_family("afternoon", n1="pm"),
}
_COUNT = Unit("count", 1, "")
_MULTIPLIERS = {
    "dozen": "12",
    "hundred": "10^{2}",
    "thousand": "10^{3}",
    "million": "10^{6}",
    "billion": "10^{9}",
    "trillion": "10^{12}",
}
# Words that say more than which unit.
_NO_UNIT = frozenset(
    {
        "or",
        "and",
        "mod",
        "if",
        "more",
        "less",
        "least",
        "most",
        "not",
        "only",
        "from",
        "to",
        "of",
        "with",
        "when",
        "for",
    }
    | {"other", "than", "where", "each", "about"}
)
_FONT = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"
_POWER = r"(?:\s*\^\s*\{?([23])\}?)?"
# Anchored at the end and without a leading `.*`, so that no text takes long.
_IN_FONT = re.compile(rf"{_FONT}{_POWER}$")
_BARE = re.compile(rf"([a-zA-Z][a-zA-Z.]*(?: [a-zA-Z.]+)?){_POWER}$")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?$")
_NUMBER_ENDS = (*"0123456789", "}")
_GAPS = ("\\,", "\\;", "\\:", "\\!", "\\ ", "~")
_WORD = re.compile(r"[a-z]{4,}")
_MONEY = re.compile(r"\s*(?:\\\$|\$(?=\d[^$]*$))")


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""Splits `5\text{ cm}^2` into `5` and square centimetres.

    Args:
        text: an answer or a gold answer.

    Returns:
        The value in one way of writing, and its unit; without a unit, all of it and None. The dimension of a unit that
        is not known is `UNKNOWN`.
    """
    value = canonical(text)
    if _MONEY.match(text):
        return _multiplied(value), _UNITS["dollar"]
    if (match := _DEGREES.search(value)) and match.start():
        return _before(value, match), _UNITS["degree"]
    match = _IN_FONT.search(value) or _bare_unit(value)
    head = "" if match is None else _before(value, match)
    if match is None or not head:
        scaled = _multiplied(value)
        return scaled, None if scaled == value else _COUNT
    unit = _unit(match[1], match[2]) if re.search(r"\d|\\pi|\^", head) else None
    words = match[1].lower().split()
    if words and words[0] in _MULTIPLIERS:
        return rf"{head} \times {_MULTIPLIERS[words[0]]}", _unit(" ".join(words[1:]), match[2]) or _COUNT
    return (value, None) if unit is None else (head, unit)


def _before(value: str, match: re.Match[str]) -> str:
    head = value[: match.start()].rstrip()
    while head.endswith(_GAPS) or head.endswith("\\"):
        head = head[:-1].rstrip()
    return head


def _bare_unit(value: str) -> re.Match[str] | None:
    """`12 cm` without a font: known units of two letters or more, or words, because `3t` and `3abc` are products."""
    match = _BARE.search(value)
    if match is None or len(match[1]) == 1 or not _before(value, match).endswith(_NUMBER_ENDS):
        return None
    unit = _unit(match[1], None)
    return None if unit is None or (unit.dimension == UNKNOWN and not _WORD.fullmatch(match[1])) else match


def _multiplied(value: str) -> str:
    match = re.fullmatch(rf"(.*\d)\s+({'|'.join(_MULTIPLIERS)})", unwrapped(value), re.DOTALL)
    return rf"{match[1]} \times {_MULTIPLIERS[match[2]]}" if match else value


def _unit(text: str, power: str | None) -> Unit | None:
    """The unit that a text names; None if it names none."""
    if "/" in text or " per " in text:
        return _ratio_of_units(text)
    words = re.sub(r"[.]", "", text.lower()).split()
    if not words or len(words) > 3 or not all(word.isalpha() for word in words) or not _NO_UNIT.isdisjoint(words):
        return None
    exponent = int(power or 1)
    if words[0] in ("square", "sq", "cubic", "cu") and len(words) > 1:
        exponent = 2 if words[0].startswith("s") else 3
        words = words[1:]
    name = " ".join(words)
    known = _UNITS.get(name) or _UNITS.get(name.removesuffix("s")) or _UNITS.get(name.removesuffix("es"))
    if known is None:
        singular = " ".join(word.removesuffix("s") for word in words)
        return Unit(UNKNOWN, exponent, singular)
    dimension = known.dimension if exponent == 1 else f"{known.dimension}^{exponent}"
    return Unit(dimension, Fraction(known.factor) ** exponent, known.name)


def _ratio_of_units(text: str) -> Unit | None:
    """`m/s` and `meters per second` by one name; no conversion."""
    parts = [_unit(part, None) for part in re.split(r"/| per ", text, maxsplit=1)]
    return Unit(UNKNOWN, 1, "/".join(part.name for part in parts if part is not None)) if None not in parts else None
