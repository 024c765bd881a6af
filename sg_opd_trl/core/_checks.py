"""What the functions of the core expect, declared beside their equations and checked before them.

Of tensors kind, dtype, rank and shape, never values: nothing waits for a GPU, and the meta device works.
"""

import functools
import inspect
import math
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
#: Raises, or returns nothing, for an argument's name and value.
Check = Callable[[str, Any], None]


def checked(**expected: str | Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check the arguments of a function before its first line.

        @checked(student_logps="float B T", mask="any B T", kept="any B like mask", norm=one_of("sequence", "none"))

    A tensor is declared as `kind dims`, in the notation of the docstrings:

    - kind: `float`, `int`, `any` (masks and gates come as bool, int or float), or `const`: a `float` that the equation
      takes as it is, and that reaches it without its gradient and in float32 at least;
    - dims: the first declaration of `B T` fixes its rank, all others must have that tensor's shape. `B` are the rows
      of a `B T`, `B T` the positions of a `B T V`; `B|B T` allows both; `...` allows any shape;
    - `like NAME`: the tensor to be compared with, where that is not the first one declared.

    Anything else is declared by a function such as `number`. None is let through where the annotation has it, as is a
    number for a tensor where the annotation has `float`. Arguments that are left out keep their default unchecked.

    Args:
        **expected: parameter -> what it has to be, in the order of checking.

    Returns:
        The decorator. Signature, docstring and types stay those of the function.

    Raises:
        TypeError: When decorating: a name is no parameter, or a tensor was forgotten. When called: an argument is of
            the wrong kind or dtype.
        ValueError: When called: a rank, shape, number or name is out of range.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        _check_declarations(function.__qualname__, parameters, expected)
        names = [name for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL]
        variadic = next((name for name, p in parameters.items() if p.kind is p.VAR_POSITIONAL), None)
        # Where there are `*weights`, the names after them can only come as keywords.
        positional = names if variadic is None else list(parameters)[: list(parameters).index(variadic)]
        checks = _compiled(parameters, expected)
        constants = {name for name, declared in expected.items() if str(declared).startswith("const ")}

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            given = dict(zip(positional, args, strict=False))
            given.update(kwargs)
            for name, check in checks:
                if name in given:
                    check(name, given[name], given)
                elif name == variadic:
                    for value in args[len(positional) :]:
                        check(name, value, given)
            if not constants:
                return function(*args, **kwargs)
            first = [constant(v) if name in constants else v for name, v in zip(positional, args, strict=False)]
            named = {name: constant(v) if name in constants else v for name, v in kwargs.items()}
            # The checker of types cannot follow arguments that are handed on one by one.
            handed_on: Any = function
            return handed_on(*first, *args[len(first) :], **named)

        return wrapper

    return decorate


def number(low: float = -math.inf, high: float = math.inf, *, reason: str) -> Check:
    """A finite number in `[low, high]`; the reason is the end of the message, with the way out."""

    def check(name: str, value: float) -> None:
        if not (math.isfinite(value) and low <= value <= high):
            if math.isinf(low):
                bounds = "finite"
            else:
                bounds = f"in [{low}, {high}]" if math.isfinite(high) else f">= {low} and finite"
            raise ValueError(f"`{name}` must be {bounds}, got {value}. {reason}")

    return check


def positive(*, reason: str) -> Check:
    """A finite number above zero."""

    def check(name: str, value: float) -> None:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be > 0 and finite, got {value}. {reason}")

    return check


def one_of(*choices: str) -> Check:
    """One of the given names."""

    def check(name: str, value: str) -> None:
        if value not in choices:
            raise ValueError(
                f"`{name}` must be one of {', '.join(choices)}, got {value!r}. Each name is another equation. Set "
                f"`{name}` to one of them."
            )

    return check


def constant(value: Any) -> Any:
    """A tensor without its gradient, in float32 or wider; anything else as it is.

    Half precision would lose the small differences of large log-probs that everything here is about.
    """
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def require_shape(name: str, tensor: Tensor, other: str, shape: tuple[int, ...]) -> None:
    """Require a shape, without broadcasting; `other` says whose it is.

    Raises:
        ValueError: The tensor has another one.
    """
    if tensor.shape != shape:
        raise ValueError(
            f"`{name}` must have the shape of `{other}` {tuple(shape)}, got {tuple(tensor.shape)}. Entries are "
            f"matched one to one, without broadcasting. Set both to the same rows and columns."
        )


# --- tensors ---------------------------------------------------------------------------------------------------------
class _Tensor(NamedTuple):
    """One declared tensor.

    Attributes:
        kind: `float`, `int` or `any`.
        ranks: that are allowed; empty for all.
        like: the tensor whose leading dimensions it has; None for the first one, which has only its rank.
        whose: how the message calls these dimensions.
        others: types that may come in place of a tensor.
    """

    kind: str
    ranks: tuple[int, ...]
    like: str | None
    whose: str
    others: tuple[type, ...]

    def require(self, name: str, value: Any, given: dict[str, Any]) -> None:
        if not isinstance(value, Tensor):
            if isinstance(value, self.others):
                return
            raise TypeError(
                f"`{name}` must be a torch.Tensor, got {type(value).__name__}. The equations are vectorised. Set it "
                f"to `torch.as_tensor({name})`."
            )
        if self.kind != "any":
            self._check_dtype(name, value)
        rank = value.dim()
        # What holds real numbers is told about a wrong rank first; a mask is told whose shape it should have.
        if self.like in given and (rank in self.ranks or self.kind != "float"):
            leading = rank if rank in self.ranks else self.ranks[0]
            require_shape(name, value, self.whose, given[self.like].shape[:leading])
        elif self.ranks and rank not in self.ranks:
            raise ValueError(
                f"`{name}` must have {self.ranks[0]} dimension(s), got shape {tuple(value.shape)}. The first is "
                f"completions, the second tokens. Set its shape with `reshape` or `unsqueeze`."
            )

    def _check_dtype(self, name: str, value: Tensor) -> None:
        floating = value.is_floating_point()
        if self.kind == "float" and not floating:
            raise TypeError(
                f"`{name}` must have a floating dtype, got {value.dtype}. It holds real numbers. Set it to "
                f"`{name}.float()`."
            )
        if self.kind == "int" and (floating or value.is_complex() or value.dtype == torch.bool):
            raise TypeError(
                f"`{name}` must have an integer dtype, got {value.dtype}. It holds whole numbers. Set it to "
                f"`{name}.long()`."
            )


#: A check that sees the other arguments too.
_Compiled = Callable[[str, Any, dict[str, Any]], None]


def _compiled(
    parameters: typing.Mapping[str, inspect.Parameter], expected: dict[str, str | Check]
) -> list[tuple[str, _Compiled]]:
    """The checks in their order; what a declaration means is worked out here, once per function."""
    checks: list[tuple[str, _Compiled]] = []
    dims_of: dict[str, list[str]] = {}
    for name, declared in expected.items():
        others = tuple(kind for kind in _annotated(parameters[name]) if kind is not Tensor)
        if not isinstance(declared, str):
            checks.append((name, _value_check(declared, type(None) in others)))
            continue
        declared, _, owner = declared.partition(" like ")
        kind, _, dims = declared.partition(" ")
        kind = "float" if kind == "const" else kind
        if float in others:
            others = (*others, int)
        shapes = [] if dims == "..." else [shape.split() for shape in dims.split("|")]
        fits = [other for other, wide in dims_of.items() if shapes and wide[: len(shapes[-1])] == shapes[-1]]
        like = owner or next(iter(fits), None)
        if like is not None and like not in dims_of:
            raise TypeError(f"`{name}` is declared like `{like}`, which is not declared before it or may be None.")
        whose = "" if like is None else _whose(like, len(dims_of[like]), [len(shape) for shape in shapes])
        check = _Tensor(kind, tuple(map(len, shapes)), like, whose, others)
        checks.append((name, check.require))
        if len(shapes) == 1 and type(None) not in others:
            dims_of[name] = shapes[0]
    return checks


def _value_check(check: Check, optional: bool) -> _Compiled:
    """A check of one value as one that sees the other arguments too; lets None through where it may be None."""

    def check_value(name: str, value: Any, given: dict[str, Any]) -> None:
        if value is not None or not optional:
            check(name, value)

    return check_value


def _whose(like: str, wide: int, ranks: list[int]) -> str:
    """How a message calls the leading dimensions of another argument."""
    if len(ranks) > 1:
        return f"{like} (one per row or per token)"
    return like if ranks == [wide] else f"the rows of {like}" if ranks == [1] else f"the positions of {like}"


def _annotated(parameter: inspect.Parameter) -> tuple[Any, ...]:
    """The types of a parameter: those of a union, or the one."""
    return typing.get_args(parameter.annotation) or (parameter.annotation,)


def _check_declarations(
    function: str, parameters: typing.Mapping[str, inspect.Parameter], expected: dict[str, str | Check]
) -> None:
    """Refuse, at import, a declaration that would check nothing, and a tensor that nobody checks."""
    if unknown := [name for name in expected if name not in parameters]:
        raise TypeError(f"`{function}` has no parameter {', '.join(unknown)}, but @checked declares it.")
    tensors = [name for name, parameter in parameters.items() if Tensor in _annotated(parameter)]
    if forgotten := [name for name in tensors if name not in expected]:
        raise TypeError(f"@checked of `{function}` does not declare the tensor(s) {', '.join(forgotten)}.")
