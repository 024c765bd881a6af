"""`SGOPDTrainer`: Algorithm 1 of SG-OPD (arXiv:2606.09304), read downwards.

TRL's `GRPOTrainer` drives it, through the hooks that `GRPOSeam` lists; this is the order in which they are called:

    every optimizer step      TeacherAnchorCallback   teacher rollouts, judged and kept -> `anchor`       Eq. 2-3
    every generation batch    making_rollouts         the student writes
                              on_rewards              verdicts -> a1
                              on_rollouts             the scores of teacher and reference, attached to the rollouts
                                                      (`full_logits`: in `on_micro_batch`)
                              on_slices               split into micro-batches, ordered by length
    every micro-batch         on_micro_batch          trimmed to its own rows
                              compute_loss            TRL's loss and the anchor                           Eq. 10-12
                                policy_forward          inside TRL's loss: the student's log-probs
                                  _token_signals          a2, gate, route, weights                        Eq. 1, 4-9
                                  _write_advantages       what TRL's loss reads next

The page has them in this order, after the building of the trainer and the decisions that a notebook overrides.
Arithmetic is in `core`, one function per equation.
"""

import logging
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.trainer_utils import TrainOutput

from . import core
from .agreement import Agreement, check_layers_are_found
from .bookkeeping import (
    TIMED_PARTS,
    TrainingMetrics,
    card_arguments,
    check_anchor_is_finite,
    check_grad_norm,
    check_overflow,
    check_step_is_finite,
    checkpoint_facts,
    compare_checkpoint_facts,
    reduce_over_ranks,
)
from .config import SGOPDConfig
from .context_room import check_context_room
from .ending import kept
from .errors import SGOPDConfigError
from .inspection import Report, first_seconds, inspect_run
from .models.batch import (
    TokenBatch,
    joined_rows,
    longest,
    loss_mask,
    score_rows,
    sort_windows,
    token_batch,
    trim_micro_batch,
)
from .models.forward import HeadRequest, can_share, scattered
from .models.head import OutputHead
from .noise import GateNoise
from .objectives import Objective, Positions, Scores, build_objective
from .precision import train_in_float32, trained_adapters, uses_scaler
from .prefetch import prefetched_scores
from .preflight import (
    check_arguments,
    check_base_stays,
    check_is_trained,
    check_log_probs,
    check_run,
    default_config,
    keep_initial_adapters,
    load_adapter_student,
    prepare_student,
    release_student,
)
from .random_state import forked_random_state
from .reporting.model_card import build_model_card
from .reporting.symptoms import SymptomReporter
from .run import inherits
from .run_folder import Start, owned, read_resume
from .run_identity import Identity, data_fingerprint, peft_identity, settings_identity
from .skipped_steps import SkippedSteps
from .teacher_sampling.callback import (
    AnchorBinding,
    anchor_callbacks,
    is_anchor_callback,
    make_way_for,
    sampling_of,
    with_anchor_callback,
)
from .teacher_sampling.step import AnchorStep
from .teacher_sampling.stored.cache import RolloutCache, open_cache
from .teachers.base import Sampling, Teacher
from .teachers.build import build_reference, build_teacher, check_built, default_reference
from .teachers.fit import SharedVocabulary
from .teachers.local import FrozenModel
from .teachers.reference import Reference, evaluating
from .teachers.routed import RoutedTeacher, drop_prefetched, teacher_batch, teacher_of
from .token_weights import TokenFactors, TokenWeights
from .trl_seam import GRPOSeam, PolicyOutput, add_head_output, agree_on_calls
from .verifiers.bounded import bounded, close
from .verifiers.calls import read_completions
from .verifiers.verdicts import RunVerifier

logger = logging.getLogger(__name__)


class MicroBatchSignals(NamedTuple):
    """What the equations say of a micro-batch's tokens, `(B, T)` each and detached.

    Attributes:
        teacher_advantages: a2 (Eq. 1).
        gate: +1 consensus, 0 neutral, -1 conflict (Eq. 4); None without a gate.
        advantages: of every token's route, before the weights (Eq. 5-8).
        weights: of the loss (Eq. 9, and those of other papers).
        matched: bool, tokens whose whole distribution is matched in place of the policy gradient.
        targets: lambda and scale of their targets.
    """

    teacher_advantages: Tensor
    gate: Tensor | None
    advantages: Tensor
    weights: TokenFactors
    matched: Tensor
    targets: core.RoutedLambdas


class SGOPDTrainer(GRPOSeam):
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

    args: SGOPDConfig
    # What the parent sets, for readers and type checkers.
    aux_loss_enabled: bool
    max_completion_length: int
    num_generations: int
    num_generations_eval: int

    agreements: list[Agreement]
    """How the rows of every model are scored, and how far that is from plain logits of each row alone."""

    identity: Identity
    """What makes this run, as checkpoints and `run.json` have it; empty before it starts."""

    evaluations: dict | None = None
    """Results by name that the model card shows; a name with `after` in it is the student's own."""

    teacher_tokens: Sequence[int] = (0, 0)
    """Completion tokens scored and generated by teachers so far, over all ranks and the runs before a resumed one."""

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
        # Before any model is loaded: a refusal should not cost minutes.
        check_arguments(
            args, teacher_model, reference_model, callbacks, tools, rollout_func, environment_factory, train_dataset
        )
        model, processing_class, quantization_config = load_adapter_student(
            model, processing_class, args, peft_config, quantization_config
        )
        release_student(model)
        given_adapters = trained_adapters(model)
        # Before the parent wraps the student or gives it adapters: the reference is its state as it is now.
        initial_student = prepare_student(model, args, reference_model, peft_config)
        self.metrics = TrainingMetrics()
        self.anchor: AnchorStep | None = None
        self._verdicts = self._verifier_advantages = torch.empty(0)
        self._examples: Sequence[dict] = ()
        self._before_micro_batch: Callable[[], None] | None = None
        self._tokens_before: Sequence[int] = (0, 0)
        self.identity = {}
        self._own_folder: Path | None = None
        super().__init__(
            model=model,
            reward_funcs=bounded(reward_funcs, args.verifier_timeout),
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
        train_in_float32(self.model, given_adapters)
        check_run(self)
        check_layers_are_found(self.model, "student")
        add_head_output(self.model)
        keep_initial_adapters(self, reference_model)
        self.token_weights = TokenWeights(args, self.tokenizer)
        self.verifier = self._build_verifier()
        self.tokenizers: dict[str, Any] = {}
        self.teacher: Teacher | RoutedTeacher = build_teacher(self, teacher_model, teacher_processing_class)
        check_base_stays(self, reference_model)
        # With a KL penalty to the initial student TRL has its log-probs already.
        initial = default_reference(args, reference_model)
        self.reuses_trl_reference = initial and args.beta != 0.0 and not args.sync_ref_model
        self.reference: Reference | None = build_reference(self, reference_model, initial_student)
        check_built(args, self.teacher, self.reference)
        self.vocabulary = self._build_vocabulary()
        vocab_size = self.model.config.get_text_config().vocab_size
        self.objective: Objective = build_objective(args, self.teacher, self.reference, vocab_size, type(self))
        self.teacher_sampling: Sampling = sampling_of(self)
        self.rollout_cache: RolloutCache | None = open_cache(self)
        self.symptoms = SymptomReporter(args, self.verifier.name)
        self.skipped = SkippedSteps(self, args.max_skipped_steps)
        self.add_callback(self.symptoms)
        self.add_callback(AnchorBinding(self))
        self.gate_noise = GateNoise(self, heeded=inherits(type(self), SGOPDTrainer, "compute_gate"))
        self.add_callback(self.gate_noise)
        check_context_room(self)
        check_log_probs(self)

    def _build_verifier(self) -> RunVerifier:
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

    def _build_vocabulary(self) -> SharedVocabulary:
        """The ids that all models have; from now on the student's own sampler keeps to them."""
        models = [self.model.config.get_text_config(), self.teacher, self.reference]
        vocabulary = SharedVocabulary(self.tokenizer, [x.vocab_size for x in models if x is not None])
        if vocabulary.unusable and not self.use_vllm:
            self.suppress_tokens(vocabulary.unusable)
        return vocabulary

    # === decisions: override one of these in a notebook ==========================================================
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
        return core.sign_consistency_gate(verifier_advantages, teacher_advantages, self.dead_zone)

    @property
    def dead_zone(self) -> float:
        """`gate_dead_zone` in nats, also where it is "auto"."""
        return self.gate_noise.dead_zone

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
        # Of all rows: those that are not kept were left out when the step was filled.
        kept = torch.ones(len(batch), dtype=torch.bool, device=mask.device)
        weights = core.anchor_token_weights(anchor_logps, mask, args.teacher_sft_phi)
        return core.anchor_cross_entropy(
            anchor_logps, mask, kept, weights, reduction=args.teacher_sft_reduction, total=total
        )

    # === coefficients: how much rewards and teacher count ========================================================
    def coefficients(self, step: int | None = None) -> tuple[float, float]:
        """w_r of the rewards and w_t of the teacher at an optimizer step, counted from 1; default: that under way."""
        args, total = self.args, self.state.max_steps
        both = args.task_reward_coef, args.teacher_kl_coef
        if total < 1:  # nothing is trained: an evaluation of the student as it came
            return both[0][0], both[1][0]
        step = self.state.global_step + 1 if step is None else step
        task, teacher = (
            core.scheduled_coefficient(step, total, values, args.coef_phase_end_fracs, args.coef_schedule)
            for values in both
        )
        return task, teacher

    @property
    def teacher_counts(self) -> bool:
        """Whether the teacher has a say in any step of the generation batch under way."""
        own, step = self.micro_batches_per_rollout, self.args.gradient_accumulation_steps
        first = self.state.global_step + 1
        last = first + math.ceil(own / step) - (own % step == 0 or step % own == 0)
        # In between it is one of the two, or between them.
        return any(self.coefficients(step)[1] > 0 for step in (first, last))

    def _free_teacher(self) -> None:
        """Free the models that nothing will ask any more, as far as they are the run's own."""
        # The anchor may end in the very step in which the coefficient comes to 0: it has been there a step ago.
        # Outside of a training, whoever looks at the run asks the teacher once more.
        over = self.args.teacher_ends and self.coefficients(max(1, self.state.global_step))[1] == 0
        if not over or not self.is_in_train:
            return
        for model in [*getattr(self.teacher, "distinct", [self.teacher]), self.reference]:
            if isinstance(model, FrozenModel):
                model.free()

    # === rollouts and their scores: once per generation batch ====================================================
    @property
    def needs_rollouts(self) -> bool:
        """Whether the student writes for the next micro-batch: not in stage 1 of TimeSep."""
        return self.mode == "eval" or self.anchor is None or not self.anchor.alone

    def making_rollouts(self, examples: list[dict]) -> AbstractContextManager[None]:
        """Have a teacher on a server score rollouts as they end, unless a subclass decides what it is asked.

        That saves time and changes nothing: `_scores` asks for all of them. A local teacher only answers there.
        """
        known = inherits(type(self), SGOPDTrainer, "score_with_teacher") and self.teacher_counts
        return prefetched_scores(self, examples, known)

    def on_rewards(self, rewards: Tensor) -> None:
        """The verifier's own verdicts, and a1 from them.

        Not from TRL's advantages: those mix all rewards, and rounding leaves them a sign in a group without variance.
        """
        self._verdicts = self.verifier.verdicts(rewards)
        self._verifier_advantages = self.compute_verifier_signal(self._verdicts, self.rollouts_per_prompt)

    def on_rollouts(self, rollouts: dict, examples: list[dict]) -> dict:
        """Attach what the loss needs to this rank's rollouts: verdicts, a1, the scores of teacher and reference."""
        rollouts = self.token_weights.prepare(self._usable(rollouts), self)
        if self.mode == "eval" and not self.args.eval_with_teacher:
            return rollouts
        # Rewards are those of all ranks, rollouts this rank's.
        rows = len(examples)
        own = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        signals: dict = {"verdicts": self._verdicts[own], "verifier_advantages": self._verifier_advantages[own]}
        if self.mode == "train":
            self.symptoms.saw_rollouts(self.last_batch())
            # Each rollout's row of `examples`, through shuffle and split.
            self._examples = examples
            signals["example_index"] = torch.arange(rows, device=self.accelerator.device)
        rollouts = rollouts | signals
        if not self.teacher_counts:
            self._free_teacher()
            return rollouts
        if self.mode == "eval" or not self.objective.momentary:
            return rollouts | self._scores(rollouts | {"examples": examples})
        # Each micro-batch is scored when it is its turn. Only a mean over all rows cannot wait.
        if self._needs_stability_denominator:
            teacher_logps = self._teacher_logps(rollouts)
            rollouts["stability_denominator"] = self._stability_denominator(rollouts, teacher_logps)
        return rollouts

    def _usable(self, rollouts: dict) -> dict:
        """The rollouts with ids that some model lacks masked out of the loss, and counted."""
        if not self.vocabulary.unusable:
            return rollouts
        rollouts, left_out = self.vocabulary.leave_out(rollouts, self.accelerator.gather)
        self.metrics.add(self.mode, "teacher/unusable_tokens", left_out)
        return rollouts

    def _scores(self, rollouts: dict) -> dict:
        """What teacher and reference say of the rollouts.

        Rows that count for nothing are not asked about. Their scores are 0, which is also the log of 1: only the
        masks tell the two apart.
        """
        scores = self._teacher_scores(rollouts)
        if self.args.needs_reference:
            with self.timed("reference"):
                rows = self._asked(rollouts) & self.reference_rows(rollouts["verifier_advantages"])
                answer = self.score_with_reference(self._to_score(rollouts), rows, rollouts | scores)
                scores |= self.objective.reference_entries(answer, rows, rollouts | scores)
        if self._needs_stability_denominator and "stability_denominator" not in rollouts:
            scores["stability_denominator"] = self._stability_denominator(rollouts, scores["teacher_logps"])
        return scores

    def _teacher_scores(self, rollouts: dict) -> dict:
        with self.timed("teacher"):
            as_taught = teacher_batch(self._to_score(rollouts), rollouts["examples"], self.tokenize_prompts)
            answer = self.score_with_teacher(as_taught, self._asked(rollouts), rollouts)
            return self.objective.teacher_entries(answer)

    def _to_score(self, rollouts: dict) -> TokenBatch:
        return self.vocabulary.cut(token_batch(rollouts, self.width_multiple), self.tokenizer.pad_token_id)

    def _asked(self, rollouts: dict) -> Tensor:
        """Rows `(B,)` that count for something."""
        return loss_mask(rollouts).any(dim=1) & self.token_weights.taught(rollouts["verdicts"])

    @property
    def _needs_stability_denominator(self) -> bool:
        return self.args.stability_tau is not None and self.args.stability_norm == "batch"

    def _stability_denominator(self, rollouts: dict, teacher_logps: Tensor) -> Tensor:
        """Mean stability weight of the global generation batch, 0-dim; it needs the student's scores beforehand."""
        rows, student_logps = self._asked(rollouts), rollouts.get("old_per_token_logps")
        if student_logps is None:
            student_logps = self.score_with_student(self._to_score(rollouts), rows)
        a2, mask = core.reverse_kl_advantage(student_logps, teacher_logps), loss_mask(rollouts) * rows.unsqueeze(1)
        phi = core.stability_weight(a2, mask, self.args.stability_tau, "none")
        return core.mean_of(self.accelerator.reduce(core.masked_sum_and_count(phi, mask), reduction="sum"))

    def _teacher_logps(self, rollouts: dict) -> Tensor:
        """The teacher's log-probs `(B, T)` of a generation batch, where nothing else of its answer can be kept."""
        logps = torch.zeros_like(rollouts["completion_ids"], dtype=torch.float32)
        for rows in torch.arange(len(logps), device=logps.device).split(self.args.per_device_train_batch_size):
            part = {name: x[rows] if isinstance(x, Tensor) and x.dim() else x for name, x in rollouts.items()}
            part = self._with_examples(trim_micro_batch(part, self.width_multiple))
            logps[rows, : part["completion_ids"].size(1)] = self._teacher_scores(part)["teacher_logps"]
        return logps

    def _with_examples(self, inputs: dict) -> dict:
        return inputs | {"examples": [self._examples[row] for row in inputs["example_index"].tolist()]}

    def on_slices(self, slices: list[dict]) -> list[dict]:
        """Order rows by length and prompt inside each optimizer step, where that leaves the update as it is."""
        accumulation, generation = self.args.gradient_accumulation_steps, len(slices)
        aligned = generation % accumulation == 0 or accumulation % generation == 0
        if not aligned or self.depends_on_micro_batches:
            return slices
        shared = can_share(self.model, self.accelerator.device)
        return sort_windows(slices, min(accumulation, generation), by_prompt=shared)

    @property
    def depends_on_micro_batches(self) -> bool:
        """Whether the loss averages over a micro-batch as a whole, so that its rows matter to one another."""
        args = self.args
        entropy = args.entropy_coef != 0.0 or args.use_adaptive_entropy or args.top_entropy_quantile < 1.0
        return args.loss_type == "bnpo" or entropy or self.aux_loss_enabled

    def on_micro_batch(self, inputs: dict) -> dict:
        """Trim the micro-batch to its own rows, and do what waits for its prompts, or for its turn."""
        action = self._before_micro_batch
        if self.mode == "train" and action is not None:
            self._before_micro_batch = None
            action()
        inputs = trim_micro_batch(inputs, self.width_multiple)
        if self.mode == "train" and (self.args.coefs_move or any(self.args.task_reward_coef)):
            for name, value in zip(("task_reward", "teacher_kl"), self.coefficients(), strict=True):
                self.metrics.set("train", f"coef/{name}", value)
        if self.mode == "train" and self.objective.momentary and "teacher_logps" not in inputs:
            # Into a copy: the buffer, and a checkpoint of it, stay without. Inner updates ask again.
            inputs = inputs | self._scores(self._with_examples(inputs))
        return inputs

    # === the loss: once per micro-batch, Eq. 4-12 ================================================================
    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """L_TLT + alpha L_SLT (Eq. 11): TRL's clipped surrogate over the token advantages, and the anchor."""
        step = self.anchor if self.mode == "train" else None
        if self.mode == "train":
            self.skipped.saw({name: x for name, x in inputs.items() if name not in self.objective.momentary})
        if step is not None and step.alone:
            return self._anchor_only_loss(model, step)
        if "teacher_logps" not in inputs:  # an evaluation without the teacher, or rewards alone
            if self.mode == "train":
                inputs = inputs | {"advantages": self.coefficients()[0] * inputs["advantages"]}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Inner updates read a buffered micro-batch again: what follows is written into a copy. TRL's own advantages
        # are taken out, so that a loss that read them before `policy_forward` has written ours would fail.
        batch = {name: value for name, value in inputs.items() if name != "advantages"}
        batch["task_advantages"] = inputs["advantages"]
        batch["anchor"] = None if step is None else self._anchor_rows(step)
        if batch["anchor"] is not None:
            self.skipped.saw({"anchor": batch["anchor"]})
        # Eq. 10: TRL's loss calls `policy_forward`, which writes the advantages that it reads next.
        loss = super().compute_loss(model, batch, return_outputs, num_items_in_batch)
        anchor = loss.new_zeros(())
        if step is not None and batch["anchor"] is not None:
            anchor = self.anchor_loss(batch["anchor_logps"], batch["anchor"], step.total)  # Eq. 2
            loss = core.anchored_loss(loss, anchor, step.alpha, self.accelerator.num_processes)  # Eq. 11
        self._report(batch, loss, anchor.detach())
        return loss

    def policy_forward(self, model: Any, batch: dict) -> PolicyOutput:
        """The micro-batch's only policy forward, in the middle of TRL's loss; then the advantages for what follows.

        The student's rows and the anchor's are the rows of one forward. TRL's loss goes on with the log-probs that
        are returned, and reads `batch["advantages"]` only after this call.
        """
        if "teacher_logps" not in batch:
            return super().policy_forward(model, batch)
        student_rows, anchor_rows = token_batch(batch, self.width_multiple), batch["anchor"]
        rows, width = student_rows.completion_ids.shape
        request = None
        if self.objective.matches:
            # Inside the forward: where weights are sharded, head and hidden states are whole nowhere else.
            request = HeadRequest(loss_mask(batch) != 0, partial(self._matching_losses, batch))
        ids, mask, joint_width = joined_rows(student_rows, anchor_rows)
        output = self.run_policy(model, ids, mask, joint_width, request, auxiliary_loss=self.aux_loss_enabled)
        logps, entropies = output.logps, output.entropies
        if anchor_rows is not None:
            batch["anchor_logps"] = logps[rows:, : anchor_rows.completion_ids.size(1)]
            logps = logps[:rows, :width]
            entropies = None if entropies is None else entropies[:rows, :width]
        if request is None:
            # With a request `_matching_losses` has needed, and written, them already.
            batch["signals"] = self._token_signals(logps.detach(), batch)
        self._write_advantages(batch, logps, output.answer)
        if output.answer is not None:
            logps = self._without_ratio(logps, batch)
        return logps, entropies, output.auxiliary_loss

    def _token_signals(self, student_logps: Tensor, batch: dict) -> MicroBatchSignals:
        """From log-probs and verdicts to weighted advantages: Eq. 1 and 4-9.

        Args:
            student_logps: `(B, T)` of this forward, detached.
            batch: the micro-batch with the scores of `on_rollouts`.
        """
        args, mask, verdicts = self.args, loss_mask(batch), batch["verdicts"]
        a1 = batch["verifier_advantages"]
        teacher_logps, reference_logps = batch["teacher_logps"], batch.get("reference_logps")
        # Over the inner updates of a generation batch a2 and the gate stay those of the policy that wrote it.
        behavior_logps = batch.get("old_per_token_logps", student_logps)

        a2 = core.reverse_kl_advantage(behavior_logps, teacher_logps)  # Eq. 1
        gate = self.compute_gate(a1, a2) if args.sign_gated_extrapolation else None  # Eq. 4
        if args.gate_signal == "random":  # a control, off by default: as many consensus tokens, elsewhere
            gate = self.token_weights.random_gate(gate, batch, mask)
        advantages = self.route_advantages(gate, behavior_logps, teacher_logps, reference_logps, a1)  # Eq. 5-8
        if args.wrong_rollout_advantage is not None:  # another: wrong rollouts without the teacher
            advantages = self.token_weights.without_teacher(advantages, batch, args.wrong_rollout_advantage)
        phi = self.compute_token_weights(a2, mask, batch)  # Eq. 9
        weights = self.token_weights.factors(phi, a2, (behavior_logps, student_logps), mask, batch)

        # Objectives over distributions: which tokens are matched, and to what. None and neutral with `sampled_token`.
        one = torch.ones_like(a2)
        targets = core.RoutedLambdas(one, one)
        if self.objective.routes_targets:
            targets = self.route_lambdas(gate, a2, a1)
        taught = self.token_weights.taught(verdicts).unsqueeze(1)
        matched = self.objective.matched(behavior_logps, batch) & (mask != 0) & taught
        if reference_logps is None:
            _require_lambda_one(targets.lambdas, matched)
        return MicroBatchSignals(a2, gate, advantages, weights, matched, targets)

    def _matching_losses(self, batch: dict, hidden_states: Tensor, head: OutputHead, logps: Tensor) -> tuple[Tensor]:
        """Losses `(N,)` of the matched tokens, inside the student's forward and with gradient to it.

        Args:
            batch: the micro-batch; its signals are written here, since the losses need them.
            hidden_states: `(N', H)`, those that predict the tokens that count.
            head: the student's, whole.
            logps: `(N',)` of these tokens.
        """
        counted = loss_mask(batch) != 0
        signals = batch["signals"] = self._token_signals(scattered(logps.detach(), counted), batch)
        if not self._everything_matched:
            inside = signals.matched[counted]
            hidden_states, logps = hidden_states[inside], logps[inside]

        def entry(name: str) -> Tensor:
            values = batch[name]
            return (values.unsqueeze(1).expand(counted.shape) if values.dim() == 1 else values)[signals.matched]

        lambdas = signals.targets.lambdas[signals.matched]
        return (self.objective.losses(Positions(hidden_states, head, logps, lambdas, entry)),)

    def _write_advantages(self, batch: dict, logps: Tensor, answer: tuple[Tensor, ...] | None) -> None:
        """Write the advantages that TRL's loss reads next.

        That loss of a token, Eq. 10, is linear in its advantage where the probability ratio is 1. So a token whose
        distribution is matched gets the advantage `-loss`, with the gradient of that loss, and by `_without_ratio` a
        ratio of 1; every reduction, mask and normaliser stays TRL's.

        Args:
            batch: the micro-batch with its signals.
            logps: `(B, T)` of the student, with gradient.
            answer: what `_matching_losses` returned, None without.
        """
        signals: MicroBatchSignals = batch["signals"]
        weights, mask = signals.weights.applied, loss_mask(batch)
        advantages = core.weighted_advantages(signals.advantages, *weights)
        batch["matching"] = mask.new_zeros(2, dtype=torch.float32)
        if answer is not None:
            losses, scales = scattered(answer[0], signals.matched), signals.targets.scales
            advantages = core.matched_advantages(advantages, losses, signals.matched, scales, *weights)
            batch["matching"] = core.masked_sum_and_count(losses * scales, signals.matched)
        task_coef, teacher_coef = self.coefficients()
        if (task_coef, teacher_coef) != (0.0, 1.0):
            advantages = core.mixed_advantages(
                advantages,
                batch["task_advantages"],
                teacher_coef=teacher_coef,
                task_coef=task_coef,
                task_weights=signals.weights.drift,
            )
        batch["advantages"] = advantages
        finite = torch.isfinite((logps + advantages).detach())
        batch["not_finite"] = (~finite & (mask != 0)).sum()

    def _without_ratio(self, logps: Tensor, batch: dict) -> Tensor:
        """A probability ratio of 1 at matched tokens, in the inner updates and in vLLM's correction too."""
        constant, matched = logps.detach(), batch["signals"].matched
        if "old_per_token_logps" in batch:
            batch["old_per_token_logps"] = torch.where(matched, constant, batch["old_per_token_logps"])
        if "importance_sampling_ratio" in batch:
            batch["importance_sampling_ratio"] = torch.where(matched, 1.0, batch["importance_sampling_ratio"])
        if not self._everything_matched:
            return torch.where(matched, constant, logps)
        # What of a forward has a gradient must be the same on all ranks where shards are gathered for it, and another
        # rank may have rows of the anchor in this one.
        return constant + 0.0 * logps if self.sharded and self.anchor is not None else constant

    @property
    def _everything_matched(self) -> bool:
        """Whether no token that counts keeps its policy gradient; known without waiting for the device."""
        return self.objective.routes_targets and self.args.wrong_rollout_advantage is None

    def _report(self, batch: dict, loss: Tensor, anchor: Tensor) -> None:
        """Reduce this micro-batch's metrics over ranks, and stop all ranks if anything is not finite."""
        signals: MicroBatchSignals = batch["signals"]
        verdicts = batch["verdicts"]
        statistics = core.token_statistics(
            gate=signals.gate,
            advantages=signals.advantages,
            teacher_advantages=signals.teacher_advantages,
            stability_weights=signals.weights.stability,
            mask=loss_mask(batch),
            right=verdicts == 1,
            wrong=verdicts == 0,
            taught=self.token_weights.taught(verdicts),
            prefix_weights=signals.weights.prefix,
            drift_gates=signals.weights.drift_gates,
        )
        not_finite = batch["not_finite"] + (~torch.isfinite(loss.detach()))
        sums = torch.cat([torch.stack([anchor.float(), not_finite.float()]), batch["matching"]])
        # One exchange and one wait for the device per micro-batch, whatever is reported.
        statistics, (anchor_sum, bad, *matching) = reduce_over_ranks(self.accelerator, statistics, sums)
        mode = self.mode
        with self.skipped.excused() if mode == "train" else nullcontext():
            check_step_is_finite(int(bad), self.state.global_step + 1)
        if bad:
            return
        self.metrics.add_tokens(mode, statistics)
        self.metrics.add(mode, "teacher/matching_loss", *matching)
        if signals.gate is not None and self.gate_noise.automatic:
            self.metrics.set(mode, "gate/dead_zone", self.dead_zone)
        if mode == "train":
            self.symptoms.saw_tokens(statistics)
            if self.anchor is not None:
                self._report_anchor(self.anchor, anchor_sum)

    # === the anchor: verified teacher rollouts, Eq. 2-3 ==========================================================
    # `TeacherAnchorCallback` has them written and judged at the start of a step, and puts them into `self.anchor`.
    def _anchor_rows(self, step: AnchorStep) -> TokenBatch | None:
        """The teacher rollouts of the next micro-batch."""
        return step.take(self.tokenizer.pad_token_id, self.accelerator.device, self.width_multiple)

    def _anchor_only_loss(self, model: Any, step: AnchorStep) -> Tensor:
        """alpha L_SLT alone: stage 1 of TimeSep (Table 3e), in which the student writes nothing."""
        padding = self.tokenizer.pad_token_id
        rows = self._anchor_rows(step)
        # Without rows the forward still runs, on one token that counts nothing: all ranks must take part.
        batch = rows or TokenBatch.from_lists(
            [[padding]], [[padding]], padding, self.accelerator.device, self.width_multiple
        )
        logps = self.run_policy(model, *batch.joined(), batch.completion_ids.size(1)).logps
        if rows is None:
            batch = replace(batch, completion_mask=torch.zeros_like(batch.completion_mask))
        anchor = self.anchor_loss(logps, batch, step.total)
        total = float(self.accelerator.reduce(anchor.detach().float(), reduction="sum"))
        with self.skipped.excused():
            check_anchor_is_finite(total, self.state.global_step + 1)
        if math.isfinite(total):
            self._report_anchor(step, total)
        return core.anchored_loss(anchor.new_zeros(()), anchor, step.alpha, self.accelerator.num_processes)

    def _report_anchor(self, step: AnchorStep, total: float) -> None:
        # A 0 of a step that keeps no rollout would read as a perfect fit. `kept` is the same on all ranks.
        if not step.kept:
            return
        # Micro-batches add up to the step's loss: only its last one counts.
        self.metrics.add("train", "anchor/loss", total, float(self.accelerator.sync_gradients))

    def judge(self, examples: list[dict], completion_ids: list[list[int]]) -> list[float | None]:
        """The verifier's verdicts on teacher completions."""
        prompts = [example["prompt"] for example in examples]
        completions = read_completions(self.tokenizer, prompts, completion_ids, self.tokenize_prompts)
        return self.verifier.judge(examples, completions, completion_ids, self.state)

    def run_before_micro_batch(self, action: Callable[[], None]) -> None:
        """Run an action once, when the next training micro-batch and its generation batch are known."""
        self._before_micro_batch = action

    def window_examples(self) -> list[dict]:
        """This rank's examples of the current optimizer step, one per prompt, in the data set's order."""
        rows = sorted(self.window_entries("example_index").tolist())
        by_prompt = {repr(self._examples[row]["prompt"]): self._examples[row] for row in rows}
        return list(by_prompt.values())

    @property
    def processes(self) -> int:
        """That train, each on its own part of a step."""
        return self.accelerator.num_processes

    # === scoring without gradient: budgets, and what TRL asks for ================================================
    def score_for_trl(self, model: Any, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
        """Old-policy and reference scores that TRL asks for, in trimmed batches; rows without a token stay 0."""
        split = input_ids.size(1) - completion_length
        ids, mask = (x.tensor_split([split], dim=1) for x in (input_ids, attention_mask))
        batch = TokenBatch(ids[0], mask[0], ids[1], mask[1], self.width_multiple)
        # Without dropout: the adapter that TRL scores as its reference may have some.
        with evaluating(model):
            return self._score_rows(model, batch, mask[1].any(dim=1))

    def score_with_student(self, batch: TokenBatch, rows: Tensor) -> Tensor:
        """The student's own log-probs before an update, `(B, T)` float32, without gradient."""
        with self.student_scoring() as model:
            return self._score_rows(model, batch, rows)

    def _score_rows(self, model: Any, batch: TokenBatch, rows: Tensor) -> Tensor:
        def score(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Tensor:
            return self.run_policy(model, input_ids, attention_mask, completion_length).logps

        shared = can_share(model, batch.prompt_ids.device)
        return score_rows(score, batch, rows, self.scoring_budget(batch), self.agree_on_calls, by_prompt=shared)

    def agree_on_calls(self, calls: int) -> int:
        """The largest number of forwards over all ranks, where a forward is a collective operation."""
        return agree_on_calls(self.accelerator, calls)

    def scoring_budget(self, batch: TokenBatch) -> int:
        """Tokens of one scoring forward: what a training micro-batch of full length holds, unless set."""
        width = longest(batch.prompt_mask) + self.max_completion_length
        return self.args.max_tokens_per_scoring_batch or self.args.per_device_train_batch_size * width

    def generation_budget(self, prompt_ids: list[list[int]]) -> int:
        """Tokens of one teacher generation batch: all of this rank's teacher prompts of the step, unless set."""
        width = max([1, *map(len, prompt_ids)]) + self.args.teacher_completion_length
        return self.args.max_tokens_per_scoring_batch or max(1, len(prompt_ids)) * width

    @property
    def width_multiple(self) -> int:
        """What the widths of all batches are multiples of."""
        return int(self.args.pad_to_multiple_of or 1)

    @property
    def rollouts_per_prompt(self) -> int:
        """Size of a group, in training or in evaluation."""
        return int(self.num_generations if self.mode == "train" else self.num_generations_eval)

    # === before the first step ===================================================================================
    def check(self, prompts: int = 4) -> Report:
        """Look at everything that can be seen without training, as `sg-opd check` does.

        A few rollouts are sampled, judged and scored; random state, weights and metrics stay as they are. What
        teachers score and write here they have scored and written: their counts go on.

        Args:
            prompts: that are sampled, a group of rollouts each; 0 samples nothing.

        Returns:
            Rows in green, yellow and red; printed it is text, in a notebook a table.
        """
        return inspect_run(self, prompts)

    def rollouts_aside(self, examples: list[dict]) -> dict:
        """A scored generation batch as in training, of which nothing stays in the run."""
        kept = self.metrics, self._examples
        self.metrics = TrainingMetrics()
        try:
            rollouts = super().rollouts_aside(examples)
            if "teacher_logps" not in rollouts:
                rollouts["teacher_logps"] = self._teacher_logps(rollouts)
            return rollouts
        finally:
            self.metrics, self._examples = kept

    # === what surrounds a step: running, logging, writing ========================================================
    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, in a folder that no other run uses.

        Args:
            resume_from_checkpoint: the folder of a checkpoint; True starts where there is none, goes on from the
                newest one otherwise, and where the run has finished loads its student and trains nothing. Default:
                that of the configuration.
            args: see `transformers.Trainer.train`, as for `kwargs`.
            kwargs: see there.

        Returns:
            transformers' account of the training.

        Raises:
            SGOPDConfigError: `output_dir` is another run's, or the checkpoint is of a run with other mathematics.
            CheckpointError: `resume_from_checkpoint` names a checkpoint that is not whole.
        """
        check_is_trained(self)
        given = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        with owned(self.args) as folder:
            # A second call is the same run: what is in the folder is its own.
            start = folder.begin(self._identity(), read_resume(given), again=self._own_folder == folder.path)
            self._own_folder, self.identity = folder.path, folder.identity
            if start.finished and start.checkpoint is None:
                return self._load_finished(folder.path)
            try:
                return self._train(start, *args, **kwargs)
            finally:
                folder.note(steps=self.state.global_step)

    def _identity(self) -> Identity:
        facts = checkpoint_facts(self)
        return settings_identity(
            self.args,
            train_dataset=data_fingerprint(self.train_dataset),
            reward_funcs=self.reward_func_names,
            peft_config=peft_identity(self.model),
            teacher=facts["teacher"],
            reference=facts["reference"],
        )

    def _load_finished(self, folder: Path) -> TrainOutput:
        """The student of a run that kept no checkpoint of its end."""
        if self.sharded or self.is_deepspeed_enabled:
            raise SGOPDConfigError(
                f"`resume_from_checkpoint=True` is not supported in {str(folder)!r}, whose run has finished, with a "
                "student in shards: there is no checkpoint of its last step to load. Leave the run as it is, or set "
                "`overwrite_output_dir=True` to start anew."
            )
        logger.warning("The run in %s has finished: its student is loaded, and nothing is trained.", folder)
        self.load_student(folder)
        return TrainOutput(0, math.nan, {})

    def _train(self, start: Start, *args: Any, **kwargs: Any) -> Any:
        """Train; whichever way that ends, the last finished step is kept, and no teacher goes on unasked."""
        if start.finished:
            logger.warning(
                "The run has finished: its student is loaded from %s, nothing is trained.", start.checkpoint
            )
        elif self.args.preflight:
            first_seconds(self)
        self.nothing_left = start.finished
        self.skipped.begin()
        checkpoint = None if start.checkpoint is None else str(start.checkpoint)
        try:
            with kept(self):
                return super().train(checkpoint, *args, **kwargs)
        finally:
            drop_prefetched(self.teacher)
            close(self.reward_funcs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, its wall time split into parts."""
        start, inside = time.perf_counter(), sum(self.seconds.values())
        loss = super().training_step(model, inputs, num_items_in_batch)
        # What the other parts did not take is the loss: forward, backward, and TRL around them.
        elsewhere = sum(self.seconds.values()) - inside
        self.seconds["loss"] += time.perf_counter() - start - elsewhere
        if self.accelerator.sync_gradients:
            self._report_cost()
        return loss

    def _report_cost(self) -> None:
        """Seconds of the step's parts and tokens of the teacher, over all ranks."""
        # Whole numbers, which every device adds up exactly.
        nanoseconds = [round(self.seconds[part] * 1e9) for part in TIMED_PARTS]
        own = [*nanoseconds, self.teacher.tokens_scored, self.teacher.tokens_generated]
        ranks = self.accelerator.gather(torch.tensor([own], device=self.accelerator.device))
        *totals, scored, generated = ranks.sum(dim=0).tolist()
        for part, total in zip(TIMED_PARTS, totals, strict=True):
            self.metrics.add("train", f"time/{part}", total / 1e9, ranks.size(0))
        self.seconds.clear()
        now = (scored, generated)
        self.teacher_tokens = [count + before for count, before in zip(now, self._tokens_before, strict=True)]
        for name, count in zip(("scored", "generated"), self.teacher_tokens, strict=True):
            self.metrics.set("train", f"teacher/{name}_tokens", count)

    def on_grad_norm(self, grad_norm: Any) -> Any:
        """Skip the step, or stop, before a gradient that is not finite reaches the optimizer."""
        step = self.state.global_step + 1
        # A float16 scaler expects an infinite norm now and then, and skips the step itself.
        if uses_scaler(self.accelerator):
            check_overflow(grad_norm, step, self.accelerator)
            return grad_norm
        with self.skipped.excused():
            check_grad_norm(grad_norm, step, self.accelerator)
        skips = self.skipped.due
        self.skipped.settle(step)
        if not skips:
            return grad_norm
        # Without gradients the optimizer leaves weights, decay and moments alone.
        for parameter in self.model.parameters():
            parameter.grad = None
        self.metrics.set("train", "skipped_steps", self.skipped.total)
        return 0.0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the training run's random state is left as it was."""
        if self.args.eval_with_teacher:
            self.gate_noise.ready()
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

    def add_callback(self, callback: Any) -> None:
        """Add a callback, see `transformers.Trainer`; a `TeacherAnchorCallback` takes the place of the default's."""
        make_way_for(self, callback)
        super().add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback and return it; without a `TeacherAnchorCallback` there is no anchor."""
        if is_anchor_callback(callback):
            self.anchor = None
        return super().pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback; without a `TeacherAnchorCallback` there is no anchor."""
        if is_anchor_callback(callback):
            self.anchor = None
        super().remove_callback(callback)

    def lasting_callbacks(self) -> list[Any]:
        """The anchor's: what its constructor was given is in no checkpoint."""
        return anchor_callbacks(self)

    def checkpoint_state(self) -> dict:
        """What tells a resumed run from another, what was counted, and the dead zone that was chosen.

        The anchor's counters are here too: transformers' own restoring of callbacks is off by default.
        """
        counters = [callback.counters for callback in anchor_callbacks(self)]
        facts = checkpoint_facts(self) | {"identity": self.identity}
        own = {"anchor": counters[0]} if counters else {}
        return facts | own | self.gate_noise.facts()

    def rollouts_state(self) -> dict[str, Any]:
        """With the rows of the data set that the rollouts are of: the anchor may share their prompts."""
        return super().rollouts_state() | {"examples": list(self._examples)}

    def restore_rollouts(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        super().restore_rollouts(state)
        self._examples = state.get("examples", ())

    def check_checkpoint_state(self, state: dict) -> None:
        """Refuse to continue a run with another teacher or reference, and count on from its tokens and rollouts."""
        compare_checkpoint_facts(self, state)
        self.gate_noise.restore(state)
        self._tokens_before = state.get("teacher_tokens", (0, 0))
        for callback in anchor_callbacks(self) if "anchor" in state else []:
            callback.restore_counters(**state["anchor"])

    def create_model_card(  # type: ignore[override]  # TRL's signature, not that of transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card of the student: who taught it, how, and from which base."""
        if self.is_world_process_zero():
            card = build_model_card(**card_arguments(self, model_name, dataset_name, tags))
            card.save(f"{self.args.output_dir}/README.md")


def _require_lambda_one(lambdas: Tensor, matched: Tensor) -> None:
    """Only routes of a subclass can ask for a reference that the settings did not."""
    if bool(((lambdas != 1) & matched).any()):
        raise ValueError(
            "`route_lambdas` returned a lambda other than 1, but no setting asked for a reference, so none was "
            "loaded. Lambda weighs the teacher against it. Set `lambda_high` or `lambda_base` to the lambda that "
            "is used, or return 1."
        )
