"""Whether two models mean the same thing by a token id."""

import logging
from typing import Any

from ..errors import TeacherError

logger = logging.getLogger(__name__)

_SHOWN = 5


def check_tokenizers(student: Any, other: Any, role: str) -> None:
    """Refuse a model whose tokenizer maps tokens to other ids than the student's, or ends a turn with another token.

    Only token ids are ever exchanged, so that different vocabularies would be compared without any error.

    Raises:
        TeacherError: lists the first differences.
    """
    own, theirs = student.get_vocab(), other.get_vocab()
    different = sorted(token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token))
    if different:
        shown = ", ".join(f"{token!r}: {own.get(token)} and {theirs.get(token)}" for token in different[:_SHOWN])
        raise TeacherError(
            f"The {role}'s tokenizer must map tokens to the student's ids, got {len(different)} differences (student "
            f"and {role}): {shown}. Log-probs of the same id would belong to different tokens. Choose a {role} of the "
            "student's family."
        )
    if student.eos_token_id != other.eos_token_id:
        raise TeacherError(
            f"The {role}'s end token must be the student's, got {other.eos_token!r} ({other.eos_token_id}) and "
            f"{student.eos_token!r} ({student.eos_token_id}). The {role} would call every finished rollout wrong. Use "
            "two models of one kind (both base or both chat), or set `eos_token` of the tokenizer you pass."
        )


def check_vocabulary_sizes(tokenizer: Any, vocab_size: int, role: str) -> None:
    """For a model that came without a tokenizer: it must at least have all ids; the rest is the caller's word.

    Raises:
        TeacherError: the model has fewer ids than the student's tokenizer.
    """
    if vocab_size < len(tokenizer):
        raise TeacherError(
            f"The {role} must have all {len(tokenizer)} ids of the student's tokenizer, got a vocabulary of "
            f"{vocab_size}. Ids from there on cannot be scored. Choose a {role} of the student's family."
        )
    logger.warning(
        "The %s was given as a model, without a tokenizer: that its %d ids mean the student's tokens is taken on "
        "trust. Pass the model's path to have it checked; for a teacher, `teacher_processing_class` does it too.",
        role,
        vocab_size,
    )
