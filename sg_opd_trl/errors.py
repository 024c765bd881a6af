"""Exceptions of the package.

Every class also inherits the matching built-in error, so that `except ValueError` keeps working in user code.
"""


class SGOPDError(Exception):
    """Base class of all errors raised by this package."""


class SGOPDConfigError(SGOPDError, ValueError):
    """A setting, or a combination of settings, that cannot be honoured."""


class DataError(SGOPDError, ValueError):
    """A data set that lacks what the run needs: rows, columns, prompts or solutions."""


class TeacherError(SGOPDError, RuntimeError):
    """A teacher or reference that cannot score or generate what was asked of it."""


class VerifierError(SGOPDError, ValueError):
    """A verifier that answered with something other than 1 (right), 0 (wrong) or None (no verdict)."""


class NonFiniteError(SGOPDError, ArithmeticError):
    """A NaN or an infinity that would have reached the optimizer or a checkpoint."""
