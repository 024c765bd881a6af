"""What surrounds the loss: budgets, judging teacher rollouts, evaluation, logging, cards and checkpoints."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy
import torch
from accelerate.utils import DistributedType
from torch import Tensor

from . import core
from .anchor import AnchorStep
from .config import SGOPDConfig
from .construction import card_arguments, checkpoint_facts, compare_checkpoint_facts
from .errors import NonFiniteError
from .metrics import TrainingMetrics, timed
from .reporting.model_card import build_model_card
from .scoring import TokenBatch, longest, score_rows, sort_windows, trim_micro_batch
from .teachers import LocalTeacher, Sampling
from .teachers.reference import Reference, evaluating
from .trl_seam import GRPOSeam, fused_log_probs, is_conversational
from .verdicts import RunVerifier

_TIMED_PARTS = ("rollout", "verify", "teacher", "reference", "anchor", "loss")


class DistillationRuntime(GRPOSeam):
    """`GRPOSeam` with everything of SG-OPD that is neither a decision nor the loss."""

    args: SGOPDConfig
    metrics: TrainingMetrics
    anchor: AnchorStep | None
    verifier: RunVerifier
    teacher: LocalTeacher
    reference: Reference | None
    teacher_sampling: Sampling
    reuses_trl_reference: bool
    aux_loss_enabled: bool
    max_completion_length: int
    num_generations: int
    num_generations_eval: int

    evaluations: dict | None = None
    """Results by name that the model card shows; a name with `after` in it is the student's own."""

    _before_micro_batch: Callable[[], None] | None = None
    _examples: Sequence[dict] = ()

    def build_verifier(self) -> RunVerifier:
        """The verifier among the reward functions; it must be binary where something depends on its verdicts."""
        args = self.args
        return RunVerifier(
            self.reward_funcs,
            self.reward_func_names,
            args.verifier_reward_func,
            binary=args.sign_gated_extrapolation or args.teacher_sampling_enable,
            event_loop=self.event_loop,
        )

    # --- rollouts and micro-batches ------------------------------------------------------------------------------
    def remember_examples(self, examples: list[dict]) -> dict:
        """Keep a training generation batch's rows, and tag each rollout with its row through shuffle and split."""
        if self.mode == "eval":
            return {}
        self._examples = examples
        return {"example_index": torch.arange(len(examples), device=self.accelerator.device)}

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
        a2, mask = core.reverse_kl_advantage(student_logps, teacher_logps), loss_mask(rollouts)
        phi = core.stability_weight(a2, mask, self.args.stability_tau, "none")
        return core.mean_of(self.accelerator.reduce(core.masked_sum_and_count(phi, mask), reduction="sum"))

    # --- running -------------------------------------------------------------------------------------------------
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, its wall time split into parts."""
        start, inside = time.perf_counter(), sum(self.seconds.values())
        loss = super().training_step(model, inputs, num_items_in_batch)
        elsewhere = sum(self.seconds.values()) - inside
        self.seconds["loss"] += time.perf_counter() - start - elsewhere
        if self.accelerator.sync_gradients:
            self._report_times()
        return loss

    def _report_times(self) -> None:
        seconds = torch.tensor([self.seconds[part] for part in _TIMED_PARTS], device=self.accelerator.device)
        ranks = self.accelerator.gather(seconds.unsqueeze(0))
        for part, total in zip(_TIMED_PARTS, ranks.sum(dim=0).tolist(), strict=True):
            self.metrics.add("train", f"time/{part}", total, ranks.size(0))
        self.seconds.clear()

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
        """Refuse to continue a run with another teacher or reference."""
        compare_checkpoint_facts(self, state)

    def create_model_card(  # type: ignore[override]  # TRL's signature, not that of transformers
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card of the student: who taught it, how, and from which base."""
        if self.is_world_process_zero():
            card = build_model_card(**card_arguments(self, model_name, dataset_name, tags))
            card.save(f"{self.args.output_dir}/README.md")


def token_batch(rollouts: dict, multiple: int) -> TokenBatch:
    """The token ids and masks of TRL's rollouts."""
    return TokenBatch(
        prompt_ids=rollouts["prompt_ids"],
        prompt_mask=rollouts["prompt_mask"],
        completion_ids=rollouts["completion_ids"],
        completion_mask=rollouts["completion_mask"],
        multiple=multiple,
    )


def loss_mask(inputs: dict) -> Tensor:
    """Tokens that count, `(B, T)`: the completion's, without those that tools wrote."""
    if "tool_mask" in inputs:
        return inputs["completion_mask"] * inputs["tool_mask"]
    return inputs["completion_mask"]


@contextmanager
def forked_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch (the CPU's and the device's) after the block."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)
