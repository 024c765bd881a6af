"""Room for prompt and completion among the positions of every model of a run, as far as its first prompts tell.

A model with a table of positions ends in an index error beyond it: such a run is refused. One whose positions go on
(RoPE) is only worse there than it was trained to be: that is a warning. What is not known before the run is checked
where rows are read (`models.context`); rollout engines and teacher servers are asked for their own context elsewhere.
"""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from .data import PROMPTS_RENDERED, TEACHER_ID, TEACHER_PROMPT, first_rows
from .errors import SGOPDConfigError
from .models.context import extended_positions, keeps_a_table
from .run import Run
from .teachers.local import FrozenModel, ModelScorer
from .teachers.routed import RoutedTeacher

logger = logging.getLogger(__name__)


class RunWithModels(Run, Protocol):
    """A run whose models are built.

    Attributes:
        teacher: one, or several by name.
        reference: of the extrapolation, or None.
        ref_model: TRL's own reference of the KL penalty, or None.
    """

    teacher: Any
    reference: Any
    ref_model: Any


def check_context_room(run: RunWithModels) -> None:
    """Hold the first prompts and full completions against the positions of every model in this process.

    Raises:
        SGOPDConfigError: a model that could not be run on such a row.
    """
    # An environment writes its own prompts, which nobody knows yet.
    if run.environment_factories or run.train_dataset is None:
        return
    rows = first_rows(run.train_dataset)[:PROMPTS_RENDERED]
    args: Any = run.args  # TRL has filled in by now what its fields leave open
    # The anchor's rollouts are scored by the student after its own prompt, and written by the teacher after its own.
    scored, longest = args.max_completion_length or 0, args.longest_completion
    own = _longest_prompt(run, [row["prompt"] for row in rows])
    student = run.accelerator.unwrap_model(run.model)
    _check(student, "student", own, longest)
    if run.ref_model is not None:
        _check(run.accelerator.unwrap_model(run.ref_model), "reference", own, scored)
    if isinstance(run.reference, FrozenModel):
        _check(run.accelerator.unwrap_model(run.reference.model), "reference", own, scored)
    for teacher, its_rows in _rows_by_teacher(run.teacher, rows):
        # One without weights of its own is the student with another adapter; servers know their context themselves.
        if isinstance(teacher, ModelScorer) and its_rows:
            read = [row["prompt"] if row.get(TEACHER_PROMPT) is None else row[TEACHER_PROMPT] for row in its_rows]
            # An adapter on the student's weights is a frozen model that has them only while it scores.
            frozen = isinstance(teacher, FrozenModel) and teacher.model is not None
            model = run.accelerator.unwrap_model(teacher.model) if frozen else student
            _check(model, teacher.role, _longest_prompt(run, read), longest)


def _rows_by_teacher(teacher: Any, rows: Sequence[dict]) -> list[tuple[Any, list[dict]]]:
    if not isinstance(teacher, RoutedTeacher):
        return [(teacher, list(rows))]
    return [
        (each, [row for row in rows if teacher.teachers.get(str(row[TEACHER_ID])) is each])
        for each in teacher.distinct
    ]


def _longest_prompt(run: Run, prompts: list) -> int:
    return max(map(len, run.tokenize_prompts(prompts)), default=0)


def _check(model: Any, role: str, prompt: int, completion: int) -> None:
    room = extended_positions(model.config)
    needed = prompt + completion
    if room is None or needed <= room:
        return
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    found = (
        f"the longest of the first {PROMPTS_RENDERED} prompts ({prompt} tokens) and a full completion ({completion}) "
        f"take {needed}"
    )
    change = "Lower `max_completion_length` or `max_prompt_tokens`, or take a model with a longer context"
    if keeps_a_table(model):
        raise SGOPDConfigError(
            f"`max_completion_length` must leave room for the prompts in the {room} positions of the {role} ({name}), "
            f"got too little: {found}. It has a table of positions, and a longer row ends in an index error. {change}."
        )
    logger.warning(
        "The %s (%s) is made for rows of up to %d tokens: %s. Beyond, its log-probs get worse. %s, or stretch its "
        "positions with `rope_parameters`.",
        role,
        name,
        room,
        found,
        change,
    )
