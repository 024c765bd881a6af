"""Exceptions of the package.

Every class also inherits the matching built-in error, so that `except ValueError` keeps working in user code.
"""

import difflib
from collections.abc import Iterable


class SGOPDError(Exception):
    """Base class of all errors raised by this package."""


class SGOPDConfigError(SGOPDError, ValueError):
    """A setting, or a combination of settings, that cannot be honoured."""


class DataError(SGOPDError, ValueError):
    """A data set that lacks what the run needs: rows, columns, prompts or solutions."""


class TeacherError(SGOPDError, RuntimeError):
    """A teacher or reference that cannot score or generate what was asked of it."""


class VerifierError(SGOPDError, ValueError):
    """A verifier that cannot be asked, or that answers with something other than 1 (right), 0 (wrong) and None."""


class NonFiniteError(SGOPDError, ArithmeticError):
    """A NaN or an infinity that would have reached the optimizer or a checkpoint."""


class NonFiniteTeacherError(TeacherError, NonFiniteError):
    """A NaN or an infinity from a teacher or reference: as with any of their failures, the last step can be kept."""


class CheckpointError(SGOPDError, RuntimeError):
    """A checkpoint that cannot be written whole, or that is not whole any more."""


class PushError(SGOPDError, RuntimeError):
    """A Hub that did not take a finished student; all of its files are in the folder of the run."""


class RankError(SGOPDError, RuntimeError):
    """An error of another rank, which ends this one too.

    Attributes:
        kind: of error, and where, in a few words.
        checkpoint: whether it came of writing a checkpoint.
        told: whether all ranks have heard of it, in the same moment.
    """

    def __init__(self, message: str, *, kind: str, checkpoint: bool = False, told: bool = False) -> None:
        super().__init__(message)
        self.kind, self.checkpoint, self.told = kind, checkpoint, told


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean `...`?` with the nearest known name, to be put into a message; empty where none is near."""
    # A flag may be written with hyphens and a field has underscores: they are one name.
    spelt = {word.replace("-", "_"): word for word in known}
    # Lower than difflib's own 0.6, with which `epochs` does not find `num_train_epochs`.
    near = difflib.get_close_matches(name.replace("-", "_"), list(spelt), n=1, cutoff=0.5)
    return f" Did you mean `{spelt[near[0]]}`?" if near else ""
