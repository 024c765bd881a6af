r"""Kinds of answers on which math-verify alone is wrong, and what is asked of it instead.

math-verify drops what it has no place for: the base of `52_8`, the dots of `1,2,\ldots,n`, the unit of `12\text{ cm}`,
the text of a choice. Each rule here settles such a pair by its text, asks about a part of it, or abstains. A rule may
abstain too often; it must not say "right" without knowing.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from .notation import MAX_LENGTH, canonical, has_doubtful_float, plain, unwrapped
from .units import UNKNOWN, split_unit

Verdict = bool | None


class Question(NamedTuple):
    """A pair for math-verify, and what its answer means.

    Attributes:
        gold: of the pair, without `$` or box.
        answer: of the pair, likewise.
        equal: the verdict if the two are equal; None where math-verify does not see all that is written.
        different: the verdict if they differ.
    """

    gold: str
    answer: str
    equal: Verdict = True
    different: Verdict = False


class Settled(NamedTuple):
    """A verdict that needs no mathematics; None abstains."""

    verdict: Verdict


Outcome = Question | Settled

_RELATION = re.compile(
    r"\\(?:notin|in|not|ne|le|ge|subseteq|supseteq|subset|supset|parallel|perp|mid|nmid)(?![a-zA-Z])|[<>=]"
)
_RESIDUES = re.compile(r"\\mathbb\{Z\}_\{\d+\}")
_LETTER = re.compile(
    r"\(\s*(?P<a>[A-J])\s*\)[.:]?\s*(?P<a_text>.*)|(?P<b>[A-J])\s*[.):]\s+(?P<b_text>.+)|(?P<c>[A-J])\s*[.):]?",
    re.DOTALL,
)
_FONT = re.compile(r"\\(?:text|math|mbox)[a-z]*\s*\{")
_OPERATOR = ("+", "*", "/", "^", "_", "=", ",", "\\cdot", "\\times", "\\cup", "!", "<", ">")
_MORE_LETTERS = re.compile(r"(?:and|or|,|&|/)\s*\(?[A-J]\b")
# The letters under these signs are points in order, which math-verify multiplies.
_POINTS = re.compile(
    r"\\(?:triangle|angle|overline|overrightarrow|overleftrightarrow|widehat|vec|bar|odot)(?![a-zA-Z])"
)
_NAMES = re.compile(r"[A-Z]{3,}")
_BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "sixteen": 16,
}
_BASE = re.compile(rf"(\d[0-9A-Za-z]*|[A-F][0-9A-F]+)(?:_\{{?(?:base)?|\(?base)(\d{{1,2}}|{'|'.join(_BASES)})\}}?\)?")
_ANY_BASE = re.compile(r"\d\}?_")
_RATIO = re.compile(r"\d{1,9}(?::\d{1,9})+")
_CLOCK = re.compile(r"\d{1,2}:[0-5]\d")
_SET_BUILDER = re.compile(
    r"\\?\{\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\{?R\}?\s*)?(?:\\mid|\\vert|\\colon|\||:)(.*?)\\?\}", re.DOTALL
)
_PHRASE = re.compile(r"[A-Za-z][A-Za-z' ,.-]*")
_WORD = re.compile(r"[A-Za-z][a-z]{3}")
_PROSE = re.compile(r"(?<![a-zA-Z\\{])[a-zA-Z]{4,}(?![a-zA-Z}])")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_AFFIRMED = {"true": True, "yes": True, "false": False, "no": False}
# What math-verify drops or takes for another sign without a word.
_UNSEEN = (
    re.compile(r"'|\\prime"),  # f'(x) is read as f(x)
    re.compile(r"(?<![a-zA-Z])[fghFGH]\^\{-1\}"),  # f^{-1}(x) is read as 1/f(x)
    re.compile(r"\\Gamma"),  # as \gamma
    re.compile(r"\\Pi"),  # as \pi
    re.compile(r"\\overline|\\bar|\\vec|\\hat|\\tilde"),
    re.compile(r"\\(?:p?mod|bmod)"),
    re.compile(r"\\(?:gcd|lcm|operatorname\{lcm\})(?![^()]*\(\d+(?:,\d+)*\))"),  # \gcd(a,b) is read as 1
    re.compile(r"\\o?i+nt|\\partial|\\nabla"),
)


def decide(gold: str, answer: str, *, choices: bool = True) -> Outcome:
    r"""Says what is to be asked about a gold answer and an answer, both without `$` and box.

    Args:
        gold: what is right, not empty.
        answer: what was answered, not empty.
        choices: whether a letter may stand for a choice; not so within the text of one.

    Returns:
        The verdict where the texts tell; else a question for math-verify, in one way of writing.
    """
    if gold.strip() == answer.strip():
        return Settled(True)
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return Question(gold, answer)
    written, said = plain(gold), plain(answer)
    if written == said != "":
        return Settled(True)
    for rule in _RULES if choices else _RULES[1:]:
        outcome = rule(gold, answer)
        if outcome is not None:
            return outcome
    return _expressions(gold, answer)


def _choice(gold: str, answer: str) -> Outcome | None:
    r"""`(B)`, `\textbf{(B)}\ 12`, `B. 12`: letter or text of the choice tells; where they disagree, nothing does."""
    right, said = _letter_and_text(gold), _letter_and_text(answer)
    if right is None:
        # A letter of its own, and the text of the choice as gold: the text tells.
        return None if said is None or not said[1] else decide(gold, said[1], choices=False)
    letter, text = right
    if said is None:
        return decide(text, answer, choices=False) if text else _lone_letter(gold, letter, answer)
    if said[0] != letter:
        return Settled(False)
    if text and said[1]:
        inner = decide(text, said[1], choices=False)
        return Settled(inner.verdict or None) if isinstance(inner, Settled) else inner._replace(different=None)
    return Settled(True)


def _lone_letter(gold: str, letter: str, answer: str) -> Outcome | None:
    bare = plain(answer).strip("().:")
    marked = plain(gold) != letter or _FONT.search(gold) is not None
    if bare == letter.lower():
        # Without brackets B may be a variable, which b is not.
        return Settled(True if marked else None)
    return Settled(False) if marked else None


def _letter_and_text(text: str) -> tuple[str, str] | None:
    shown = unwrapped(canonical(text))
    match = _LETTER.fullmatch(shown)
    if match is None:
        return None
    letter = match["a"] or match["b"] or match["c"]
    rest = (match["a_text"] or match["b_text"] or "").strip()
    if _MORE_LETTERS.match(rest):
        return None
    # (A)+1 and (A,B) are mathematics; a choice in a font is not.
    if rest.startswith(_OPERATOR) and not _FONT.match(text.strip().lstrip("$")):
        return None
    return letter, rest


def _opposite(gold: str, answer: str) -> Outcome | None:
    r"""`a \notin A` and `a \in A`: the same statement with another relation is another statement."""
    # Before spaces go: behind `\in` one keeps the next letter away.
    texts = [unwrapped(canonical(text)) for text in (gold, answer)]
    right, said = ("".join(_RELATION.sub("?", text).split()) for text in texts)
    if right == said and "?" in right:
        return Settled(False)
    return Settled(False) if all(_RESIDUES.fullmatch(text) for text in texts) else None


def _base(gold: str, answer: str) -> Outcome | None:
    """Digits with a base: the same digits in another base are another number."""
    texts = plain(gold), plain(answer)
    right, said = (_in_base(text) for text in texts)
    if right and said:
        if right[1] == said[1]:
            return Settled(right[2] == said[2])
        return Settled(None if right[2] == said[2] else False)  # the right number, perhaps not as asked
    if right:
        # The problem names the base: an answer may leave it out.
        return Settled(texts[1].upper() == right[0].upper() if texts[1].isalnum() else None)
    if said:
        if not texts[0].isdigit():
            return Settled(None)
        if said[1] == 10:
            return Settled(said[2] == int(texts[0]))
        return Settled(None if int(texts[0]) == said[2] or texts[0] == said[0] else False)
    return Settled(None) if any(_ANY_BASE.search(text) for text in texts) else None


def _in_base(text: str) -> tuple[str, int, int] | None:
    """Digits, base and value."""
    match = _BASE.fullmatch(text)
    if match is None:
        return None
    base = _BASES.get(match[2]) or int(match[2])
    try:
        return match[1], base, int(match[1], base)
    except ValueError:
        return None


def _dots(gold: str, answer: str) -> Outcome | None:
    r"""`1,2,\ldots,n` is neither `1,2,n` nor the sum of anything; dots between whole numbers are filled in."""
    texts = [canonical(gold), canonical(answer)]
    if not any(r"\ldots" in text for text in texts):
        return None
    filled = [_filled_in(text) for text in texts]
    if not any(r"\ldots" in text for text in filled):
        return Question(filled[0], filled[1])
    if all(r"\ldots" in text for text in filled):
        # math-verify sees no dots: what it finds different differs, what it finds equal may not be.
        first, second = (text.replace(r"\ldots", r"\text{dots}") for text in filled)
        return Question(first, second, equal=None)
    return Settled(False if all("," in text for text in filled) else None)


def _filled_in(text: str) -> str:
    inner = text.strip().lstrip("\\{([").rstrip("\\})]").strip()
    items = [item.strip() for item in inner.split(",")]
    if items.count(r"\ldots") != 1 or not all(re.fullmatch(r"-?\d{1,6}", item) for item in items if item != r"\ldots"):
        return text
    place = items.index(r"\ldots")
    before, after = [int(item) for item in items[:place]], [int(item) for item in items[place + 1 :]]
    if not before or not after:
        return text
    step = before[1] - before[0] if len(before) > 1 else 1
    if step == 0 or (after[0] - before[-1]) % step or not 0 < (after[0] - before[-1]) // step <= MAX_LENGTH:
        return text
    whole = [*range(before[0], after[0], step), *after]
    return text.replace(inner, ",".join(map(str, whole))) if whole[: len(before)] == before else text


def _ratio(gold: str, answer: str) -> Outcome | None:
    """`1:2:3` is not the number 1/6, and 10:30 may be a time."""
    texts = plain(gold), plain(answer)
    matches = [_RATIO.fullmatch(text) is not None for text in texts]
    if not any(matches):
        return None
    if not all(matches):
        text = texts[matches.index(True)]
        return Settled(None) if text.count(":") > 1 or _CLOCK.fullmatch(text) else None
    right, said = ([int(part) for part in text.split(":")] for text in texts)
    if right == said:
        return Settled(True)
    if any(re.search(r":0|^0", text) for text in texts):
        return Settled(False)  # no part of a ratio is 0 or starts with it: times
    same = len(right) == len(said) and all(a * said[0] == b * right[0] for a, b in zip(right, said, strict=True))
    clock = any(_CLOCK.fullmatch(text) for text in texts)
    return Settled((None if clock else True) if same else False)


def _words(gold: str, answer: str) -> Outcome | None:
    """Words are compared as words; a product of their letters, as math-verify reads them, is the same for anagrams."""
    right, said = _phrase(gold), _phrase(answer)
    if right is None and said is None:
        # Prose around mathematics: which part of it is the answer?
        return Settled(None) if _PROSE.search(unwrapped(canonical(gold))) and not split_unit(gold)[1] else None
    if right is None or said is None:
        return _number_word(right, gold, said, answer)
    if right == said:
        return Settled(True)
    if right in _AFFIRMED and said in _AFFIRMED:
        return Settled(None if _AFFIRMED[right] == _AFFIRMED[said] else False)
    one_word = " " not in right and " " not in said
    return Settled(False if one_word and sorted(right) != sorted(said) else None)


def _number_word(right: str | None, gold: str, said: str | None, answer: str) -> Outcome:
    if right in _NUMBERS:
        return Question(str(_NUMBERS.index(right)), canonical(answer))
    if said in _NUMBERS:
        return Question(canonical(gold), str(_NUMBERS.index(said)))
    phrase = said if right is None else right
    # "no solution" and an empty set, "all reals" and R: several words may say what signs do.
    return Settled(None if phrase is not None and " " in phrase else False)


def _phrase(text: str) -> str | None:
    shown = unwrapped(canonical(text)).strip(" .\"'")
    if _PHRASE.fullmatch(shown) is None:
        return None
    marked = _FONT.search(text) is not None and len(shown) > 1
    if not marked and shown.lower() not in _AFFIRMED and not _WORD.search(shown) and shown.lower() not in _NUMBERS:
        return None
    words = re.sub(r"[,.-]", " ", shown.lower()).split()
    return " ".join(word for word in words if word not in ("the", "a", "an", "is", "are")) or None


def _units(gold: str, answer: str) -> Outcome | None:
    """A unit may be left out; another unit is another answer, unless the values agree in a common one."""
    (right, unit), (said, other) = split_unit(gold), split_unit(answer)
    if not unit and not other:
        return None
    if not unit or not other or unit == other:
        return _expressions(right, said)
    if UNKNOWN in (unit.dimension, other.dimension):
        # Two names may mean one thing; two values do not.
        outcome = _expressions(right, said)
        return Settled(outcome.verdict and None) if isinstance(outcome, Settled) else outcome._replace(equal=None)
    if unit.dimension != other.dimension:
        return Settled(False)
    factor = Fraction(other.factor) / Fraction(unit.factor)
    return Question(right, rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({said})")


def _expressions(gold: str, answer: str) -> Outcome:
    """What is left is mathematics, less what math-verify is known not to see."""
    texts = [_condition(canonical(text)) for text in (gold, answer)]
    if plain(texts[0]) == plain(texts[1]) != "":
        return Settled(True)
    if any(has_doubtful_float(text) for text in texts):
        return Settled(None)
    unseen = any(len(sign.findall(texts[0])) != len(sign.findall(texts[1])) for sign in _UNSEEN)
    ordered = all(_POINTS.search(text) or _NAMES.fullmatch(text) for text in texts)
    return Question(texts[0], texts[1], equal=None if unseen or ordered else True)


def _condition(text: str) -> str:
    r"""The condition x > 3 of the set `\{x \mid x > 3\}`, which math-verify does not read."""
    match = _SET_BUILDER.fullmatch(text)
    return match[2].strip() if match and match[1] in match[2] and _RELATION.search(match[2]) else text


# In this order: a later rule may rely on what the earlier ones have taken away.
_RULES: tuple[Callable[[str, str], Outcome | None], ...] = (_choice, _opposite, _base, _dots, _ratio, _units, _words)
