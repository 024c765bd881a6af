"""`SGOPDTrainer`: wires teacher, verifier and gate into the loss of `trl.GRPOTrainer`. It does no arithmetic."""

import logging
import math
import textwrap
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.nn import functional

from . import core
from .bookkeeping import (
    LastStep,
    TrainingMetrics,
    card_arguments,
    checkpoint_facts,
    compare_checkpoint_facts,
    keep_last_step,
    reduce_over_ranks,
    timed,
)
from .config import SGOPDConfig
from .core import anchored_loss
from .errors import NonFiniteError, SGOPDConfigError, TeacherError
from .models.batch import TokenBatch, longest, loss_mask, score_rows, sort_windows, token_batch, trim_micro_batch
from .models.forward import HeadRequest, scattered
from .models.head import OutputHead
from .objectives import Objective, Positions, Scores, build_objective
from .preflight import check_arguments, check_run, default_config, prepare_student
from .random_state import forked_random_state
from .reporting.model_card import build_model_card
from .run import inherits
from .teacher_sampling.callback import AnchorBinding, AnchorStep, sampling_of, with_anchor_callback
from .teacher_sampling.stored.cache import RolloutCache, open_cache
from .teachers import RoutedTeacher, Sampling, Teacher
from .teachers.build import build_reference, build_teacher, default_reference
from .teachers.fit import SharedVocabulary
from .teachers.reference import Reference, evaluating
from .teachers.routed import drop_prefetched, prefetching_teachers, teacher_batch, teacher_of, teacher_prompt_ids
from .trl_seam import GRPOSeam, add_head_output, fused_log_probs, is_conversational
from .verifiers.verdicts import RunVerifier

if TYPE_CHECKING:
    from .teacher_sampling.callback import AnchorStep

logger = logging.getLogger(__name__)


class TokenFactors(NamedTuple):
    """Weights of a micro-batch's tokens, `(B, T)` each and detached; None where a weight is off.

    Attributes:
        stability: phi (Eq. 9), from `SGOPDTrainer.compute_token_weights`.
        prefix: IW-OPD's.
        drift: of the drift gate, of unit mean in each row.
        drift_gates: g of the drift gate before that, for the metrics.
    """

    stability: Tensor
    prefix: Tensor | None
    drift: Tensor | None
    drift_gates: Tensor | None

    @property
    def applied(self) -> list[Tensor]:
        """The factors of the loss."""
        return [weights for weights in (self.stability, self.prefix, self.drift) if weights is not None]


class TokenWeights:
    """What `config_fields.weights` and the controls of the gate do to a run.

    Args:
        args: the trainer's configuration.
        tokenizer: the student's.

    Raises:
        SGOPDConfigError: a setting that the tokenizer cannot honour.
    """

    def __init__(self, args: Any, tokenizer: Any) -> None:
        self._args = args
        self._special_ids = special_token_ids(tokenizer, args.special_token_mask or [])
        by_line = args.drift_gate_tau is not None and args.drift_block_size is None
        self._newline_ids = newline_token_ids(tokenizer) if by_line else []
        if args.drift_gate_tau is not None:
            _warn_without_drift(args)

    # --- rollouts ------------------------------------------------------------------------------------------------
    def prepare(self, rollouts: dict, trainer: Any) -> dict:
        """Rollouts of a generation batch with their special tokens masked and, for a random gate, its numbers."""
        args, accelerator = self._args, trainer.accelerator
        if self._special_ids:
            before = float(rollouts["num_items_in_batch"])
            rollouts = mask_special_tokens(
                rollouts, self._special_ids, args.special_token_mask_scope, accelerator.gather
            )
            left_out = before - float(rollouts["num_items_in_batch"])
            trainer.metrics.add(trainer.mode, "weights/special_masked", left_out, before)
        if args.gate_signal == "random":
            key = f"{args.seed} {trainer.state.global_step} {accelerator.process_index}"
            rollouts = rollouts | {"gate_numbers": _random_numbers(rollouts["completion_ids"], key)}
        return rollouts

    @property
    def all_taught(self) -> bool:
        """Whether the advantage of every row comes from the teacher, whatever its verdict."""
        return self._args.wrong_rollout_advantage is None

    def counts(self, completion_ids: list[int]) -> bool:
        """Whether any token of a completion is left in the loss by `special_token_mask`."""
        ids = torch.tensor([completion_ids], dtype=torch.long)
        scope = self._args.special_token_mask_scope
        return bool(core.without_special_tokens(ids, torch.ones_like(ids), self._special_ids, scope).any())

    def taught(self, verdicts: Tensor) -> Tensor:
        """Rows `(B,)` bool whose advantage comes from the teacher: all but the wrong ones of that control."""
        return torch.ones_like(verdicts, dtype=torch.bool) if self.all_taught else verdicts != 0

    # --- the loss ------------------------------------------------------------------------------------------------
    def deal_gate(self, gate: Tensor | None, inputs: dict, mask: Tensor) -> Tensor | None:
        """The verifier's gate `(B, T)`, or the random one in its place."""
        if gate is None or self._args.gate_signal != "random":
            return gate
        return core.random_gate(gate, mask * self.taught(inputs["verdicts"]).unsqueeze(1), inputs["gate_numbers"])

    def fix_advantages(self, advantages: Tensor, inputs: dict) -> Tensor:
        """Routed advantages `(B, T)`, the wrong rollouts' replaced where that control is on."""
        return self._without_teacher(advantages, inputs, self._args.wrong_rollout_advantage)

    def factors(
        self, stability: Tensor, teacher_advantages: Tensor, logps: tuple[Tensor, Tensor], mask: Tensor, inputs: dict
    ) -> TokenFactors:
        """All weights of a micro-batch.

        Args:
            stability: `(B, T)` phi.
            teacher_advantages: `(B, T)` a2, not routed.
            logps: `(B, T)` each, of the policy that made the rollouts and of the current one.
            mask: `(B, T)`, 1 = counts.
            inputs: the micro-batch.

        Returns:
            The weights; those that ask the teacher are 1 in rows that it did not score.
        """
        args, prefix, drift, gates = self._args, None, None, None
        if args.iw_opd_gamma > 0:
            prefix = core.prefix_importance_weight(teacher_advantages, mask, args.iw_opd_gamma)
            prefix = self._without_teacher(prefix, inputs, 1.0)
        if args.drift_gate_tau is not None:
            drift, gates = (self._drift(logps, mask, inputs, norm) for norm in ("sequence", "none"))
        return TokenFactors(self._without_teacher(stability, inputs, 1.0), prefix, drift, gates)

    def _drift(self, logps: tuple[Tensor, Tensor], mask: Tensor, inputs: dict, norm: str) -> Tensor:
        args, size, spans = self._args, self._args.drift_block_size, None
        if size is None:
            ids = inputs["completion_ids"]
            spans = core.span_numbers(ids, torch.tensor(self._newline_ids, device=ids.device))
        return core.drift_gate(
            *logps, mask, args.drift_gate_tau, size or 1, span_ids=spans, mean=args.drift_gate_mean, norm=norm
        )

    def _without_teacher(self, values: Tensor, inputs: dict, value: float | None) -> Tensor:
        if self._args.wrong_rollout_advantage is None or value is None:
            return values
        return core.fixed_on_rows(values, ~self.taught(inputs["verdicts"]), value)


def _warn_without_drift(args: Any) -> None:
    """Where each generation batch is used up in one update, the policy is still the one that wrote it."""
    if args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) == 0:
        logger.warning(
            "`drift_gate_tau=%s` does nothing with num_iterations=%d and steps_per_generation=%d: each rollout is "
            "used in one update, before the policy could drift. Set num_iterations=2.",
            args.drift_gate_tau,
            args.num_iterations,
            args.steps_per_generation,
        )


def _random_numbers(completion_ids: Tensor, key: str) -> Tensor:
    """`(B, T)` uniform numbers that depend on the key and the rollouts alone, so that a resumed run draws the same."""
    seed = zlib.crc32(completion_ids.cpu().numpy().tobytes(), zlib.crc32(key.encode()))
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(completion_ids.shape, generator=generator).to(completion_ids.device)


def special_token_ids(tokenizer: Any, strings: Sequence[str]) -> list[int]:
    """Ids of all tokens of some strings, as arXiv:2603.25562 counts them: a string of several tokens gives each.

    Args:
        tokenizer: the student's.
        strings: `special_token_mask`.

    Returns:
        Ids in order, each once.

    Raises:
        SGOPDConfigError: a string that the tokenizer has no token for.
    """
    ids: list[int] = []
    for string in strings:
        parts = tokenizer.encode(string, add_special_tokens=False)
        if not parts or (tokenizer.unk_token_id in parts and string != tokenizer.unk_token):
            raise SGOPDConfigError(
                f"`special_token_mask` must hold strings that the student's tokenizer knows, got {string!r}. It has "
                "no token for it, so that nothing or every unknown token would be masked. Set the list to strings "
                "of the student's chat template."
            )
        if len(parts) > 1:
            logger.warning(
                "%r of `special_token_mask` is no token of its own but %d: %s. Each of them is masked wherever it "
                "occurs.",
                string,
                len(parts),
                ", ".join(map(repr, tokenizer.convert_ids_to_tokens(parts))),
            )
        ids += parts
    return list(dict.fromkeys(ids))


def newline_token_ids(tokenizer: Any) -> list[int]:
    """Ids of all tokens with a newline in their text.

    Raises:
        SGOPDConfigError: the tokenizer has none.
    """
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    ids = [token for token, text in enumerate(texts) if "\n" in text]
    if not ids:
        raise SGOPDConfigError(
            "`drift_gate_block='newline'` is not supported with this tokenizer: no token of it has a newline, so that "
            "every rollout would be one block. Set drift_gate_block to a number of tokens, e.g. 64."
        )
    return ids


def mask_special_tokens(rollouts: dict, special_ids: Sequence[int], scope: str, gather: Callable) -> dict:
    """Take special tokens out of a generation batch's loss.

    TRL multiplies `completion_mask` by `tool_mask` in its loss and reads `tool_mask` nowhere else by then; attention
    follows `completion_mask` alone. With loss_type "dapo" the loss is divided by `num_items_in_batch`.

    Args:
        rollouts: TRL's, `(B, T)` entries.
        special_ids: token ids.
        scope: `first` or `all`.
        gather: over ranks.

    Returns:
        The rollouts with `tool_mask` and `num_items_in_batch` as they are without these tokens.
    """
    counted = rollouts["completion_mask"]
    if "tool_mask" in rollouts:
        counted = counted * rollouts["tool_mask"]
    kept = core.without_special_tokens(rollouts["completion_ids"], counted, special_ids, scope)
    return rollouts | {"tool_mask": kept, "num_items_in_batch": gather(kept.sum()).sum()}


class Signals(NamedTuple):
    """What is known of a micro-batch's tokens before their loss, `(B, T)` each and detached.

    Attributes:
        behaviour: log-probs of the policy that made the rollouts.
        teacher_advantages: a2.
        gate: classes; None without a gate.
        advantages: routed.
        factors: weights of the loss.
        matched: bool, tokens whose distribution is matched.
        targets: lambda and scale of every token's target.
    """

    behaviour: Tensor
    teacher_advantages: Tensor
    gate: Tensor | None
    advantages: Tensor
    factors: TokenFactors
    matched: Tensor
    targets: core.RoutedLambdas


class MicroBatchLoss:
    """Turns the student's log-probs and distributions into what TRL's loss reads.

    TRL's loss of a token is linear in its advantage where the probability ratio is 1. So a token whose distribution is
    matched is given a ratio of 1 and the advantage `-loss`, with the gradient of that loss; every reduction, mask and
    normaliser stays TRL's.

    Args:
        trainer: whose methods decide.
        inputs: the micro-batch; entries are added and replaced.
    """

    def __init__(self, trainer: "SGOPDTrainer", inputs: dict) -> None:
        self._trainer = trainer
        self._inputs = inputs
        self._mask = loss_mask(inputs)
        self._signals: Signals | None = None
        matches = trainer.objective.matches
        self.request = HeadRequest(self._mask != 0, self._match) if matches else None

    def merge(self, student_logps: Tensor, answer: tuple[Tensor, ...] | None = None) -> Tensor:
        """Write the entries that TRL's loss reads next.

        Args:
            student_logps: `(B, T)` from its only forward, with gradient.
            answer: what the request computed there.

        Returns:
            The log-probs that it shall go on with: without gradient where distributions are matched.
        """
        inputs, mask = self._inputs, self._mask
        signals = self._signals_of(student_logps.detach())
        advantages = core.weighted_advantages(signals.advantages, *signals.factors.applied)
        inputs["matching"] = mask.new_zeros(2, dtype=torch.float32)
        if answer is not None:
            losses, weights = scattered(answer[0], signals.matched), signals.targets.scales
            advantages = core.matched_advantages(
                advantages, losses, signals.matched, weights, *signals.factors.applied
            )
            inputs["matching"] = core.masked_sum_and_count(losses * weights, signals.matched)
            student_logps = self._without_ratio(student_logps, signals.matched)
        inputs["advantages"] = advantages
        known = (student_logps + advantages).detach()
        inputs["not_finite"] = ((~torch.isfinite(known)) & (mask != 0)).sum()
        inputs["statistics"] = self._statistics(signals)
        return student_logps

    def _match(self, hidden_states: Tensor, head: OutputHead, logps: Tensor) -> tuple[Tensor, ...]:
        """Losses `(N,)` of the matched tokens, computed inside the student's forward."""
        counted = self._mask != 0
        signals = self._signals_of(scattered(logps.detach(), counted))
        if self._everything_matched:
            chosen = hidden_states, head, logps
        else:
            inside = signals.matched[counted]
            chosen = hidden_states[inside], head, logps[inside]
        positions = Positions(*chosen, signals.targets.lambdas[signals.matched], self._entry)
        return (self._trainer.objective.losses(positions),)

    def _entry(self, name: str) -> Tensor:
        values, matched = self._inputs[name], self._known.matched
        return (values.unsqueeze(1).expand(matched.shape) if values.dim() == 1 else values)[matched]

    @property
    def _everything_matched(self) -> bool:
        """Whether no token that counts keeps its policy gradient; without waiting for the device."""
        return self._trainer.objective.routes_targets and self._trainer.args.wrong_rollout_advantage is None

    @property
    def _known(self) -> Signals:
        if self._signals is None:
            raise RuntimeError("the signals of a micro-batch are known after its forward")
        return self._signals

    def _without_ratio(self, student_logps: Tensor, matched: Tensor) -> Tensor:
        """A probability ratio of 1 at matched tokens, in the inner updates and in vLLM's correction too."""
        inputs, constant = self._inputs, student_logps.detach()
        if "old_per_token_logps" in inputs:
            inputs["old_per_token_logps"] = torch.where(matched, constant, inputs["old_per_token_logps"])
        if "importance_sampling_ratio" in inputs:
            inputs["importance_sampling_ratio"] = torch.where(matched, 1.0, inputs["importance_sampling_ratio"])
        return constant if self._everything_matched else torch.where(matched, constant, student_logps)

    def _signals_of(self, student_logps: Tensor) -> Signals:
        """The signals, found once: inside the forward where distributions are matched, otherwise after it."""
        if self._signals is None:
            self._signals = self._find(student_logps)
        return self._signals

    def _find(self, student_logps: Tensor) -> Signals:
        trainer, inputs, mask = self._trainer, self._inputs, self._mask
        weights = trainer.token_weights
        # Scores of the policy that made the rollouts keep a2 and the gate fixed over the inner updates of a batch.
        behaviour = inputs.get("old_per_token_logps", student_logps)
        teacher, verifier = inputs["teacher_logps"], inputs["verifier_advantages"]
        a2 = core.reverse_kl_advantage(behaviour, teacher)
        gate = trainer.compute_gate(verifier, a2) if trainer.args.sign_gated_extrapolation else None
        gate = weights.deal_gate(gate, inputs, mask)
        routed = trainer.route_advantages(gate, behaviour, teacher, inputs.get("reference_logps"), verifier)
        routed = weights.fix_advantages(routed, inputs)
        phi = trainer.compute_token_weights(a2, mask, inputs)
        factors = weights.factors(phi, a2, (behaviour, student_logps), mask, inputs)
        return Signals(behaviour, a2, gate, routed, factors, *self._targets(behaviour, gate, a2))

    def _targets(self, behaviour: Tensor, gate: Tensor | None, a2: Tensor) -> tuple[Tensor, core.RoutedLambdas]:
        trainer, inputs = self._trainer, self._inputs
        one = torch.ones_like(a2)
        targets = core.RoutedLambdas(one, one)
        if trainer.objective.routes_targets:
            targets = trainer.route_lambdas(gate, a2, inputs["verifier_advantages"])
        taught = trainer.token_weights.taught(inputs["verdicts"]).unsqueeze(1)
        matched = trainer.objective.matched(behaviour, inputs) & (self._mask != 0) & taught
        self._check_reference(targets.lambdas, matched)
        return matched, targets

    def _check_reference(self, lambdas: Tensor, matched: Tensor) -> None:
        """Only routes of a subclass can ask for a reference that the settings did not."""
        if not self._trainer.args.needs_reference and bool(((lambdas != 1) & matched).any()):
            raise ValueError(
                "`route_lambdas` returned a lambda other than 1, but no setting asked for a reference, so none was "
                "loaded. Lambda weighs the teacher against it. Set `lambda_high` or `lambda_base` to the lambda that "
                "is used, or return 1."
            )

    def _statistics(self, signals: Signals) -> core.TokenStatistics:
        verdicts: Any = self._inputs["verdicts"]
        return core.token_statistics(
            gate=signals.gate,
            advantages=signals.advantages,
            teacher_advantages=signals.teacher_advantages,
            stability_weights=signals.factors.stability,
            mask=self._mask,
            right=verdicts == 1,
            wrong=verdicts == 0,
            taught=self._trainer.token_weights.taught(verdicts),
            prefix_weights=signals.factors.prefix,
            drift_gates=signals.factors.drift_gates,
        )


PolicyOutput = tuple[Tensor, Tensor | None, Tensor | None]
Run = Callable[..., PolicyOutput]


class JointForward:
    """Appends anchor rows to the forward inside TRL's loss and takes their log-probs out again.

    TRL sees exactly the rows and columns it asked for.

    Args:
        anchor: the anchor's rows, or None.
        on_student_logps: called with the student rows' log-probs `(B, T)`, with gradient, before TRL reads the
            advantages; returns those that TRL goes on with.
        request: answered in the same forward for the student's rows, or None.

    Attributes:
        anchor_logps: log-probs of the anchor's completions `(R, T_anchor)`, with gradient; None without rows.
    """

    def __init__(
        self,
        anchor: TokenBatch | None,
        on_student_logps: Callable[..., Tensor],
        request: HeadRequest | None = None,
    ) -> None:
        self.anchor = anchor
        self.request = request
        self.on_student_logps = on_student_logps
        self.anchor_logps: Tensor | None = None

    def __call__(self, run: Run, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> PolicyOutput:
        """Run the policy once; see `GRPOSeam.policy_forward`."""
        answer: list[Any]
        rows = input_ids.size(0)
        run = run if self.request is None else partial(run, request=self.request)
        if self.anchor is None:
            logps, entropies, auxiliary_loss, *answer = run(input_ids, attention_mask, completion_length)
        else:
            joint = _joined(self.anchor, input_ids, attention_mask, completion_length)
            logps, entropies, auxiliary_loss, *answer = run(*joint)
            self.anchor_logps = logps[rows:, : self.anchor.completion_ids.size(1)]
            logps = logps[:rows, :completion_length]
            entropies = None if entropies is None else entropies[:rows, :completion_length]
        return self.on_student_logps(logps, *answer), entropies, auxiliary_loss


def _joined(
    anchor: TokenBatch, input_ids: Tensor, attention_mask: Tensor, completion_length: int
) -> tuple[Tensor, Tensor, int]:
    """Both sets of rows, the last prompt token of all rows in the same column."""
    anchor_ids, anchor_mask = anchor.joined()
    prompt_widths = input_ids.size(1) - completion_length, anchor.prompt_ids.size(1)
    widths = completion_length, anchor.completion_ids.size(1)

    def aligned(student_part: Tensor, anchor_part: Tensor) -> Tensor:
        parts = zip((student_part, anchor_part), prompt_widths, widths, strict=True)
        return torch.cat([functional.pad(part, (max(prompt_widths) - p, max(widths) - t)) for part, p, t in parts])

    return aligned(input_ids, anchor_ids), aligned(attention_mask, anchor_mask), max(widths)


def anchor_only_loss(trainer: "SGOPDTrainer", model: Any, step: "AnchorStep") -> Tensor:
    """Loss of a micro-batch that holds teacher rollouts only.

    A micro-batch without any still runs one forward, on one token that counts nothing: with sharded or replicated
    weights all ranks must take part.

    Args:
        trainer: whose student is trained.
        model: the student as the training loop wraps it.
        step: anchor of the optimizer step.

    Returns:
        0-dim loss, alpha times this rank's part of the anchor.

    Raises:
        NonFiniteError: on every rank, before anything is updated.
    """
    device, padding = trainer.accelerator.device, trainer.tokenizer.pad_token_id
    rows = step.take(padding, device, trainer.width_multiple)
    batch = rows or TokenBatch.from_lists([[padding]], [[padding]], padding, device, trainer.width_multiple)
    input_ids, attention_mask = batch.joined()
    logps = trainer.policy_log_probs(model, input_ids, attention_mask, batch.completion_ids.size(1))
    if rows is None:
        batch = replace(batch, completion_mask=torch.zeros_like(batch.completion_mask))
    anchor = trainer.anchor_loss(logps, batch, step.total)
    _report(trainer, anchor.detach())
    return anchored_loss(anchor.new_zeros(()), anchor, step.alpha, trainer.accelerator.num_processes)


def _report(trainer: "SGOPDTrainer", anchor: Tensor) -> None:
    """Log the anchor's loss over all ranks, and stop all of them if it is not finite anywhere."""
    total = float(trainer.accelerator.reduce(anchor.float(), reduction="sum"))
    if not math.isfinite(total):
        raise NonFiniteError(
            f"The anchor's loss of step {trainer.state.global_step + 1} is {total}. Nothing was updated in this step. "
            "Check the student's weights, lower `learning_rate`, or train in float32 or bfloat16."
        )
    trainer.metrics.add("train", "anchor/loss", total, float(trainer.accelerator.sync_gradients))


@contextmanager
def scoring_ahead(trainer: "SGOPDTrainer", examples: Sequence[dict], known: bool) -> Iterator[None]:
    """While a generation batch is made and scored, have the teacher begin early what it can.

    Args:
        trainer: whose teacher scores.
        examples: the data set's row of each completion.
        known: whether the trainer will ask the teacher for each of them, and for nothing else.
    """
    trainer.on_completions = ScoringAhead(trainer, examples) if known and scores_every_rollout(trainer) else None
    try:
        yield
    finally:
        trainer.on_completions = None
        for teacher in prefetching_teachers(trainer.teacher):
            teacher.drop_prefetched_scores()


def scores_every_rollout(trainer: "SGOPDTrainer") -> bool:
    """Whether some teacher can begin ahead of time, and its scores are used whatever the verdict will be."""
    args = trainer.args
    # Tools and environments go on writing where the student has ended.
    single_turn = not trainer.tools and trainer.rollout_func is None and trainer.environment_factories is None
    used = trainer.mode == "train" or args.eval_with_teacher
    return used and single_turn and trainer.token_weights.all_taught and bool(prefetching_teachers(trainer.teacher))


class ScoringAhead:
    """Listens to the completions of one generation batch, and has the teacher begin to score them.

    What it asks is what `SGOPDTrainer.score_with_teacher` will ask; if it were not, it would be dropped.

    Args:
        trainer: whose teacher scores.
        examples: the data set's row of each completion.
    """

    def __init__(self, trainer: "SGOPDTrainer", examples: Sequence[dict]) -> None:
        self.trainer = trainer
        self.examples = examples
        self._left = set(range(len(examples)))
        self._read: list[list[int]] | None = None

    def __call__(
        self, prompt_ids: Sequence[list[int]], rows: Sequence[int], completion_ids: Sequence[list[int]]
    ) -> None:
        """Completions are there: begin those that are new and count."""
        trainer = self.trainer
        if self._read is None:
            self._read = teacher_prompt_ids(self.examples, prompt_ids, trainer.tokenize_prompts)
        new = {row: ids for row, ids in zip(rows, completion_ids, strict=True) if row in self._left}
        self._left -= new.keys()
        usable = {row: trainer.vocabulary.usable(ids) for row, ids in new.items() if not self._is_masked(ids)}
        begun = {row: ids for row, ids in usable.items() if trainer.token_weights.counts(ids)}
        if begun:
            teacher: Any = teacher_of(trainer.teacher, [self.examples[row] for row in begun])
            trainer.objective.prefetch_scores(teacher, [self._read[row] for row in begun], list(begun.values()))

    def _is_masked(self, completion_ids: list[int]) -> bool:
        """Whether TRL leaves a completion out because it was cut off."""
        trainer = self.trainer
        ends = {*trainer.eos_token_ids, trainer.tokenizer.pad_token_id}
        return trainer.args.mask_truncated_completions and not ends & set(completion_ids[-1:])


_TIMED_PARTS = ("rollout", "verify", "teacher", "reference", "anchor", "loss")


class DistillationRuntime(GRPOSeam):
    """`GRPOSeam` with everything of SG-OPD that is neither a decision nor the loss."""

    args: SGOPDConfig
    metrics: TrainingMetrics
    anchor: AnchorStep | None
    verifier: RunVerifier
    teacher: Teacher | RoutedTeacher
    vocabulary: SharedVocabulary
    reference: Reference | None
    teacher_sampling: Sampling
    rollout_cache: RolloutCache | None
    reuses_trl_reference: bool
    aux_loss_enabled: bool
    max_completion_length: int
    num_generations: int
    num_generations_eval: int

    evaluations: dict | None = None
    """Results by name that the model card shows; a name with `after` in it is the student's own."""

    teacher_tokens: Sequence[int] = (0, 0)
    """Completion tokens scored and generated by teachers so far, over all ranks and the runs before a resumed one."""

    _tokens_before: Sequence[int] = (0, 0)
    _before_micro_batch: Callable[[], None] | None = None
    _examples: Sequence[dict] = ()

    def build_verifier(self) -> RunVerifier:
        """The verifier among the reward functions; it must be binary where something depends on its verdicts."""
        args = self.args
        return RunVerifier(
            self.reward_funcs,
            self.reward_func_names,
            args.verifier_reward_func,
            binary=args.sign_gated_extrapolation
            or args.teacher_sampling_enable
            or args.wrong_rollout_advantage is not None,
            event_loop=self.event_loop,
        )

    def build_vocabulary(self) -> SharedVocabulary:
        """The ids that all models have; from now on the student's own sampler keeps to them."""
        models = [self.model.config.get_text_config(), self.teacher, self.reference]
        vocabulary = SharedVocabulary(self.tokenizer, [x.vocab_size for x in models if x is not None])
        if vocabulary.unusable and not self.use_vllm:
            self.suppress_tokens(vocabulary.unusable)
        return vocabulary

    # --- rollouts and micro-batches ------------------------------------------------------------------------------
    def remember_examples(self, examples: list[dict]) -> dict:
        """Keep a training generation batch's rows, and tag each rollout with its row through shuffle and split."""
        if self.mode == "eval":
            return {}
        self._examples = examples
        return {"example_index": torch.arange(len(examples), device=self.accelerator.device)}

    def usable_rollouts(self, rollouts: dict) -> dict:
        """The rollouts without the ids that some model lacks, which are counted."""
        if not self.vocabulary.unusable:
            return rollouts
        rollouts, left_out = self.vocabulary.leave_out(rollouts, self.accelerator.gather)
        self.metrics.add(self.mode, "teacher/unusable_tokens", left_out)
        return rollouts

    def window_examples(self) -> list[dict]:
        """This rank's examples of the current optimizer step, one per prompt, in the data set's order."""
        rows = sorted(self.window_entries("example_index").tolist())
        by_prompt = {repr(self._examples[row]["prompt"]): self._examples[row] for row in rows}
        return list(by_prompt.values())

    def run_before_micro_batch(self, action: Callable[[], None]) -> None:
        """Run an action once, when the next training micro-batch and its generation batch are known."""
        self._before_micro_batch = action

    def on_slices(self, slices: list[dict]) -> list[dict]:
        """Order rows by length inside each optimizer step, where that leaves the update as it is."""
        accumulation, generation = self.args.gradient_accumulation_steps, len(slices)
        aligned = generation % accumulation == 0 or accumulation % generation == 0
        if not aligned or self.depends_on_micro_batches:
            return slices
        return sort_windows(slices, min(accumulation, generation))

    @property
    def needs_rollouts(self) -> bool:
        """Whether the student writes for the next micro-batch: not in stage 1 of TimeSep."""
        return self.mode == "eval" or self.anchor is None or not self.anchor.alone

    @property
    def depends_on_micro_batches(self) -> bool:
        """Whether the loss averages over a micro-batch as a whole, so that its rows matter to one another."""
        args = self.args
        entropy = args.entropy_coef != 0.0 or args.use_adaptive_entropy or args.top_entropy_quantile < 1.0
        return args.loss_type == "bnpo" or entropy or self.aux_loss_enabled

    def score_for_trl(self, model: Any, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
        """Old-policy and reference scores that TRL asks for, in trimmed batches; rows without a token stay 0."""
        split = input_ids.size(1) - completion_length
        ids, mask = (x.tensor_split([split], dim=1) for x in (input_ids, attention_mask))
        batch = TokenBatch(ids[0], mask[0], ids[1], mask[1], self.width_multiple)
        score = partial(super().score_for_trl, model)
        # Without dropout: the adapter that TRL scores as its reference may have some.
        with evaluating(model):
            return score_rows(score, batch, mask[1].any(dim=1), self.scoring_budget(batch), self.agree_on_calls)

    def agree_on_calls(self, calls: int) -> int:
        """The largest number of forwards over all ranks, where a forward is a collective operation."""
        if not self.sharded:
            return calls
        return int(self.accelerator.gather(torch.tensor([calls], device=self.accelerator.device)).max())

    def on_micro_batch(self, inputs: dict) -> dict:
        """Trim the micro-batch to its own rows."""
        action = self._before_micro_batch
        if self.mode == "train" and action is not None:
            self._before_micro_batch = None
            action()
        return trim_micro_batch(inputs, self.width_multiple)

    @property
    def width_multiple(self) -> int:
        """What the widths of all batches are multiples of."""
        return int(self.args.pad_to_multiple_of or 1)

    @property
    def rollouts_per_prompt(self) -> int:
        """Size of a group, in training or in evaluation."""
        return int(self.num_generations if self.mode == "train" else self.num_generations_eval)

    @property
    def student_prompts_per_step(self) -> float:
        """Student prompts of the current optimizer step over all ranks."""
        rows = self.args.per_device_train_batch_size * self.current_gradient_accumulation_steps
        return rows * self.accelerator.num_processes / self.num_generations

    def judge(self, examples: list[dict], completion_ids: list[list[int]]) -> list[float | None]:
        """The verifier's verdicts on teacher completions."""
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        if is_conversational({"prompt": examples[0]["prompt"]}):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        return self.verifier.judge(examples, texts, completion_ids, self.state)

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Add the wall time of a block to one part of the step."""
        return timed(self.seconds, part)

    # --- scoring -------------------------------------------------------------------------------------------------
    def scoring_budget(self, batch: TokenBatch) -> int:
        """Tokens of one scoring forward: what a training micro-batch of full length holds, unless set."""
        width = longest(batch.prompt_mask) + self.max_completion_length
        return self.args.max_tokens_per_scoring_batch or self.args.per_device_train_batch_size * width

    def generation_budget(self, prompt_ids: list[list[int]]) -> int:
        """Tokens of one teacher generation batch: all of this rank's teacher prompts of the step, unless set."""
        width = max([1, *map(len, prompt_ids)]) + self.args.teacher_completion_length
        return self.args.max_tokens_per_scoring_batch or max(1, len(prompt_ids)) * width

    def score_with_student(self, batch: TokenBatch, rows: Tensor) -> Tensor:
        """The student's own log-probs before an update, `(B, T)` float32, without gradient."""
        with self.student_scoring() as model, self.accelerator.autocast():
            score = partial(fused_log_probs, model)
            return score_rows(score, batch, rows, self.scoring_budget(batch), self.agree_on_calls)

    def stability_denominator(self, rollouts: dict, batch: TokenBatch, rows: Tensor, teacher_logps: Tensor) -> Tensor:
        """Mean stability weight of the global generation batch, 0-dim; it needs the student's scores beforehand."""
        student_logps = rollouts.get("old_per_token_logps")
        if student_logps is None:
            student_logps = self.score_with_student(batch, rows)
        a2, mask = core.reverse_kl_advantage(student_logps, teacher_logps), loss_mask(rollouts) * rows.unsqueeze(1)
        phi = core.stability_weight(a2, mask, self.args.stability_tau, "none")
        return core.mean_of(self.accelerator.reduce(core.masked_sum_and_count(phi, mask), reduction="sum"))

    # --- running -------------------------------------------------------------------------------------------------
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; whichever way that ends, a teacher does not go on with what nobody will ask for."""
        last = LastStep(self)
        self.add_callback(last)
        try:
            return super().train(*args, **kwargs)
        except TeacherError as error:
            keep_last_step(self, last, error)
            raise
        finally:
            self.remove_callback(last)
            drop_prefetched(self.teacher)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, its wall time split into parts."""
        start, inside = time.perf_counter(), sum(self.seconds.values())
        loss = super().training_step(model, inputs, num_items_in_batch)
        elsewhere = sum(self.seconds.values()) - inside
        self.seconds["loss"] += time.perf_counter() - start - elsewhere
        if self.accelerator.sync_gradients:
            self._report_cost()
        return loss

    def _report_cost(self) -> None:
        """Seconds of the step's parts and tokens of the teacher; whole numbers, which every device adds up exactly."""
        nanoseconds = [round(self.seconds[part] * 1e9) for part in _TIMED_PARTS]
        own = [*nanoseconds, self.teacher.tokens_scored, self.teacher.tokens_generated]
        ranks = self.accelerator.gather(torch.tensor([own], device=self.accelerator.device))
        *totals, scored, generated = ranks.sum(dim=0).tolist()
        for part, total in zip(_TIMED_PARTS, totals, strict=True):
            self.metrics.add("train", f"time/{part}", total / 1e9, ranks.size(0))
        self.seconds.clear()
        now = (scored, generated)
        self.teacher_tokens = [count + before for count, before in zip(now, self._tokens_before, strict=True)]
        for name, count in zip(("scored", "generated"), self.teacher_tokens, strict=True):
            self.metrics.set("train", f"teacher/{name}_tokens", count)

    def on_grad_norm(self, grad_norm: Any) -> None:
        """Stop before a gradient that is not finite reaches the optimizer.

        Raises:
            NonFiniteError: on every rank, as the norm is the same on all of them.
        """
        # A float16 scaler expects an infinite norm now and then, and skips the step itself.
        if self.args.fp16 or grad_norm is None or torch.isfinite(torch.as_tensor(grad_norm)):
            return
        stepped = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        taken = "DeepSpeed took this step already: go back to a checkpoint."
        now = taken if stepped else "The weights are as they were before."
        raise NonFiniteError(
            f"The gradient norm of step {self.state.global_step + 1} is {float(grad_norm)}, which the optimizer "
            f"spreads to every weight. {now} Lower `learning_rate`, train in float32 or bfloat16, or look at the "
            "rollouts of this step."
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the training run's random state is left as it was."""
        with forked_random_state(self.accelerator.device), self._unchanged_times():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _unchanged_times(self) -> Iterator[None]:
        before = dict(self.seconds)
        yield
        self.seconds.clear()
        self.seconds.update(before)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with this window's `gate/`, `teacher/`, `anchor/` and `time/` metrics among TRL's."""
        for name, value in self.metrics.drain(self.mode).items():
            self.report_metric(self.mode, name, value)
        super().log(logs, start_time)

    # --- what is written -----------------------------------------------------------------------------------------
    def checkpoint_state(self) -> dict:
        """Who taught and what was the reference, so that a resumed run can be told from another."""
        return checkpoint_facts(self)

    def check_checkpoint_state(self, state: dict) -> None:
        """Refuse to continue a run with another teacher or reference, and count on from its tokens."""
        compare_checkpoint_facts(self, state)
        self._tokens_before = state.get("teacher_tokens", (0, 0))

    def create_model_card(  # type: ignore[override]  # TRL's signature, not that of transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card of the student: who taught it, how, and from which base."""
        if self.is_world_process_zero():
            card = build_model_card(**card_arguments(self, model_name, dataset_name, tags))
            card.save(f"{self.args.output_dir}/README.md")


class SGOPDTrainer(DistillationRuntime):
    """On-policy distillation with a verifier as the trust signal for the teacher (arXiv:2606.09304).

    A `trl.GRPOTrainer` whose advantage is per token: the teacher's log-ratio `a2 = log pi_teacher - log pi_student`,
    extrapolated where it agrees in sign with the verifier's group advantage `a1`, falling back where it does not. All
    arguments of `GRPOTrainer` mean what they mean there.

    | step | equation | method to override |
    |---|---|---|
    | verdicts -> a1 | group advantage | `compute_verifier_signal` |
    | a1, a2 -> consensus, conflict, neutral | Eq. 4 | `compute_gate` |
    | gate -> advantage | Eq. 5-8 | `route_advantages` |
    | gate -> target distribution | `distillation_mode` | `route_lambdas` |
    | token weights | Eq. 9 | `compute_token_weights` |
    | log-probs of teacher and reference | | `score_with_teacher`, `score_with_reference` |
    | verified teacher rollouts | Eq. 2 | `anchor_loss`, `TeacherAnchorCallback` |

    Args:
        model: student, a path or Hub id or a model.
        reward_funcs: reward functions; the first (or `verifier_reward_func`) is the verifier: 1, 0 or None.
        args: configuration.
        train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers,
            quantization_config, peft_config, tools, rollout_func, environment_factory: as for `GRPOTrainer`.
        teacher_model: path, Hub id, model or teacher, or a mapping from the data set's `teacher_id` to these;
            default: `args.teacher_model_name_or_path`.
        reference_model: path, Hub id or model of the extrapolation's reference; default: the initial student.
        teacher_processing_class: tokenizer of a teacher given as a model, so that its ids can be checked; with several
            teachers a mapping as well.

    Raises:
        SGOPDConfigError: a combination that cannot be honoured.
        DataError: a data set without what the run needs.
        TeacherError: a teacher or reference with another tokenizer.
    """

    _tag_names = ["trl", "grpo", "sg-opd", "distillation"]  # noqa: RUF012  # as TRL declares it
    _name = "SG-OPD"
    _paper = {  # noqa: RUF012
        "title": "SG-OPD: Sign-Gated On-Policy Distillation via Sign-Consistency Gating and Phased Teacher Sampling",
        "id": "2606.09304",
        "citation": textwrap.dedent("""\
            @article{xu2026sgopd,
                title   = {{SG-OPD: Sign-Gated On-Policy Distillation via Sign-Consistency Gating and Phased
                           Teacher Sampling}},
                author  = {Haoran Xu and Hongyu Wang and Yifei Gao and Jiaze Li and Xiaofeng Zhang and Xiaosong Yuan},
                year    = 2026,
                eprint  = {arXiv:2606.09304},
            }"""),
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: SGOPDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list | None = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        teacher_model: Any = None,
        reference_model: Any = None,
        teacher_processing_class: Any = None,
    ) -> None:
        args = default_config(model) if args is None else args
        check_arguments(
            args, teacher_model, reference_model, callbacks, tools, rollout_func, environment_factory, train_dataset
        )
        initial_student = prepare_student(model, args, reference_model, peft_config)
        self.metrics = TrainingMetrics()
        self.anchor: AnchorStep | None = None
        self._verdicts = self._verifier_advantages = torch.empty(0)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=with_anchor_callback(callbacks, args),
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        check_run(self)
        add_head_output(self.model)
        self.token_weights = TokenWeights(args, self.tokenizer)
        self.verifier = self.build_verifier()
        self.teacher = build_teacher(self, teacher_model, teacher_processing_class)
        initial = default_reference(args, reference_model)
        self.reuses_trl_reference = initial and args.beta != 0.0 and not args.sync_ref_model
        self.reference = build_reference(self, reference_model, initial_student)
        self.vocabulary = self.build_vocabulary()
        self.objective: Objective = build_objective(self)
        self.teacher_sampling = sampling_of(self)
        self.rollout_cache = open_cache(self)
        self.add_callback(AnchorBinding(self))

    # --- decisions: override one of these in a notebook ----------------------------------------------------------
    def compute_verifier_signal(self, verdicts: Tensor, num_generations: int) -> Tensor:
        """a1 from verdicts.

        Args:
            verdicts: `(N,)` over all ranks, groups of `num_generations` in a row: 1 right, 0 wrong, NaN abstained.
            num_generations: rollouts per prompt.

        Returns:
            `(N,)` group advantages, exactly 0 for abstentions and in groups without variance.
        """
        return core.verifier_group_advantages(verdicts, num_generations, scale=self.args.scale_rewards)

    def compute_gate(self, verifier_advantages: Tensor, teacher_advantages: Tensor) -> Tensor:
        """Class of every token (Eq. 4): `(B,)` a1 and `(B, T)` a2 -> `(B, T)` +1 consensus, 0 neutral, -1 conflict."""
        return core.sign_consistency_gate(verifier_advantages, teacher_advantages, self.args.gate_dead_zone)

    def route_advantages(
        self,
        gate: Tensor | None,
        student_logps: Tensor,
        teacher_logps: Tensor,
        reference_logps: Tensor | None,
        verifier_advantages: Tensor,
    ) -> Tensor:
        """Advantage of every token (Eq. 5-8); without a gate A(lambda_base) throughout. All `(B, T)`, a1 `(B,)`."""
        if gate is None:
            return core.extrapolated_advantage(student_logps, teacher_logps, reference_logps, self.args.lambda_base)
        signals = student_logps, teacher_logps, reference_logps, verifier_advantages
        return core.route_gated_advantages(gate, *signals, **self.args.route_settings)

    def route_lambdas(
        self, gate: Tensor | None, teacher_advantages: Tensor, verifier_advantages: Tensor
    ) -> core.RoutedLambdas:
        """Target of every token's distribution under `topk_logits` and `full_logits`: a2 `(B, T)`, a1 `(B,)`."""
        if gate is None:
            one = torch.ones_like(teacher_advantages)
            return core.RoutedLambdas(self.args.lambda_base * one, one)
        return core.route_lambdas(gate, teacher_advantages, verifier_advantages, **self.args.route_settings)

    def compute_token_weights(self, teacher_advantages: Tensor, mask: Tensor, inputs: dict) -> Tensor:
        """Weight of every token's advantage (Eq. 9): `(B, T)` a2 and mask -> `(B, T)`, detached."""
        args = self.args
        denominator = inputs.get("stability_denominator")
        return core.stability_weight(teacher_advantages, mask, args.stability_tau, args.stability_norm, denominator)

    def score_with_teacher(self, batch: TokenBatch, rows: Tensor, inputs: dict) -> Scores:
        """The teacher's log-probs of the completions, `(B, T)` float32; `rows` `(B,)` bool are those that count.

        What it is asked besides depends on `distillation_mode`, see `Teacher.score_support` and `score_hidden`.
        """
        teacher = teacher_of(self.teacher, inputs["examples"])
        return self.objective.ask_teacher(teacher, batch, rows, self.scoring_budget(batch))

    def score_with_reference(self, batch: TokenBatch, rows: Tensor, inputs: dict) -> Scores:
        """The reference's log-probs of the completions, see `score_with_teacher`."""
        if self.reference is None:
            return inputs["ref_per_token_logps"]
        return self.objective.ask_reference(self.reference, batch, rows, self.scoring_budget(batch), inputs)

    def reference_rows(self, verifier_advantages: Tensor) -> Tensor:
        """Rows `(B,)` that need the reference; all of them once a subclass decides the gate or the routes itself."""
        if not inherits(type(self), SGOPDTrainer, "compute_gate", "route_advantages", "route_lambdas"):
            return torch.ones_like(verifier_advantages, dtype=torch.bool)
        return core.rows_needing_reference(verifier_advantages, self.args.open_routes)

    def anchor_loss(self, anchor_logps: Tensor, batch: TokenBatch, total: float) -> Tensor:
        """This rank's part of the anchor (Eq. 2): 0-dim, from `(R, T)` log-probs of kept teacher rollouts."""
        args, mask = self.args, batch.completion_mask
        kept = torch.ones(len(batch), dtype=torch.bool, device=mask.device)
        weights = core.anchor_token_weights(anchor_logps, mask, args.teacher_sft_phi)
        return core.anchor_cross_entropy(
            anchor_logps, mask, kept, weights, reduction=args.teacher_sft_reduction, total=total
        )

    # --- the loss ------------------------------------------------------------------------------------------------
    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Merge teacher log-probs, verdicts and gate into TRL's loss, and add the anchor (Eq. 11)."""
        if self.anchor is not None and not self.needs_rollouts:
            return anchor_only_loss(self, model, self.anchor)
        if "teacher_logps" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        step = self.anchor if self.mode == "train" else None
        rows = step.take(self.tokenizer.pad_token_id, self.accelerator.device, self.width_multiple) if step else None
        tokens = MicroBatchLoss(self, inputs)
        forward = JointForward(rows, tokens.merge, tokens.request)
        with self.policy_forward(forward):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        anchor = loss.new_zeros(())
        if step is not None and rows is not None and forward.anchor_logps is not None:
            anchor = self.anchor_loss(forward.anchor_logps, rows, step.total)
            loss = core.anchored_loss(loss, anchor, step.alpha, self.accelerator.num_processes)
        self._report(inputs, loss, anchor.detach())
        return loss

    def _report(self, inputs: dict, loss: Tensor, anchor: Tensor) -> None:
        """Reduce this micro-batch's metrics over ranks, and stop all ranks if anything is not finite."""
        not_finite = inputs["not_finite"] + (~torch.isfinite(loss.detach()))
        sums = torch.cat([torch.stack([anchor.float(), not_finite.float()]), inputs["matching"]])
        statistics, (anchor_sum, bad, *matching) = reduce_over_ranks(self.accelerator, inputs["statistics"], sums)
        if bad:
            raise NonFiniteError(
                f"{int(bad)} of the student's log-probs, advantages or losses of step {self.state.global_step + 1} "
                "are not finite. Nothing was updated in this step. Check the student's weights, lower "
                "`learning_rate`, or train in float32 or bfloat16."
            )
        self.metrics.add_tokens(self.mode, statistics)
        self.metrics.add(self.mode, "teacher/matching_loss", *matching)
        if self.mode == "train" and self.anchor is not None:
            self.metrics.add("train", "anchor/loss", anchor_sum, float(self.accelerator.sync_gradients))

    # --- hooks of the seam ---------------------------------------------------------------------------------------
    def on_rewards(self, rewards: Tensor) -> None:
        """Keep the verifier's own verdicts: TRL's mixed advantage is not 0 in a group without variance."""
        num_generations = self.rollouts_per_prompt
        self._verdicts = self.verifier.verdicts(rewards)
        self._verifier_advantages = self.compute_verifier_signal(self._verdicts, num_generations)

    def making_rollouts(self, examples: list[dict]) -> Any:
        """Have the teacher score rollouts as they end, unless a subclass decides what it is asked."""
        return scoring_ahead(self, examples, inherits(type(self), SGOPDTrainer, "score_with_teacher"))

    def on_rollouts(self, rollouts: dict, examples: list[dict]) -> dict:
        """Attach what the loss needs: verdicts, a1, and the scores of teacher and reference."""
        rollouts = self.token_weights.prepare(self.usable_rollouts(rollouts), self)
        if self.mode == "eval" and not self.args.eval_with_teacher:
            return rollouts
        rows = len(examples)
        own = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        signals: dict = {"verdicts": self._verdicts[own], "verifier_advantages": self._verifier_advantages[own]}
        signals |= self.remember_examples(examples)
        rollouts = rollouts | signals
        return rollouts | self._scores(rollouts | {"examples": examples}, signals["verifier_advantages"])

    def _scores(self, rollouts: dict, verifier_advantages: Tensor) -> dict:
        batch = self.vocabulary.cut(token_batch(rollouts, self.width_multiple), self.tokenizer.pad_token_id)
        counted = loss_mask(rollouts).any(dim=1) & self.token_weights.taught(rollouts["verdicts"])
        with self.timed("teacher"):
            taught = teacher_batch(batch, rollouts["examples"], self.tokenize_prompts)
            scores = self.objective.teacher_entries(self.score_with_teacher(taught, counted, rollouts))
        if self.args.needs_reference:
            with self.timed("reference"):
                rows, known = counted & self.reference_rows(verifier_advantages), rollouts | scores
                answer = self.score_with_reference(batch, rows, known)
                scores |= self.objective.reference_entries(answer, rows, known)
        if self.args.stability_tau is not None and self.args.stability_norm == "batch":
            scores["stability_denominator"] = self.stability_denominator(
                rollouts, batch, counted, scores["teacher_logps"]
            )
        return scores
