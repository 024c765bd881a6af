"""Tokens and chats: do student, teacher and reference read and end them alike?"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from ..data import flat_prompt
from ..errors import TeacherError
from ..teachers.fit import check_tokenizers
from .report import Row, listed, rows_of_error

THINKING = "enable_thinking"
"""The switch that chat templates with a thinking mode read."""
_ANSWER = "Seventeen"


def tokenizer_rows(student: Any, others: Mapping[str, Any]) -> list[Row]:
    """The same ids for the same tokens, and the same first and end tokens.

    Args:
        student: its tokenizer.
        others: those of teachers and reference, by what messages call them; None where one is not known.
    """
    rows = []
    for role, other in others.items():
        if other is None:
            continue
        try:
            check_tokenizers(student, other, role)
        except TeacherError as error:
            rows += rows_of_error("tokenizer", error)
    unknown = [role for role, other in others.items() if other is None]
    known = [role for role in others if role not in unknown]
    if unknown:
        rows.append(
            Row(
                "tokenizer",
                "yellow",
                f"That the ids of {listed(unknown)} mean the student's tokens is taken on trust: it has no tokenizer.",
                "Give models as paths, or pass teacher_processing_class.",
            )
        )
    if rows:
        return rows
    end = f"{student.eos_token!r} ({student.eos_token_id})"
    shared = f"{listed(['Student', *known])} have" if known else "The student has"
    return [Row("tokenizer", "green", f"{shared} the same {len(student)} ids and the end token {end}.")]


def chat_rows(
    student: Any, others: Mapping[str, Any], prompts: Sequence[Any], kwargs: Mapping[str, Any], ends: Collection[int]
) -> list[Row]:
    """Chat templates, their thinking mode, and whether an answer ends at a token at which rollouts end.

    Args:
        student: its tokenizer.
        others: those of teachers and reference, by what messages call them; None where one is not known.
        prompts: some of the data set's.
        kwargs: `chat_template_kwargs` of the run.
        ends: ids that end a rollout.
    """
    chats = [flat_prompt(prompt) for prompt in prompts if not isinstance(prompt, str)]
    if not chats or student.chat_template is None:
        return [Row("chat template", "green", "Prompts are texts: no template is used.")]
    templates = {role: other for role, other in others.items() if getattr(other, "chat_template", None) is not None}
    without = [role for role, other in others.items() if other is not None and role not in templates]
    rows = [_template_row(student, templates, without, chats, kwargs)]
    rows.append(_thinking_row(student, templates, chats[0], kwargs))
    return [*rows, _end_row(student, chats[0], kwargs, ends)]


def _template_row(
    student: Any,
    templates: Mapping[str, Any],
    without: Sequence[str],
    chats: Sequence[list],
    kwargs: Mapping[str, Any],
) -> Row:
    own = [rendered(student, chat, kwargs) for chat in chats]
    for role, other in templates.items():
        for number, (chat, text) in enumerate(zip(chats, own, strict=True)):
            theirs = rendered(other, chat, kwargs)
            if theirs != text:
                return Row(
                    "chat template",
                    "red",
                    f"Student and {role} render the prompt of row {number} in other ways: they end in "
                    f"{text[-60:]!r} and {theirs[-60:]!r}.",
                    "Set chat_template_kwargs so that both agree, or save one template with both tokenizers.",
                )
    if without:
        return Row(
            "chat template",
            "yellow",
            f"The tokenizer of {listed(without)} has no chat template: it was hardly trained on chats.",
            "Take a teacher that was, or give prompts as texts.",
        )
    alike = f"{listed(['Student', *templates])} render" if templates else "The student renders"
    return Row(
        "chat template", "green", f"{alike} the first {len(chats)} prompts alike; they end in {own[0][-30:]!r}."
    )


def _thinking_row(student: Any, templates: Mapping[str, Any], chat: list, kwargs: Mapping[str, Any]) -> Row:
    switch = {role: _has_switch(each, chat, kwargs) for role, each in {"student": student, **templates}.items()}
    with_it = [role for role, there in switch.items() if there]
    if not with_it:
        return Row("thinking", "green", f"No template has a thinking mode (`{THINKING}`).")
    said = f"{kwargs[THINKING]}" if THINKING in kwargs else "left to the templates, which mostly think"
    without = [role for role in switch if role not in with_it]
    if without:
        return Row(
            "thinking",
            "yellow",
            f"A thinking mode (`{THINKING}`, {said}) is there in {listed(with_it)}, and not in {listed(without)}.",
            f"Set chat_template_kwargs: {{{THINKING}: false}} or take two models of one kind.",
        )
    return Row("thinking", "green", f"`{THINKING}` is there in {listed(with_it)}: {said}.")


def _has_switch(tokenizer: Any, chat: list, kwargs: Mapping[str, Any]) -> bool:
    on, off = (rendered(tokenizer, chat, {**kwargs, THINKING: value}) for value in (True, False))
    return on != off


def _end_row(tokenizer: Any, chat: list, kwargs: Mapping[str, Any], ends: Collection[int]) -> Row:
    answered = [*chat, {"role": "assistant", "content": _ANSWER}]
    text = rendered(tokenizer, answered, kwargs, answer_follows=False)
    after = text.rpartition(_ANSWER)[2]
    found = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    names = listed([repr(tokenizer.convert_ids_to_tokens(end)) for end in sorted(ends)])
    if set(found) & set(ends):
        return Row("end token", "green", f"The chat template ends an answer with {names}, and so do rollouts.")
    return Row(
        "end token",
        "yellow",
        f"The chat template ends an answer with {after!r}, in which none of the end tokens {names} of rollouts is.",
        "Set generation_kwargs: {eos_token_id: [...]} to the ids that end an answer, or the tokenizer's eos_token.",
    )


def rendered(tokenizer: Any, chat: list, kwargs: Mapping[str, Any], *, answer_follows: bool = True) -> str:
    """The text of a chat, or what its template says against it."""
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer_follows, **kwargs)
    except TemplateError as error:
        return f"the error {error}"
