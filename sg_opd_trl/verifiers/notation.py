r"""One way of writing for every answer: `canonical` changes how LaTeX is written, never what it says.

math-verify reads only part of the LaTeX that people and models write: it takes `\frac12` for nothing and `1\,000` for
a product. What it cannot read it may read wrongly, so both gold and answer are rewritten before they reach it.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

# Answers are short. What is longer is a text or an attack, and rewriting it would take time for nothing.
MAX_LENGTH = 2000
_MAX_DEPTH = 20  # of commands inside the arguments of commands, far below Python's own limit

_SIGNS = {
    "−": "-",
    "–": "-",
    "’": "'",
    "′": "'",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": r"\div ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "±": r"\pm ",
    "°": r"^\circ ",
    "²": "^2",
    "³": "^3",
    "…": r"\ldots ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "½": r"\frac{1}{2}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
}
_SYMBOLS: dict[int, int | str] = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # full-width forms of ASCII
    **{ord(space): " " for space in "\u3000\u00a0\u2009\u202f\u2007"},
    **{ord(sign): written for sign, written in _SIGNS.items()},
}
# `\left(` is a size, `\leftarrow` is not: hence the look-aheads.
_LOOKS = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big)(?![a-zA-Z])\.?|\\(?:displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])"
)
_FRACTION_SIZE = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_MATH_SIGNS = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_CURRENCY = re.compile(r"\\\$")
_ONE_LETTER = re.compile(r"\\(?:mathrm|operatorname|mathit|rm)\s*\{\s*([a-zA-Z])\s*\}")
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|gcd|min|max|det"
_NAMED_FUNCTION = re.compile(rf"\\(?:operatorname|mathrm|text)\*?\s*\{{\s*({_FUNCTIONS}|lg)\s*\}}")
_BARE_FUNCTION = re.compile(rf"(?<![a-zA-Z\\])({_FUNCTIONS}|sqrt)(?=\s*\()")
_BARE_CONSTANT = re.compile(r"(?<![a-zA-Z\\])(pi|infinity|infty)(?![a-zA-Z])")
_EMPTY_SET = re.compile(r"\\varnothing(?![a-zA-Z])")
# `1\,000`, `1 000`, `1{,}000`, `1,\!000`: groups of three digits behind any sign that separates nothing else. A bare
# comma is left alone here, since 100,200 may be a list.
_DIGIT_GAP = r"(?:\\[,;:! ]|~|\{,\}|,\\!|\\thinspace\s*| )"
_GROUPED = re.compile(rf"(?<![\d.,_^])\d{{1,3}}(?:{_DIGIT_GAP}\s?\d{{3}})+(?!\d)")
_GAP = re.compile(_DIGIT_GAP + r"\s?")
_REPEATING = re.compile(r"(?<![\d.])(\d{0,15})\.(\d{0,15})\\(?:overline|bar|dot)\s*(?:\{(\d{1,15})\}|(\d))(?!\d)")
_LEADING_POINT = re.compile(r"(?<![\d.\w}])\.(?=\d)")
_FLOAT = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?)[eE]([+-]?)(\d{1,3})(?![\w.^])")
_DOTS = re.compile(r"\\[lcdv]?dots[a-z]?(?![a-zA-Z])|\.\.\.")
_SLANTED = re.compile(r"\\([lgn]e)(?:q|qslant)?(?![a-zA-Z])")
_RESIDUES = re.compile(r"\\mathbb\s*\{?Z\}?\s*(?:/\s*\(?\s*(\d+)\s*\\mathbb\s*\{?Z\}?\)?|_\s*\{?(\d+)\}?)")
_ARGUMENTS = {"frac": 2, "binom": 2, "sqrt": 1}
_TAKES_ARGUMENTS = re.compile(r"\\(frac|binom|sqrt)(?![a-zA-Z])")
_COMMAND = re.compile(r"\\(?:[a-zA-Z]+|.)", re.DOTALL)
_INDEX = re.compile(r"\s*(\[[^\[\]]*\])")
_BRACKET = re.compile(r"\\.|[{}()]", re.DOTALL)
_OPENING = {"}": "{", ")": "("}


# Every rule asks for the same few texts.
@lru_cache(maxsize=256)
def canonical(text: str) -> str:
    r"""Rewrites an answer so that math-verify reads all of it.

    Math signs and sizes go; digits in groups are joined (not at a bare comma); arguments get their braces (`\frac12`);
    named functions and constants become commands; Python's `1e-05` and repeating decimals become fractions or powers.

    Args:
        text: an answer or a gold answer, without its box.

    Returns:
        The rewritten text; the text itself where it is too long for an answer.
    """
    if len(text) > MAX_LENGTH:
        return text
    text = _MATH_SIGNS.sub("", _CURRENCY.sub("", text.translate(_SYMBOLS)))
    text = _FRACTION_SIZE.sub(r"\\frac", _LOOKS.sub("", text))
    text = _NAMED_FUNCTION.sub(r"\\\1 ", _ONE_LETTER.sub(r"\1", text))
    text = _BARE_CONSTANT.sub(_constant, _BARE_FUNCTION.sub(r"\\\1", text))
    text = _DOTS.sub(r"\\ldots ", _SLANTED.sub(r"\\\1 ", text))
    text = _EMPTY_SET.sub(r"\\emptyset", text)
    text = _GROUPED.sub(lambda match: _GAP.sub("", match.group()), text)
    text = _LEADING_POINT.sub("0.", text)
    text = _FLOAT.sub(_power_of_ten, _REPEATING.sub(_repeating_decimal, text))
    text = _RESIDUES.sub(lambda match: rf"\mathbb{{Z}}_{{{match[1] or match[2]}}}", text)
    return braced(text).strip().removesuffix(".").strip()


def _constant(match: re.Match[str]) -> str:
    return r"\pi " if match.group() == "pi" else r"\infty "


def _power_of_ten(match: re.Match[str]) -> str:
    number, sign, digits = match.groups()
    if is_float_text(number, sign, digits):
        return rf"{number} \times 10^{{{'-' if sign == '-' else ''}{int(digits)}}}"
    return match.group()


def is_float_text(number: str, sign: str, digits: str) -> bool:
    """Whether 1e-05 is a number that a program printed, and not Euler's number in "3e-5".

    Programs write an exponent of two digits or with a plus, a decimal point or a 1 alone before it; who means Euler's
    number writes none of these.
    """
    return len(digits) > 1 or "." in number or number == "1" or sign == "+"


def has_doubtful_float(text: str) -> bool:
    """Whether a text such as "3e-5" stays that may be 0.00003 or 3e - 5."""
    return any(not is_float_text(*match.groups()) for match in _FLOAT.finditer(text))


def _repeating_decimal(match: re.Match[str]) -> str:
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    nines = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
    value = Fraction(f"{whole}.{fixed or 0}") + nines
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def braced(text: str) -> str:
    r"""Puts braces around the arguments of `\frac`, `\binom` and `\sqrt` as TeX reads them.

    `\frac12` is `\frac{1}{2}` and `\sqrt23` is `\sqrt{2}3`. Beyond TeX, an argument that is itself such a command
    takes its own arguments along (`\frac\sqrt32`), and `\sqrt(x+1)` takes the whole bracket.
    """
    return _braced(text, 0, len(text), _partners(text), 0)


def _partners(text: str) -> dict[int, int]:
    """Where each bracket closes, found in one pass: nothing kills this process if a text made for it takes long."""
    partners: dict[int, int] = {}
    opened: dict[str, list[int]] = {"{": [], "(": []}
    for match in _BRACKET.finditer(text):
        sign = match.group()
        if sign in opened:
            opened[sign].append(match.start())
        elif sign in _OPENING and opened[_OPENING[sign]]:
            partners[opened[_OPENING[sign]].pop()] = match.start()
    return partners


def _braced(text: str, start: int, end: int, partners: dict[int, int], depth: int) -> str:
    done, place = [], start
    while match := _TAKES_ARGUMENTS.search(text, place, end):
        done.append(text[place : match.start()])
        # All arguments are found before any is rewritten, so that a missing one costs no work twice.
        spans = _arguments(text, match, end, partners, depth)
        place = match.end()
        if spans:
            index = _INDEX.match(text, place, end) if match[1] == "sqrt" else None
            written = ["{" + _braced(text, *span, partners, depth + 1) + "}" for span, _ in spans]
            done += [f"\\{match[1]}", index[1] if index else "", *written]
            place = spans[-1][1]
        else:
            done.append(match.group())
    return "".join([*done, text[place:end]])


# Where the inside of an argument starts and ends, and where reading goes on.
_Span = tuple[tuple[int, int], int]


def _arguments(text: str, match: re.Match[str], end: int, partners: dict[int, int], depth: int) -> list[_Span] | None:
    """The arguments of the command at `match`; None if one is missing or they are nested too deeply."""
    place = match.end()
    if match[1] == "sqrt" and (index := _INDEX.match(text, place, end)):
        place = index.end()
    spans = []
    for _ in range(_ARGUMENTS[match[1]]):
        span = _argument(text, place, end, partners, depth, bracket=match[1] == "sqrt")
        if span is None:
            return None
        spans.append(span)
        place = span[1]
    return spans


def _argument(text: str, place: int, end: int, partners: dict[int, int], depth: int, *, bracket: bool) -> _Span | None:
    while place < end and text[place].isspace():
        place += 1
    if place >= end or text[place] in "}&^_=" or depth > _MAX_DEPTH:
        return None
    if text[place] == "{" or (text[place] == "(" and bracket):
        close = partners.get(place, end)
        return None if close >= end else ((place + 1, close), close + 1)
    if inner := _TAKES_ARGUMENTS.match(text, place, end):
        spans = _arguments(text, inner, end, partners, depth + 1)
        return None if spans is None else ((place, spans[-1][1]), spans[-1][1])
    command = _COMMAND.match(text, place, end)
    after = command.end() if command else place + 1
    return (place, after), after


def closing(text: str, start: int, opening: str = "{", close: str = "}") -> int | None:
    r"""Where the bracket that was opened just before `start` closes; `\{` and `\}` do not count. None: it does not."""
    depth = 1
    for match in re.compile(rf"\\.|[{re.escape(opening + close)}]", re.DOTALL).finditer(text, start):
        depth += {opening: 1, close: -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}"
)
_SPACING = re.compile(r"\\[,;:!]|\\\s|~|\\q?quad(?![a-zA-Z])")
# Between two digits a space separates numbers.
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_SINGLE_BRACES = re.compile(r"([_^])\s*\{([a-zA-Z0-9])\}")


def plain(text: str, replaced: Callable[[str], str] = canonical) -> str:
    """What `canonical` leaves, without fonts, spacing and needless braces: two equal results say the same."""
    text = _SINGLE_BRACES.sub(r"\1\2", _SPACING.sub(" ", _WRAPPER.sub(r"\1", replaced(text))))
    return _SPACE.sub("", text).removesuffix(".")


def unwrapped(text: str) -> str:
    r"""The text without font commands: `\textbf{(B)}\ 12` is `(B) 12`."""
    return _SPACING.sub(" ", _WRAPPER.sub(r"\1", text)).strip()
