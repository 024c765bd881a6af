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
_GAP = r"(?:\\[,;:! ]|~|\s)*"
_IN_FONT = re.compile(rf"(.*[^\s\\]){_GAP}{_FONT}{_POWER}", re.DOTALL)
_BARE = re.compile(rf"(.*[\d}}])(?:{_GAP})([a-zA-Z][a-zA-Z.]*(?: [a-zA-Z.]+)?){_POWER}", re.DOTALL)
_WORD = re.compile(r"[a-z]{4,}")
_DEGREES = re.compile(r"(.*\S)\s*\^\s*\{?\s*\\circ\s*\}?", re.DOTALL)
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
    if match := _DEGREES.fullmatch(value):
        return match[1], _UNITS["degree"]
    match = _IN_FONT.fullmatch(value) or _bare_unit(value)
    if match is None:
        scaled = _multiplied(value)
        return scaled, None if scaled == value else _COUNT
    unit = _unit(match[2], match[3]) if re.search(r"\d|\\pi|\^", match[1]) else None
    words = match[2].lower().split()
    if words and words[0] in _MULTIPLIERS:
        scaled = rf"{match[1]} \times {_MULTIPLIERS[words[0]]}"
        return scaled, _unit(" ".join(words[1:]), match[3]) or _COUNT
    return (value, None) if unit is None else (match[1].removesuffix("\\").strip(), unit)


def _bare_unit(value: str) -> re.Match[str] | None:
    """`12 cm` without a font: known units of two letters or more, or words, because `3t` and `3abc` are products."""
    match = _BARE.fullmatch(value)
    unit = None if match is None or len(match[2]) == 1 else _unit(match[2], None)
    if match is None or unit is None or (unit.dimension == UNKNOWN and not _WORD.fullmatch(match[2])):
        return None
    return match


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
