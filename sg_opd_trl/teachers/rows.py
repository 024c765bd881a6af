"""What a row of the data set says of its teacher: `teacher_id`, and `teacher_prompt` where the teacher reads another.

With a `teacher_prompt` the teacher scores the student's completion after a prompt of its own, privileged context for
instance, and writes its rollouts from it; student and reference keep `prompt`.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..data import TEACHER_ID, TEACHER_PROMPT, column_names, datasets_of, first_rows, is_stream
from ..data_rows import is_empty_prompt
from ..errors import DataError, SGOPDConfigError
from ..scoring import TokenBatch, pad_rows
from .base import Teacher
from .routed import RoutedTeacher, TeachersOfRows

logger = logging.getLogger(__name__)

Tokenize = Callable[[list], list[list[int]]]
_SHOWN = 5


def teacher_of(teacher: Teacher | RoutedTeacher, examples: Sequence[dict]) -> Teacher | TeachersOfRows:
    """The teacher of a batch made of these rows, in their order.

    Raises:
        DataError: a row that names no teacher of a `RoutedTeacher`.
    """
    if not isinstance(teacher, RoutedTeacher):
        return teacher
    return teacher.for_rows([example.get(TEACHER_ID) for example in examples])


def teacher_prompt_ids(examples: Sequence[dict], prompt_ids: Sequence[list[int]], tokenize: Tokenize) -> list[Any]:
    """Token ids of the prompts that the teacher reads, rendered as the student's are.

    Args:
        examples: rows of the data set.
        prompt_ids: the student's prompt of each row, which serves where there is no `teacher_prompt`.
        tokenize: prompts -> token ids.
    """
    own = [row for row, example in enumerate(examples) if example.get(TEACHER_PROMPT) is not None]
    result = list(prompt_ids)
    if own:
        for row, ids in zip(own, tokenize([examples[row][TEACHER_PROMPT] for row in own]), strict=True):
            result[row] = ids
    return result


def teacher_batch(batch: TokenBatch, examples: Sequence[dict], tokenize: Tokenize) -> TokenBatch:
    """The batch as the teacher reads it: the same completions, after its own prompts."""
    if all(example.get(TEACHER_PROMPT) is None for example in examples):
        return batch
    students = [ids[mask != 0].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    prompts = teacher_prompt_ids(examples, students, tokenize)
    ids, mask = pad_rows(prompts, 0, left=True, multiple=batch.multiple)
    device = batch.prompt_ids.device
    return replace(batch, prompt_ids=ids.to(device), prompt_mask=mask.to(device))


# --- before the run --------------------------------------------------------------------------------------------------
def check_teacher_columns(trainer: Any, teacher_ids: Sequence[str] | None) -> None:
    """Refuse data sets whose rows do not say what their teacher needs to know.

    Args:
        trainer: whose data sets are checked, those for evaluation only where the teacher takes part.
        teacher_ids: names of the teachers; None with a single one.

    Raises:
        DataError: a missing column, a name that no teacher has, or a prompt of another kind.
        SGOPDConfigError: a setting under which the columns would be ignored.
    """
    trained_on = [] if trainer.train_dataset is None else column_names(trainer.train_dataset)
    for column in [TEACHER_ID] * (teacher_ids is not None) + [TEACHER_PROMPT] * (TEACHER_PROMPT in trained_on):
        _check_setting(trainer, column)
    for name, dataset in datasets_of(trainer):
        if name != "train_dataset" and not trainer.args.eval_with_teacher:
            continue
        columns = column_names(dataset)
        if TEACHER_PROMPT in columns:
            _check_prompts(first_rows(dataset), name)
        if teacher_ids is not None:
            _check_names(dataset, columns, teacher_ids, name)
        elif TEACHER_ID in columns:
            logger.info("`%s` of %s is not used: there is one teacher.", TEACHER_ID, name)


def _check_setting(trainer: Any, column: str) -> None:
    refused = {
        "remove_unused_columns=True": trainer.args.remove_unused_columns,
        "environment_factory": trainer.environment_factories is not None,
        "rollout_func": trainer.rollout_func is not None and column == TEACHER_PROMPT,
    }
    for setting, given in refused.items():
        if given:
            raise SGOPDConfigError(
                f"`{setting}` is not supported with the column `{column}`, got both. The rows' own prompt or teacher "
                f"would not be the one that is used. Leave the setting out, or remove the column."
            )


def _check_names(dataset: Any, columns: list[str], teacher_ids: Sequence[str], name: str) -> None:
    known = sorted(teacher_ids)
    if TEACHER_ID not in columns:
        raise DataError(
            f"`{name}` must have the column `{TEACHER_ID}` with several teachers, got {columns}. It names each row's "
            f"teacher, one of {known}. Add it with `dataset.map` or `dataset.rename_column`, or pass one teacher."
        )
    labels = (row[TEACHER_ID] for row in first_rows(dataset)) if is_stream(dataset) else dataset[TEACHER_ID]
    counts = Counter(map(str, labels))
    unknown = {label: count for label, count in counts.most_common() if label not in teacher_ids}
    if unknown:
        shown = ", ".join(f"{label!r} ({count} rows)" for label, count in list(unknown.items())[:_SHOWN])
        raise DataError(
            f"`{TEACHER_ID}` of `{name}` must name one of the teachers {known}, got {len(unknown)} others: {shown}. "
            "A row is never given to another teacher than its own. Correct the column, drop these rows, or add the "
            "teachers."
        )
    unused = [label for label in known if label not in counts]
    if unused and name == "train_dataset" and not is_stream(dataset):
        logger.warning("No row of `%s` names the teachers %s: they are loaded and never asked.", name, unused)


def _check_prompts(rows: list[dict], name: str) -> None:
    for index, row in enumerate(rows):
        given, prompt = row[TEACHER_PROMPT], row["prompt"]
        if given is None:
            continue
        if is_empty_prompt(given) or isinstance(given, str) != isinstance(prompt, str):
            kind = "a string" if isinstance(prompt, str) else "a chat"
            raise DataError(
                f"`{TEACHER_PROMPT}` must be {kind} that is not empty, as `prompt` is, or null for the same prompt, "
                f"got {given!r:.80} in row {index} of `{name}`. Both are rendered in the same way. Convert the column."
            )
