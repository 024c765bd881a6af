"""`distillation_mode` -> its objective, refused where the models of the run cannot serve it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import core
from .errors import SGOPDConfigError
from .models.batch import TokenBatch
from .models.head import OutputHead, project, support_log_probs, support_logits, tiled_token_losses
from .teachers.base import HiddenScores, SupportScores, Teacher
from .teachers.reference import Reference

Scores = Tensor | SupportScores | HiddenScores


class Positions(NamedTuple):
    """The N tokens of a micro-batch whose distributions are matched, in row-major order.

    Attributes:
        hidden_states: `(N, H)` of the student, with gradient.
        head: the student's.
        logps: `(N,)` the student's log-probs of the tokens, with gradient.
        lambdas: `(N,)` extrapolation of each token's target.
        entry: one entry of the micro-batch, `(B, T, ...)` or `(B,)`, at these tokens: `(N, ...)`.
    """

    hidden_states: Tensor
    head: OutputHead
    logps: Tensor
    lambdas: Tensor
    entry: Callable[[str], Tensor]


class Objective:
    """The loss of a token, and what has to be known for it.

    This class is the policy gradient of `sampled_token`; the others replace its parts.

    Args:
        args: the trainer's configuration.
        teacher: of the trainer.
        reference: of the trainer, None where no route uses one or TRL's own serves.
        vocab_size: ids that student, teacher and reference have.
    """

    #: Whether there are tokens whose distribution is matched, in the student's own forward.
    matches: bool = False
    #: Whether the routes pick the target of a distribution (`route_lambdas`) besides the token's advantage.
    routes_targets: bool = False

    def __init__(self, args: Any, teacher: Teacher, reference: Reference | None, vocab_size: int) -> None:
        self.args = args
        self.teacher = teacher
        self.reference = reference
        self.vocab_size = vocab_size

    # --- asking --------------------------------------------------------------------------------------------------
    def ask_teacher(self, teacher: Any, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Scores:
        """Have a teacher, or the teachers of these rows, score completions; arguments as in `Teacher.score`."""
        return teacher.score(batch, rows, max_tokens)

    def prefetch_scores(self, teacher: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
        """Have a `PrefetchingTeacher` begin what `ask_teacher` will ask for."""
        teacher.prefetch_scores(prompt_ids, completion_ids)

    def ask_reference(
        self, reference: Reference, batch: TokenBatch, rows: Tensor, max_tokens: int, inputs: dict
    ) -> Scores:
        """Have the reference score completions; `inputs` hold what the teacher said of them."""
        return reference.score(batch, rows, max_tokens)

    # --- what is kept of the answers, one entry per row ----------------------------------------------------------
    def teacher_entries(self, scores: Scores) -> dict[str, Tensor]:
        """What the loss reads of the teacher's answer; `teacher_logps` `(B, T)` is always among it."""
        return {"teacher_logps": expect(scores, Tensor, "score_with_teacher")}

    def reference_entries(self, scores: Scores, rows: Tensor, inputs: dict) -> dict[str, Tensor]:
        """What the loss reads of the reference's answer for `rows` `(B,)`; `reference_logps` is always among it.

        Rows that no route extrapolates carry lR = lT, so that the extrapolation term is 0.
        """
        logps = expect(scores, Tensor, "score_with_reference")
        return {"reference_logps": torch.where(rows.unsqueeze(1), logps, inputs["teacher_logps"])}

    # --- the loss ------------------------------------------------------------------------------------------------
    def matched(self, behaviour_logps: Tensor, inputs: dict) -> Tensor:
        """Tokens `(B, T)` bool whose distribution is matched, among those that count."""
        return torch.zeros_like(behaviour_logps, dtype=torch.bool)

    def losses(self, positions: Positions) -> Tensor:
        """Matching loss `(N,)` of those tokens, with gradient to the student."""
        return positions.logps.new_zeros(positions.logps.shape)


class SupportObjective(Objective):
    """An objective on the teacher's top-K tokens."""

    matches = True

    def ask_teacher(self, teacher: Any, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Scores:
        """The teacher's top-K tokens."""
        return teacher.score_support(batch, rows, max_tokens, self.args.support_size, self.vocab_size)

    def prefetch_scores(self, teacher: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
        """The teacher's top-K tokens, likewise."""
        teacher.prefetch_scores(prompt_ids, completion_ids, self.args.support_size, self.vocab_size)

    def teacher_entries(self, scores: Scores) -> dict[str, Tensor]:
        """Their ids and log-probs too."""
        logps, ids, support = expect(scores, SupportScores, "score_with_teacher")
        return {"teacher_logps": logps, "teacher_support_ids": ids, "teacher_support_logps": support}


def expect(scores: Any, kind: type, method: str) -> Any:
    """The scores, if they are of the kind that the objective reads.

    Raises:
        SGOPDConfigError: an overridden method returned something else.
    """
    if not isinstance(scores, kind):
        raise SGOPDConfigError(
            f"`{method}` must return {kind.__name__} under this `distillation_mode`, got {type(scores).__name__}. The "
            "loss reads more, or less, than that. Return what the method of SGOPDTrainer returns, or set "
            "distillation_mode='sampled_token' for scores that are a tensor."
        )
    return scores


class TopKLogits(SupportObjective):
    """Reverse KL to the teacher on its K likeliest tokens, both renormalised there (arXiv:2603.25562).

    Our generalisation: the target on these tokens is proportional to teacher^lambda * reference^(1 - lambda), with the
    lambda of the token's route.
    """

    routes_targets = True

    def ask_reference(
        self, reference: Reference, batch: TokenBatch, rows: Tensor, max_tokens: int, inputs: dict
    ) -> Scores:
        """The reference's log-probs of the teacher's tokens."""
        return reference.score_on_support(batch, rows, max_tokens, inputs["teacher_support_ids"])

    def reference_entries(self, scores: Scores, rows: Tensor, inputs: dict) -> dict[str, Tensor]:
        """The teacher's in rows that no route extrapolates."""
        logps, _, support = expect(scores, SupportScores, "score_with_reference")
        kept = rows.view(-1, 1, 1)
        return super().reference_entries(logps, rows, inputs) | {
            "reference_support_logps": torch.where(kept, support, inputs["teacher_support_logps"])
        }

    def matched(self, behaviour_logps: Tensor, inputs: dict) -> Tensor:
        """Every token."""
        return torch.ones_like(behaviour_logps, dtype=torch.bool)

    def losses(self, positions: Positions) -> Tensor:
        """Local support matching."""
        reference = positions.entry("reference_support_logps") if self.args.needs_reference else None
        target = core.extrapolated_log_probs(
            positions.entry("teacher_support_logps").unsqueeze(0),
            None if reference is None else reference.unsqueeze(0),
            positions.lambdas.unsqueeze(0),
        )
        logits = support_logits(positions.hidden_states, positions.head, positions.entry("teacher_support_ids"))
        return core.local_support_matching(logits.unsqueeze(0), target).squeeze(0)


class FullLogits(Objective):
    """Reverse KL(student || q) over all tokens, q proportional to teacher^lambda * reference^(1 - lambda).

    Lambda 1 is on-policy distillation with the exact gradient in place of the sampled token's (GKD, arXiv:2306.13649,
    at its reverse-KL end); other lambdas are G-OPD's target (arXiv:2602.12125), picked by the token's route. Teacher
    and reference keep hidden states; their logits exist for one tile of positions at a time. Ids that one of the
    models lacks are left out of all distributions.
    """

    matches = True
    routes_targets = True

    def ask_teacher(self, teacher: Any, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Scores:
        """The teacher's hidden states."""
        return teacher.score_hidden(batch, rows, max_tokens)

    def ask_reference(
        self, reference: Reference, batch: TokenBatch, rows: Tensor, max_tokens: int, inputs: dict
    ) -> Scores:
        """The reference's hidden states."""
        return reference.score_hidden(batch, rows, max_tokens)

    def teacher_entries(self, scores: Scores) -> dict[str, Tensor]:
        """The hidden states and each row's head too."""
        logps, hidden_states, heads = expect(scores, HiddenScores, "score_with_teacher")
        return {"teacher_logps": logps, "teacher_hidden_states": hidden_states, "teacher_heads": heads}

    def reference_entries(self, scores: Scores, rows: Tensor, inputs: dict) -> dict[str, Tensor]:
        """The hidden states too; where no route extrapolates they are not read."""
        logps, hidden_states, heads = expect(scores, HiddenScores, "score_with_reference")
        entries = {"reference_hidden_states": hidden_states, "reference_heads": heads}
        return super().reference_entries(logps, rows, inputs) | entries

    def matched(self, behaviour_logps: Tensor, inputs: dict) -> Tensor:
        """Every token."""
        return torch.ones_like(behaviour_logps, dtype=torch.bool)

    def losses(self, positions: Positions) -> Tensor:
        """Full-vocabulary reverse KL, tile by tile."""
        teacher = _Distributions(positions, "teacher", self.teacher.output_heads(), self.vocab_size)
        reference, lambdas = None, positions.lambdas
        if self.reference is not None:
            reference = _Distributions(positions, "reference", self.reference.output_heads(), self.vocab_size)

        def token_loss(logits: Tensor, tile: slice) -> Tensor:
            read = reference if bool((lambdas[tile] != 1).any()) else None
            target = core.extrapolated_log_probs(
                teacher.log_probs(tile), None if read is None else read.log_probs(tile), lambdas[None, tile]
            )
            return core.local_support_matching(logits.unsqueeze(0), target).squeeze(0)

        return tiled_token_losses(positions.hidden_states, positions.head, self.vocab_size, token_loss)


class _Distributions:
    """The distributions of frozen models at some positions, from their hidden states."""

    def __init__(self, positions: Positions, role: str, heads: Sequence[OutputHead], vocab_size: int) -> None:
        self.hidden_states = positions.entry(f"{role}_hidden_states")
        self.places = positions.entry(f"{role}_heads") if len(heads) > 1 else None
        # Here and now: the backward runs outside of autocast.
        self.heads = [head.resolved(self.hidden_states) for head in heads]
        self.vocab_size = vocab_size

    def log_probs(self, tile: slice) -> Tensor:
        """`(1, n, V)` float32."""
        if self.places is None:
            return self._of(self.heads[0], self.hidden_states[tile]).unsqueeze(0)
        places = self.places[tile]
        result = self.hidden_states.new_empty(places.size(0), self.vocab_size, dtype=torch.float32)
        for place, head in enumerate(self.heads):
            own = places == place
            result[own] = self._of(head, self.hidden_states[tile][own][:, : head.weight.size(1)])
        return result.unsqueeze(0)

    def _of(self, head: OutputHead, hidden_states: Tensor) -> Tensor:
        return project(hidden_states, head, self.vocab_size).log_softmax(dim=-1)


class Asymmetric(SupportObjective):
    """Forward KL on the teacher's top-K tokens where it likes the sampled token less, the policy gradient elsewhere.

    AOPD, known at second hand (a third party's code that quotes its Eq. 1, 7, 9 and 10). The gate routes the
    advantages of the policy gradient; the forward KL is to the teacher itself, whatever the token's route.
    """

    def matched(self, behaviour_logps: Tensor, inputs: dict) -> Tensor:
        """Where the teacher's probability exceeds the student's by no more than the threshold."""
        return core.asymmetric_tokens(behaviour_logps, inputs["teacher_logps"], self.args.asymmetric_threshold)

    def losses(self, positions: Positions) -> Tensor:
        """Forward KL on the support."""
        student = support_log_probs(
            positions.hidden_states,
            positions.head,
            positions.entry("teacher_support_ids"),
            positions.entry("completion_ids"),
            positions.logps,
        )
        teacher = positions.entry("teacher_support_logps")
        scale = self.args.asymmetric_forward_kl_scale
        return core.forward_kl_on_support(student.unsqueeze(0), teacher.unsqueeze(0), scale).squeeze(0)


OBJECTIVES: dict[str, type[Objective]] = {
    "sampled_token": Objective,
    "topk_logits": TopKLogits,
    "full_logits": FullLogits,
    "asymmetric": Asymmetric,
}

_WHY = {
    "full_logits": "It takes hidden states and an output head that is whole in this process, which a server or a "
    "sharded model has not. Set distillation_mode='topk_logits', which needs neither.",
    "topk_logits": "It takes the likeliest tokens of each position. Set distillation_mode='sampled_token'.",
    "asymmetric": "It takes the likeliest tokens of each position. Set distillation_mode='sampled_token'.",
    "sampled_token": "It cannot score tokens. Choose another teacher.",
}


def build_objective(trainer: Any) -> Objective:
    """The objective of a trainer whose teacher and reference are known.

    Raises:
        SGOPDConfigError: names the model that cannot serve it, or a support wider than the vocabulary.
    """
    args, teacher, reference = trainer.args, trainer.teacher, trainer.reference
    mode = args.distillation_mode
    asked = {"teacher": teacher} | ({"reference": reference} if reference is not None else {})
    for role, model in asked.items():
        if mode not in model.distillation_modes:
            raise SGOPDConfigError(
                f"`distillation_mode={mode!r}` is not supported with this {role}, which can serve "
                f"{', '.join(map(repr, sorted(model.distillation_modes)))}. {_WHY[mode]}"
            )
    student = trainer.model.config.get_text_config().vocab_size
    vocab_size = min([student, *(model.vocab_size for model in asked.values())])
    kind = OBJECTIVES[mode]
    if issubclass(kind, SupportObjective) and args.support_size > vocab_size:
        raise SGOPDConfigError(
            f"`distillation_topk` must not exceed the {vocab_size} ids that all models have, got "
            f"{args.support_size}. There are no more tokens. Set distillation_topk to at most {vocab_size}."
        )
    check_objective(type(trainer), kind, mode)
    return kind(args, teacher, reference, vocab_size)


def check_objective(trainer_class: type, kind: type[Objective], mode: str) -> None:
    """Refuse a subclass whose own routes the objective would pass over.

    Raises:
        SGOPDConfigError: `route_advantages` is overridden and `route_lambdas` is not.
    """

    def author(name: str) -> type:
        return next(owner for owner in trainer_class.__mro__ if name in vars(owner))

    passed_over = author("route_advantages") is not author("route_lambdas")
    passed_over = passed_over and issubclass(author("route_advantages"), author("route_lambdas"))
    if kind.routes_targets and passed_over:
        raise SGOPDConfigError(
            f"`{trainer_class.__name__}.route_advantages` is not used under distillation_mode={mode!r}: the routes "
            "pick the target of whole distributions there. Override `route_lambdas` (too), or set "
            "distillation_mode='sampled_token'."
        )
