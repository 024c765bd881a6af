"""The judging child process: JSON lines in, JSON lines out, one process per judge.

It is started as a file, so that a main script without a `__main__` guard, a notebook or a process that already uses a
GPU can start it. It imports the standard library and math-verify only, neither the package nor torch.

Protocol. Argument 1 is JSON: `path` (entries appended to `sys.path`), `cpu_limit` (seconds per item), `memory_limit`
(bytes). The child answers `{"ready": true}` or `{"ready": false, "error": ...}`, then one line
`{"id", "verdict", "reason", "answer"}` per line `{"id", "gold", "answer"}`, in order, until its input ends.

An item that uses up its processor time ends the process: the default action of SIGPROF works inside long C calls too,
no `except` of a library can swallow it and no half-finished sympy state outlives it. It also ends a child whose parent
has gone. Processor time, not wall-clock time, so that a busy machine does not change verdicts.
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

MAX_SHOWN_CHARACTERS = 200
# No core dump of a killed child, no file written, no process started: an answer is text that strangers wrote.
_RESOURCE_LIMITS = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NPROC: 0}

Verdict = tuple[bool | None, str, str]


def build_judge() -> Callable[[str, str], Verdict]:
    r"""Imports math-verify and returns the function that judges one answer.

    Texts are found by the rules of TRL's `accuracy_reward`: LaTeX only, the box first, no guess without an anchor such
    as "the answer is". Unlike there upper and lower case are two variables, no unit is cut off (`3t` is not 3), a gold
    text is read as a whole or not at all, intervals equal inequalities, and "equal" is checked once more by numbers,
    because math-verify rounds. Its own time limits are off, because SIGPROF bounds the item.

    Returns:
        A function of the gold text and the answer text that returns (verdict, reason, extracted answer). The verdict
        is `None` with reason "gold" if the gold text holds no mathematical expression, and with reason "unsure" if the
        two are equal as far as math-verify rounds and no further.

    Raises:
        ImportError: If math-verify is not installed.
    """
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.grader import should_treat_as_complex

    logging.disable(logging.CRITICAL)  # math-verify logs every answer that it cannot parse
    normalization = NormalizationConfig()
    conversion = ConversionConfig(lowercase_symbols=False)
    finding = LatexExtractionConfig(
        normalization_config=normalization, boxed_match_priority=0, try_extract_without_anchor=False
    )

    def find(text: str) -> str:
        if (whole := _whole(text.strip())) is not None:
            return normalize_latex(whole, normalization).strip()
        found = parse(text, extraction_config=[finding], extraction_mode="first_match", parsing_timeout=None)
        return next((item for item in found if isinstance(item, str)), "")

    def read(text: str) -> Any:
        for part in dict.fromkeys((text, _last_side(text))):
            try:
                return latex2sympy(
                    part,
                    is_real=not should_treat_as_complex(part),
                    convert_degrees=False,
                    normalization_config=None,
                    conversion_config=conversion,
                )
            except MemoryError:
                raise
            except Exception:  # noqa: BLE001  # The parser itself raises `Exception` on what it cannot read.
                continue
        return None

    def judge(gold: str, answer: str) -> Verdict:
        gold_read = read(find(gold))
        if gold_read is None:
            return None, "gold", ""
        found = find(answer)
        answer_read, shown = read(found), found[:MAX_SHOWN_CHARACTERS]
        if answer_read is None:
            return False, "", shown
        sides = _as_sets(gold_read), _as_sets(answer_read)
        equal = verify(*sides, timeout_seconds=None, allow_set_relation_comp=True)
        verdict = confirm(*sides) if equal else False
        return verdict, "unsure" if verdict is None else "", shown

    return judge


def _whole(text: str) -> str | None:
    """What stands between `$` and `$` or in a box, if that is all of the text."""
    if len(text) > 1 and text[0] == text[-1] == "$":
        inner = text[1:-1]
    elif text.startswith("\\boxed{") and text.endswith("}"):
        inner = text[len("\\boxed{") : -1]
    else:
        return None
    return None if "$" in inner or "\\boxed" in inner else inner


def _last_side(text: str) -> str:
    """The last side of a chain of equations, which is where an answer ends; the text itself if it is none."""
    sides = text.split("=")
    return text if len(sides) < 3 or any(sign in text for sign in ",;<>") else sides[-1]


def _as_sets(expression: Any) -> Any:
    """The union that "x < 2 or x > 3" means, which is read as a set of two inequalities; anything else as it is."""
    import sympy

    parts = expression.args if isinstance(expression, sympy.FiniteSet) else ()
    if len(parts) < 2 or not all(isinstance(part, sympy.Rel) and not isinstance(part, sympy.Eq) for part in parts):
        return expression
    if len({symbol for part in parts for symbol in part.free_symbols}) != 1:
        return expression
    try:
        return sympy.Union(*(part.as_set() for part in parts))
    except (NotImplementedError, TypeError, ValueError):
        return expression


# Of numbers that are equal, and of one written with six decimals or more, which is as far as math-verify looks.
_EXACT, _ROUNDED = 1e-13, 2e-6
_POINTS = ((17, 29), (7, 10), (-23, 11))


def confirm(gold: Any, answer: Any) -> bool | None:
    r"""Checks by numbers what math-verify found equal.

    It rounds to six decimals, cuts differences below 1e-15 to zero, and compares names without case, so that tiny
    numbers, `1.8782106` and `1.8782107`, or E and e are equal to it.

    Args:
        gold: the gold answer as sympy read it.
        answer: the answer, likewise.

    Returns:
        True: equal, or nothing to compute. False: certainly not. None: equal after rounding only.
    """
    import sympy

    if isinstance(gold, sympy.Symbol) or isinstance(answer, sympy.Symbol):
        return gold == answer or _right_side(gold) == _right_side(answer)
    if isinstance(gold, sympy.Interval) and isinstance(answer, sympy.Interval):
        return _all(confirm(*ends) for ends in ((gold.start, answer.start), (gold.end, answer.end)))
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return _all(confirm(*pair) for pair in zip(gold.flat(), answer.flat(), strict=True))
    if isinstance(gold, sympy.Tuple) and isinstance(answer, sympy.Tuple):
        return _all(confirm(*pair) for pair in zip(gold.args, answer.args, strict=True))
    if getattr(gold, "is_FiniteSet", False) and getattr(answer, "is_FiniteSet", False):
        return _all(_any(confirm(one, other) for other in answer.args) for one in gold.args)
    if isinstance(gold, sympy.Eq) and isinstance(answer, sympy.Eq) and not gold.free_symbols:
        # An equation of numbers is a statement: both sides count, in either order.
        straight, turned = ((answer.lhs, answer.rhs), (answer.rhs, answer.lhs))
        return _any(_all((confirm(gold.lhs, sides[0]), confirm(gold.rhs, sides[1]))) for sides in (straight, turned))
    gold, answer = (
        _right_side(side) if isinstance(other, sympy.Basic) and not isinstance(other, sympy.Eq) else side
        for side, other in ((gold, answer), (answer, gold))
    )
    if any(
        not isinstance(side, sympy.Basic) or isinstance(side, sympy.Rel | sympy.Set | sympy.Tuple)
        for side in (gold, answer)
    ):
        return True
    return _by_numbers(gold, answer)


def _right_side(expression: Any) -> Any:
    import sympy

    return expression.rhs if isinstance(expression, sympy.Eq) else expression


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    found = list(verdicts)
    return False if False in found else (None if None in found else True)


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    found = list(verdicts)
    return True if True in found else (None if None in found else False)


def _by_numbers(gold: Any, answer: Any) -> bool | None:
    """Compares two expressions at fixed points; a point at which one has no value does not count."""
    import sympy

    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    exact = answer if gold.has(sympy.Float) else gold
    # 1/2 needs no rounding: 0.5000001 is another number.
    ends = isinstance(exact, sympy.Rational) and 10**60 % exact.q == 0
    rounded = gold.has(sympy.Float) != answer.has(sympy.Float) and not ends
    verdicts = []
    for numerator, denominator in _POINTS if symbols else _POINTS[:1]:
        point = {symbol: sympy.Rational(numerator + 2 * place, denominator) for place, symbol in enumerate(symbols)}
        values = [_value(side, point) for side in (gold, answer)]
        if None not in values:
            verdicts.append(_close(*values, rounded=rounded))
    return _all(verdicts)


def _value(expression: Any, point: dict[Any, Any]) -> Any:
    try:
        value = expression.subs(point).doit().evalf(40)
        return value if value.is_number and value.is_finite else None
    except (AttributeError, ArithmeticError, NotImplementedError, TypeError, ValueError):
        return None


def _close(gold: Any, answer: Any, *, rounded: bool) -> bool | None:
    # 28% is 28 and 0.28 to math-verify, and people write all three.
    if gold == answer:
        return True
    gap = min(abs(gold - answer * scale) / max(abs(gold), abs(answer * scale)) for scale in (1, 100, 0.01))
    if gap <= (_ROUNDED if rounded else _EXACT):
        return True
    return None if rounded and gap < 1e-2 else False


def _reset_signals() -> None:
    # Ignored and blocked signals survive exec; an ignored SIGPROF would remove the time limit.
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Ctrl-C reaches the whole terminal group; the parent decides what becomes of the child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _limit_resources(memory_limit: int) -> None:
    for kind, wanted in {resource.RLIMIT_AS: memory_limit, **_RESOURCE_LIMITS}.items():
        hard = resource.getrlimit(kind)[1]
        bound = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(kind, (bound, bound))
        except (OSError, ValueError):
            continue  # A second line of defence: some platforms refuse, and the time limits do not depend on it.


def _private_output() -> int:
    """Moves the protocol away from descriptor 1, to which parser libraries print, and returns its new descriptor."""
    output = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    return output


def _send(output: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(output, data) :]


def serve(judge: Callable[[str, str], Verdict], output: int, cpu_limit: float) -> None:
    """Judges every line of standard input until it ends.

    Args:
        judge: the function of `build_judge`.
        output: descriptor that the replies are written to.
        cpu_limit: processor seconds that one item may use.
    """
    for line in sys.stdin.buffer:
        item = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_limit)
        try:
            verdict, reason, shown = judge(item["gold"], item["answer"])
        except MemoryError:
            verdict, reason, shown = None, "memory", ""
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(output, {"id": item["id"], "verdict": verdict, "reason": reason, "answer": shown})


def main() -> None:
    """Runs the child: sets it up, reports that it is ready, judges until the input ends."""
    settings = json.loads(sys.argv[1])
    output = _private_output()
    _reset_signals()
    sys.path.extend(entry for entry in settings["path"] if entry not in sys.path)
    try:
        judge = build_judge()
        judge("$1$", "\\boxed{1}")  # Builds parser tables, so that the first item does not pay for them.
    except ImportError as error:
        _send(output, {"ready": False, "error": str(error)})
        return
    os.dup2(1, 2)  # Parsers report every malformed answer on standard error.
    _limit_resources(settings["memory_limit"])
    try:
        _send(output, {"ready": True})
        serve(judge, output, settings["cpu_limit"])
    except BrokenPipeError:
        return  # The parent is gone.


if __name__ == "__main__":
    main()
