"""Does a model fit the student? The same token ids, the same special tokens, chats rendered alike, and what it lacks.

Only token ids are ever exchanged between student, teacher and reference: two models that number their tokens
differently would be compared without any error, and everything learned from it would be noise.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

from ..data import TEACHER_PROMPT, first_prompts, flat_prompt
from ..errors import TeacherError
from ..models.batch import TokenBatch
from ..run import Run
from ..trl_seam import is_conversational

logger = logging.getLogger(__name__)

# Differences that a message lists, and tokens that it shows around the first one.
_SHOWN = 5
_CONTEXT = 4


class RenderingRun(Run, Protocol):
    """A run that tells how it renders chats.

    Attributes:
        chat_template_kwargs: further arguments of the chat template.
    """

    chat_template_kwargs: Any


def check_fits_student(run: RenderingRun, tokenizer: Any, role: str) -> None:
    """Refuse a model whose tokenizer is not the student's, or that knows chats in another form.

    Args:
        run: whose student it is, and whose first prompts are rendered where they are chats.
        tokenizer: of the teacher or reference.
        role: what messages call the model: `reference`, `teacher`, or `teacher NAME`.

    Raises:
        TeacherError: shows the first differences.
    """
    check_tokenizers(run.tokenizer, tokenizer, role)
    # An environment writes its own prompts, which nobody knows yet.
    if run.environment_factories is not None:
        return
    prompts = first_prompts(run.train_dataset, "prompt" if role == "reference" else TEACHER_PROMPT)
    if is_conversational({"prompt": prompts[0]}):
        rendered, kwargs = run.tokenize_prompts(prompts), run.chat_template_kwargs
        check_chat_templates(prompts, rendered, tokenizer, role, tools=run.tools, template_kwargs=kwargs)


def check_tokenizers(student: Any, other: Any, role: str) -> None:
    """Refuse a model whose tokenizer maps tokens to other ids than the student's, or begins or ends with others.

    Padding is never scored, so that its id may differ: base and chat models of one family often do.

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
    if student.bos_token_id != other.bos_token_id:
        raise TeacherError(
            f"The {role}'s first token must be the student's, got {other.bos_token!r} ({other.bos_token_id}) and "
            f"{student.bos_token!r} ({student.bos_token_id}). The {role} would read prompts that begin as it never "
            "saw them. Use two models of one kind, or set `bos_token` of the tokenizer you pass."
        )


_WAYS_OUT = {
    "teacher": "pass the student's tokenizer as `teacher_processing_class`",
    "reference": "pass the reference as a model",
}


def check_chat_templates(
    prompts: Sequence[Any],
    rendered: Sequence[list[int]],
    other: Any,
    role: str,
    *,
    tools: Any = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a model that was trained on other renderings of the chats than those that it will read.

    Templates may differ in what these prompts do not use; only the token ids that come out are compared.

    Args:
        prompts: chats, some of the data set's.
        rendered: the student's token ids of each of them.
        other: tokenizer of the teacher or reference, whose vocabulary is the student's.
        role: what messages call the model.
        tools: of the trainer.
        template_kwargs: of both templates.

    Raises:
        TeacherError: shows the first difference.
    """
    if other.chat_template is None:
        logger.warning(
            "The %s's tokenizer has no chat template, so that it was hardly trained on chats. It reads the student's.",
            role,
        )
        return
    for row, (prompt, ids) in enumerate(zip(prompts, rendered, strict=True)):
        theirs = _render(other, prompt, tools, template_kwargs or {})
        if theirs != ids:
            raise TeacherError(
                f"The {role}'s chat template must render the prompts as the student's does, got a difference in row "
                f"{row} (student and {role}): {_first_difference(other, ids, theirs)}. The {role} would score prompts "
                f"of a form that it does not know. Set `chat_template_kwargs` so that both agree, or save the "
                f"template that fits both with the {role}'s tokenizer. To have the {role} read the student's form "
                f"anyway, {_WAYS_OUT[role.split()[0]]}."
            )


def _render(tokenizer: Any, prompt: Any, tools: Any, template_kwargs: Mapping[str, Any]) -> list[int] | str:
    """Token ids, or what the template says against the prompt."""
    try:
        return tokenizer.apply_chat_template(
            flat_prompt(prompt),
            tools=tools or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **template_kwargs,
        )["input_ids"]
    except TemplateError as error:
        return f"the error {error}"


def _first_difference(tokenizer: Any, own: list[int], theirs: list[int] | str) -> str:
    if isinstance(theirs, str):
        return f"{tokenizer.decode(own)!r} and {theirs}"
    at = first_difference(own, theirs)
    around = slice(max(0, at - _CONTEXT), at + _CONTEXT)
    return f"{tokenizer.decode(own[around])!r} and {tokenizer.decode(theirs[around])!r} from token {around.start} on"


def first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    """Where two sequences that are not equal begin to differ; one may be the beginning of the other."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(left), len(right)))


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


class SharedVocabulary:
    """The ids that the tokenizer, the student, the teachers and the reference all have, and what becomes of others.

    Models of one family pad their embeddings to different sizes. A padded row is a token like any other to the
    sampler, but nothing was ever trained on it and another model may not have it: it is not sampled, and where a
    sampler cannot be told so (vLLM) the completion is left out of the loss from there on, and counted.

    Args:
        tokenizer: the student's.
        vocab_sizes: of the student, the teacher and a reference of its own.

    Attributes:
        unusable: ids that some model has and the tokenizer or another model has not, in order.
    """

    def __init__(self, tokenizer: Any, vocab_sizes: Sequence[int]) -> None:
        smallest = min(vocab_sizes)
        usable = {token for token in tokenizer.get_vocab().values() if token < smallest}
        self.unusable = [token for token in range(max(vocab_sizes)) if token not in usable]

    def without_unusable(self, settings: Mapping[str, Any] | None) -> dict[str, Any]:
        """Fields of a `GenerationConfig` that keep unusable ids, and those suppressed anyway, from being sampled."""
        settings = dict(settings or {})
        if self.unusable:
            settings["suppress_tokens"] = sorted({*(settings.get("suppress_tokens") or ()), *self.unusable})
        return settings

    def leave_out(self, rollouts: dict, gather: Callable[[Tensor], Tensor]) -> tuple[dict, int]:
        """Take unusable ids, and all that a rollout holds after one, out of a generation batch's loss.

        Whatever follows such an id could only be scored in a context that another model does not know.

        Args:
            rollouts: TRL's, `(B, T)` entries.
            gather: over ranks, which all call this.

        Returns:
            The rollouts with `tool_mask` and `num_items_in_batch` as they are without these tokens, and how many were
            left out over all ranks.
        """
        counted = rollouts["completion_mask"]
        if "tool_mask" in rollouts:
            counted = counted * rollouts["tool_mask"]
        usable = self._usable_part(rollouts["completion_ids"], rollouts["completion_mask"])
        totals = gather(torch.stack([counted.sum(), (counted * usable).sum()]).unsqueeze(0)).sum(dim=0)
        before, after = totals.tolist()
        if before == after:
            return rollouts, 0
        return rollouts | {"tool_mask": counted * usable, "num_items_in_batch": totals[1]}, before - after

    def cut(self, batch: TokenBatch, pad_token_id: int) -> TokenBatch:
        """The part of each completion that every model can score."""
        if not self.unusable:
            return batch
        usable = self._usable_part(batch.completion_ids, batch.completion_mask)
        return replace(
            batch,
            completion_ids=batch.completion_ids.masked_fill(usable == 0, pad_token_id),
            completion_mask=batch.completion_mask * usable,
        )

    def usable(self, completion_ids: list[int]) -> list[int]:
        """The part of one completion that every model can score."""
        lacking = set(self.unusable)
        end = next((i for i, token in enumerate(completion_ids) if token in lacking), len(completion_ids))
        return completion_ids[:end]

    def _usable_part(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`(B, T)`, 1 up to a row's first unusable token: what follows it was written after something unreadable."""
        unusable = torch.isin(ids, torch.tensor(self.unusable, dtype=ids.dtype, device=ids.device)) & (mask != 0)
        return (unusable.cumsum(dim=1) == 0).to(mask.dtype)
