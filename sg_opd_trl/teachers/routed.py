"""Which row has which teacher, and what that teacher reads: the columns `teacher_id` and `teacher_prompt`.

With several teachers every row names its own in `teacher_id` (G-OPD, arXiv:2602.12125: one student, a teacher per
domain, a shared reference). With a `teacher_prompt` the teacher scores the student's completion after a prompt of its
own, privileged context for instance, and writes its rollouts from it; student and reference keep `prompt`.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..data import TEACHER_ID, TEACHER_PROMPT, column_names, datasets_of, first_rows, is_empty_prompt, is_stream
from ..errors import DataError, SGOPDConfigError
from ..models.batch import TokenBatch, pad_rows
from ..models.head import OutputHead
from ..random_state import mixed_seed
from ..run import Run
from .base import HiddenScores, PrefetchingTeacher, Sampling, SupportScores, Teacher

logger = logging.getLogger(__name__)

Tokenize = Callable[[list], list[list[int]]]
"""Prompts -> their token ids."""

# Unknown names that a message lists.
_SHOWN = 5


# --- several teachers ------------------------------------------------------------------------------------------------
class RoutedTeacher:
    """Teachers by name; every row of the data set names its own in the column `teacher_id`.

    The reference is shared. Every teacher is asked on every rank the same number of times, with no rows where none of
    the rank's rows are its own, so that sharded teachers stay in step.

    Args:
        teachers: name -> teacher; several names may share one.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.teachers = dict(teachers)

    @property
    def identity(self) -> dict:
        """Facts of every teacher by name; the fingerprint is None where one of theirs is."""
        parts = {label: teacher.identity for label, teacher in self.teachers.items()}
        prints = {label: part["fingerprint"] for label, part in sorted(parts.items())}
        joint = None if None in prints.values() else hashlib.sha256(repr(prints).encode()).hexdigest()[:16]
        return {
            "name": {label: part["name"] for label, part in parts.items()},
            "fingerprint": joint,
            "teachers": parts,
        }

    @property
    def vocab_size(self) -> int:
        """Ids that all teachers can score."""
        return min(teacher.vocab_size for teacher in self.teachers.values())

    @property
    def distillation_modes(self) -> frozenset[str]:
        """What all teachers can serve."""
        return frozenset.intersection(*(teacher.distillation_modes for teacher in self.distinct))

    @property
    def tokens_scored(self) -> int:
        """Tokens that all teachers have scored on this rank."""
        return sum(teacher.tokens_scored for teacher in self.distinct)

    @property
    def tokens_generated(self) -> int:
        """Tokens that all teachers have generated on this rank."""
        return sum(teacher.tokens_generated for teacher in self.distinct)

    @cached_property
    def distinct(self) -> list[Teacher]:
        """Every teacher once, in the order of the names."""
        return list({id(teacher): teacher for teacher in self.teachers.values()}.values())

    def for_rows(self, teacher_ids: Sequence[Any]) -> "TeachersOfRows":
        """The teacher of a batch whose rows name theirs.

        Raises:
            DataError: a name that no teacher has.
        """
        unknown = [label for label in map(str, teacher_ids) if label not in self.teachers]
        if unknown:
            raise DataError(
                f"`teacher_id` must name one of the teachers {sorted(self.teachers)}, got {unknown[0]!r}. A row is "
                "never given to another teacher than its own. Correct the column, or add the teacher."
            )
        numbers = {id(teacher): number for number, teacher in enumerate(self.distinct)}
        return TeachersOfRows(self.distinct, [numbers[id(self.teachers[str(label)])] for label in teacher_ids])

    def output_heads(self) -> list[OutputHead]:
        """The heads of all teachers, in their order."""
        return [head for teacher in self.distinct for head in teacher.output_heads()]

    def stop_generating(self) -> None:
        """No teacher will be asked for a rollout any more."""
        for teacher in self.distinct:
            teacher.stop_generating()


class TeachersOfRows:
    """A `Teacher` for one batch: every row goes to its own.

    Args:
        teachers: every teacher once.
        owners: of each row, the number of its teacher among them.
    """

    def __init__(self, teachers: Sequence[Teacher], owners: Iterable[int]) -> None:
        self.teachers = teachers
        self.owners = list(owners)

    def score(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Tensor:
        """Each row's log-probs under its own teacher, see `Teacher.score`."""
        return self._routed(rows, lambda teacher, own: teacher.score(batch, own, max_tokens))

    def score_support(
        self, batch: TokenBatch, rows: Tensor, max_tokens: int, size: int, vocab_size: int
    ) -> SupportScores:
        """Each row's scores under its own teacher, see `Teacher.score_support`."""
        return self._routed(rows, lambda teacher, own: teacher.score_support(batch, own, max_tokens, size, vocab_size))

    def score_hidden(self, batch: TokenBatch, rows: Tensor, max_tokens: int) -> HiddenScores:
        """Each row's scores and hidden states under its own teacher, see `Teacher.score_hidden`."""
        # `RoutedTeacher.output_heads` lists the heads of all teachers one after the other.
        first_head = 0

        def ask(teacher: Teacher, own: Tensor) -> HiddenScores:
            nonlocal first_head
            scores = teacher.score_hidden(batch, own, max_tokens)
            scores = scores._replace(heads=scores.heads + first_head)
            first_head += len(teacher.output_heads())
            return scores

        return self._routed(rows, ask)

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int, max_tokens: int) -> list[list[int]]:
        """Each prompt's completion by its own teacher, see `Teacher.generate`."""
        completions: list[list[int]] = [[] for _ in prompts]
        for number, teacher in enumerate(self.teachers):
            own = self._rows_of(number)
            # One seed for all would give teachers the same random numbers.
            written = teacher.generate([prompts[i] for i in own], sampling, mixed_seed(seed, number), max_tokens)
            for i, ids in zip(own, written, strict=True):
                completions[i] = ids
        return completions

    def prefetch_rollouts(self, prompts: list[list[int]], sampling: Sampling, seed: int, max_tokens: int) -> None:
        """Have the teachers that can begin their own rollouts, see `PrefetchingTeacher`."""
        for number, teacher in enumerate(self.teachers):
            if isinstance(teacher, PrefetchingTeacher):
                own = [prompts[i] for i in self._rows_of(number)]
                teacher.prefetch_rollouts(own, sampling, mixed_seed(seed, number), max_tokens)

    def prefetch_scores(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        size: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        """Have the teachers that can begin the scores of their own rows, see `PrefetchingTeacher`."""
        for number, teacher in enumerate(self.teachers):
            if isinstance(teacher, PrefetchingTeacher):
                own = self._rows_of(number)
                prompts, completions = [prompt_ids[i] for i in own], [completion_ids[i] for i in own]
                teacher.prefetch_scores(prompts, completions, size, vocab_size)

    def _rows_of(self, number: int) -> list[int]:
        return [row for row, owner in enumerate(self.owners) if owner == number]

    def _routed(self, rows: Tensor, ask: Callable[[Teacher, Tensor], Any]) -> Any:
        """Ask every teacher for its rows; a tensor or a named tuple of tensors with one entry per row."""
        owners = torch.tensor(self.owners, device=rows.device)
        # A teacher without a row is asked too: where it is sharded, its forward waits for all ranks.
        answers = [ask(teacher, rows & (owners == number)) for number, teacher in enumerate(self.teachers)]
        if isinstance(answers[0], Tensor):
            return _of_own_rows(answers, owners)
        return type(answers[0])(*(_of_own_rows(parts, owners) for parts in zip(*answers, strict=True)))


def _of_own_rows(answers: Sequence[Tensor], owners: Tensor) -> Tensor:
    """From each teacher's answer for all rows, `(B, ...)`, the rows that are its own; hidden states to one width."""
    width = max(answer.size(-1) for answer in answers)
    result = functional.pad(answers[0], (0, width - answers[0].size(-1)))
    for number, answer in enumerate(answers[1:], start=1):
        own = (owners == number).view(-1, *[1] * (answer.dim() - 1))
        result = torch.where(own, functional.pad(answer, (0, width - answer.size(-1))), result)
    return result


def prefetching_teachers(teacher: Teacher | RoutedTeacher) -> list[PrefetchingTeacher]:
    """Those of a run's teachers that can begin work ahead of time."""
    every = teacher.distinct if isinstance(teacher, RoutedTeacher) else [teacher]
    return [one for one in every if isinstance(one, PrefetchingTeacher)]


def drop_prefetched(teacher: Teacher | RoutedTeacher) -> None:
    """Stop what any of a run's teachers has begun and nobody asked for."""
    for one in prefetching_teachers(teacher):
        one.drop_prefetched()


# --- what a batch's teacher is, and what it reads --------------------------------------------------------------------
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
def check_teacher_columns(run: Run, teacher_ids: Sequence[str] | None) -> None:
    """Refuse data sets whose rows do not say what their teacher needs to know.

    Args:
        run: whose data sets are checked, those for evaluation only where the teacher takes part.
        teacher_ids: names of the teachers; None with a single one.

    Raises:
        DataError: a missing column, a name that no teacher has, or a prompt of another kind.
        SGOPDConfigError: a setting under which the columns would be ignored.
    """
    if teacher_ids is not None:
        _check_setting(run, TEACHER_ID)
    if run.train_dataset is not None and TEACHER_PROMPT in column_names(run.train_dataset):
        _check_setting(run, TEACHER_PROMPT)
    for name, dataset in datasets_of(run):
        if name != "train_dataset" and not run.args.eval_with_teacher:
            continue
        columns = column_names(dataset)
        if TEACHER_PROMPT in columns:
            _check_prompts(first_rows(dataset), name)
        if teacher_ids is not None:
            _check_names(dataset, columns, teacher_ids, name)
        elif TEACHER_ID in columns:
            logger.info("`%s` of %s is not used: there is one teacher.", TEACHER_ID, name)


def _check_setting(run: Run, column: str) -> None:
    refused = {
        "environment_factory": run.environment_factories is not None,
        "rollout_func": run.rollout_func is not None and column == TEACHER_PROMPT,
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
