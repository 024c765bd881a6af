"""What is distilled at each token: one class per `distillation_mode`.

| mode | loss of a token | teacher and reference give |
|---|---|---|
| `sampled_token` | policy gradient with the routed advantage of the sampled token | its log-prob |
| `topk_logits` | reverse KL to the routed target on the teacher's K likeliest tokens | log-probs on them |
| `full_logits` | reverse KL to the routed target over the whole vocabulary | hidden states |
| `asymmetric` | forward KL on those K where the teacher likes the sampled token less, else as first | the same |

An objective says what the models are asked (`ask_...`), what the loss keeps of their answers (`..._entries`), which
tokens' distributions are matched, and at what loss. Its equations are in `core`, its logits in tiles in `models.head`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import core
from .config import SGOPDConfig
from .errors import SGOPDConfigError
from .models.batch import TokenBatch
from .models.head import OutputHead, project, support_log_probs, support_logits, tiled_token_losses
from .teachers.base import HiddenScores, SupportScores, Teacher
from .teachers.reference import Reference
from .teachers.routed import RoutedTeacher

Scores = Tensor | SupportScores | HiddenScores


class Positions(NamedTuple):
    """The N tokens of a micro-batch whose distributions are matched, in row-major order.

    Attributes:
        hidden_states: `(N, H)` of the student, with gradient.
        head: the student's.
        logps: `(N,)` the student's log-probs of the sampled tokens, with gradient.
        lambdas: `(N,)` extrapolation of each token's target.
        entry: one entry of the micro-batch, `(B, T, ...)` or `(B,)`, at these tokens: `(N, ...)`.
    """

    hidden_states: Tensor
    head: OutputHead
    logps: Tensor
    lambdas: Tensor
    entry: Callable[[str], Tensor]


class Objective:
    """What every objective has: the sampled token's log-probs are asked for, and no distribution is matched.

    Args:
        args: the configuration.
        teacher: of the run.
        reference: of the run, None where no route uses one or TRL's own serves.
        vocab_size: ids that student, teacher and reference have.
    """

    #: Whether there are tokens whose distribution is matched, in the student's own forward.
    matches: bool = False
    #: Whether the routes pick the target of a distribution (`route_lambdas`) besides the token's advantage.
    routes_targets: bool = False
    #: Entries too large to outlive their micro-batch. Where there are any, teacher and reference are asked about each
    #: micro-batch when it is its turn, and not about a generation batch once that is written.
    momentary: tuple[str, ...] = ()

    def __init__(
        self, args: SGOPDConfig, teacher: Teacher | RoutedTeacher, reference: Reference | None, vocab_size: int
    ) -> None:
        self.args: Any = args
        self.teacher = teacher
        self.reference = reference
        self.vocab_size = vocab_size

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

    def teacher_entries(self, scores: Scores) -> dict[str, Tensor]:
        """What the loss reads of the teacher's answer, one entry per row; `teacher_logps` `(B, T)` is among it."""
        return {"teacher_logps": _expected(scores, Tensor, "score_with_teacher")}

    def reference_entries(self, scores: Scores, rows: Tensor, inputs: dict) -> dict[str, Tensor]:
        """What the loss reads of the reference's answer for `rows` `(B,)`; `reference_logps` is among it."""
        logps = _expected(scores, Tensor, "score_with_reference")
        # lR = lT where no route extrapolates: the term is 0, and nothing unscored enters an advantage.
        return {"reference_logps": torch.where(rows.unsqueeze(1), logps, inputs["teacher_logps"])}

    def matched(self, behavior_logps: Tensor, inputs: dict) -> Tensor:
        """Tokens `(B, T)` bool whose distribution is matched in place of their policy gradient; here none."""
        return torch.zeros_like(behavior_logps, dtype=torch.bool)

    def losses(self, positions: Positions) -> Tensor:
        """Matching loss `(N,)` of those tokens, with gradient to the student; here of none."""
        return positions.logps.new_zeros(positions.logps.shape)


class SampledToken(Objective):
    """`sampled_token`: the policy gradient of SG-OPD (arXiv:2606.09304, Eq. 10) at every token, nothing else."""


class SupportObjective(Objective):
    """What the two objectives on the teacher's K likeliest tokens share."""

    matches = True

    def ask_teacher(self, teacher: Any, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Scores:
        """The likeliest tokens at each position and their log-probs too."""
        return teacher.score_support(batch, rows, max_tokens, self.args.support_size, self.vocab_size)

    def prefetch_scores(self, teacher: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
        """Begin them."""
        teacher.prefetch_scores(prompt_ids, completion_ids, self.args.support_size, self.vocab_size)

    def teacher_entries(self, scores: Scores) -> dict[str, Tensor]:
        """Their ids and log-probs `(B, T, K)` too."""
        logps, ids, support = _expected(scores, SupportScores, "score_with_teacher")
        return {"teacher_logps": logps, "teacher_support_ids": ids, "teacher_support_logps": support}


class TopKLogits(SupportObjective):
    """`topk_logits`: reverse KL to the teacher on its K likeliest tokens, both renormalised there (arXiv:2603.25562).

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
        logps, _, support = _expected(scores, SupportScores, "score_with_reference")
        kept = rows.view(-1, 1, 1)
        return super().reference_entries(logps, rows, inputs) | {
            "reference_support_logps": torch.where(kept, support, inputs["teacher_support_logps"])
        }

    def matched(self, behavior_logps: Tensor, inputs: dict) -> Tensor:
        """Every token."""
        return torch.ones_like(behavior_logps, dtype=torch.bool)

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


class Asymmetric(SupportObjective):
    """`asymmetric`: AOPD, forward KL on the K tokens where the teacher likes the sampled one less.

    Known at second hand (a third party's code that quotes its Eq. 1, 7, 9 and 10). The gate routes the advantages of
    the policy gradient elsewhere; the forward KL is to the teacher itself, whatever the token's route.
    """

    def matched(self, behavior_logps: Tensor, inputs: dict) -> Tensor:
        """Where the teacher's probability exceeds the student's by no more than the threshold."""
        return core.asymmetric_tokens(behavior_logps, inputs["teacher_logps"], self.args.asymmetric_threshold)

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


class FullLogits(Objective):
    """`full_logits`: reverse KL(student || q) over all tokens, q as teacher^lambda * reference^(1 - lambda).

    Lambda 1 is on-policy distillation with the exact gradient in place of the sampled token's (GKD, arXiv:2306.13649,
    at its reverse-KL end); other lambdas are G-OPD's target (arXiv:2602.12125), picked by the token's route. Teacher
    and reference give hidden states, kept for one micro-batch; their logits exist for one tile of positions at a time.
    Ids that one of the models lacks are left out of all distributions.
    """

    matches = True
    routes_targets = True
    momentary = ("teacher_hidden_states", "reference_hidden_states")

    def ask_teacher(self, teacher: Any, batch: TokenBatch, rows: Tensor, max_tokens: int) -> Scores:
        """The teacher's hidden states."""
        return teacher.score_hidden(batch, rows, max_tokens)

    def ask_reference(
        self, reference: Reference, batch: TokenBatch, rows: Tensor, max_tokens: int, inputs: dict
    ) -> Scores:
        """The reference's hidden states."""
        return reference.score_hidden(batch, rows, max_tokens)

    def teacher_entries(self, scores: Scores) -> dict[str, Tensor]:
        """The hidden states `(B, T, H)` and each row's head too."""
        logps, hidden_states, heads = _expected(scores, HiddenScores, "score_with_teacher")
        return {"teacher_logps": logps, "teacher_hidden_states": hidden_states, "teacher_heads": heads}

    def reference_entries(self, scores: Scores, rows: Tensor, inputs: dict) -> dict[str, Tensor]:
        """The hidden states too; where no route extrapolates they are not read."""
        logps, hidden_states, heads = _expected(scores, HiddenScores, "score_with_reference")
        entries = {"reference_hidden_states": hidden_states, "reference_heads": heads}
        return super().reference_entries(logps, rows, inputs) | entries

    def matched(self, behavior_logps: Tensor, inputs: dict) -> Tensor:
        """Every token."""
        return torch.ones_like(behavior_logps, dtype=torch.bool)

    def losses(self, positions: Positions) -> Tensor:
        """Full-vocabulary reverse KL, tile by tile."""
        teacher = _Distributions(positions, "teacher", self.teacher.output_heads(), self.vocab_size)
        reference, lambdas = None, positions.lambdas
        if self.reference is not None:
            reference = _Distributions(positions, "reference", self.reference.output_heads(), self.vocab_size)

        def token_loss(logits: Tensor, tile: slice) -> Tensor:
            # A projection onto the whole vocabulary is worth it only where some token of the tile reads it.
            read = reference if bool((lambdas[tile] != 1).any()) else None
            target = core.extrapolated_log_probs(
                teacher.log_probs(tile), None if read is None else read.log_probs(tile), lambdas[None, tile]
            )
            return core.local_support_matching(logits.unsqueeze(0), target).squeeze(0)

        return tiled_token_losses(positions.hidden_states, positions.head, self.vocab_size, token_loss)


class _Distributions:
    """The distributions of one model or several at some positions, from their hidden states."""

    def __init__(self, positions: Positions, role: str, heads: Sequence[OutputHead], vocab_size: int) -> None:
        self.hidden_states = positions.entry(f"{role}_hidden_states")
        self.head_numbers = positions.entry(f"{role}_heads") if len(heads) > 1 else None
        # The dtype is settled here and now: the backward, which projects again, runs outside of autocast.
        self.heads = [head.resolved(self.hidden_states) for head in heads]
        self.vocab_size = vocab_size

    def log_probs(self, tile: slice) -> Tensor:
        """`(1, n, V)` float32."""
        if self.head_numbers is None:
            return self._of(self.heads[0], self.hidden_states[tile]).unsqueeze(0)
        numbers = self.head_numbers[tile]
        result = self.hidden_states.new_empty(numbers.size(0), self.vocab_size, dtype=torch.float32)
        for number, head in enumerate(self.heads):
            own = numbers == number
            # Hidden states of several teachers are padded to the widest.
            result[own] = self._of(head, self.hidden_states[tile][own][:, : head.weight.size(1)])
        return result.unsqueeze(0)

    def _of(self, head: OutputHead, hidden_states: Tensor) -> Tensor:
        return project(hidden_states, head, self.vocab_size).log_softmax(dim=-1)


def _expected(scores: Any, kind: type, method: str) -> Any:
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


# --- `distillation_mode` -> its objective ----------------------------------------------------------------------------
OBJECTIVES: dict[str, type[Objective]] = {
    "sampled_token": SampledToken,
    "topk_logits": TopKLogits,
    "full_logits": FullLogits,
    "asymmetric": Asymmetric,
}

_WHAT_IT_TAKES = {
    "full_logits": "It takes hidden states and an output head that is whole in this process, which a server or a "
    "sharded model has not. Set distillation_mode='topk_logits', which needs neither.",
    "topk_logits": "It takes the likeliest tokens of each position. Set distillation_mode='sampled_token'.",
    "asymmetric": "It takes the likeliest tokens of each position. Set distillation_mode='sampled_token'.",
    "sampled_token": "It cannot score tokens. Choose another teacher.",
}


def build_objective(
    args: SGOPDConfig,
    teacher: Teacher | RoutedTeacher,
    reference: Reference | None,
    student_vocab_size: int,
    trainer_class: type,
) -> Objective:
    """The objective of a run, refused where its models cannot serve it.

    Args:
        args: the configuration.
        teacher: of the run.
        reference: of the run, or None.
        student_vocab_size: rows of the student's embedding.
        trainer_class: whose methods may be overridden.

    Raises:
        SGOPDConfigError: names the model that cannot serve it, a support wider than the vocabulary, or routes of a
            subclass that the objective would pass over.
    """
    mode = args.distillation_mode
    asked: dict[str, Any] = {"teacher": teacher} | ({"reference": reference} if reference is not None else {})
    for role, model in asked.items():
        if mode not in model.distillation_modes:
            raise SGOPDConfigError(
                f"`distillation_mode={mode!r}` is not supported with this {role}, which can serve "
                f"{', '.join(map(repr, sorted(model.distillation_modes)))}. {_WHAT_IT_TAKES[mode]}"
            )
    vocab_size = min([student_vocab_size, *(model.vocab_size for model in asked.values())])
    kind = OBJECTIVES[mode]
    if issubclass(kind, SupportObjective) and args.support_size > vocab_size:
        raise SGOPDConfigError(
            f"`distillation_topk` must not exceed the {vocab_size} ids that all models have, got "
            f"{args.support_size}. There are no more tokens. Set distillation_topk to at most {vocab_size}."
        )
    _check_routes(trainer_class, kind, mode)
    return kind(args, teacher, reference, vocab_size)


def _check_routes(trainer_class: type, kind: type[Objective], mode: str) -> None:
    """Refuse a subclass that overrides `route_advantages` where only `route_lambdas` is read."""

    def author(name: str) -> type:
        return next(owner for owner in trainer_class.__mro__ if name in vars(owner))

    passed_over = author("route_advantages") is not author("route_lambdas")
    passed_over = passed_over and issubclass(author("route_advantages"), author("route_lambdas"))
    if kind.routes_targets and passed_over:
        raise SGOPDConfigError(
            f"`{trainer_class.__name__}.route_advantages` is not what is trained on under distillation_mode={mode!r}: "
            "the routes pick the target of whole distributions there. Override `route_lambdas` (too), or set "
            "distillation_mode='sampled_token'."
        )
