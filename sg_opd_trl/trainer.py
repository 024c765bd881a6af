"""`SGOPDTrainer`: wires teacher, verifier and gate into the loss of `trl.GRPOTrainer`. It does no arithmetic."""

import textwrap
from typing import Any

import torch
from torch import Tensor

from . import core
from .anchor import AnchorStep, sampling_of
from .anchor_stage import anchor_only_loss
from .config import SGOPDConfig
from .construction import (
    AnchorBinding,
    check_arguments,
    check_run,
    default_config,
    prepare_student,
    with_anchor_callback,
)
from .errors import NonFiniteError
from .joint_forward import JointForward
from .metrics import TrainingMetrics, reduce_over_ranks
from .micro_batch import MicroBatchLoss
from .objectives import Objective, build_objective
from .objectives.base import Scores
from .overrides import inherits
from .rollout_cache.cache import open_cache
from .runtime import DistillationRuntime
from .scoring import TokenBatch, loss_mask, token_batch
from .scoring_ahead import scoring_ahead
from .teachers.build import build_reference, build_teacher, default_reference
from .teachers.rows import teacher_batch, teacher_of
from .token_weights import TokenWeights
from .trl_seam import add_head_output


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
