"""The books of a run: metrics of a logging window, what stops a step, facts of checkpoints."""

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from trl import GRPOConfig

from . import __version__
from .core import TokenStatistics, combine, finalize
from .errors import NonFiniteError, SGOPDConfigError
from .run import Run
from .scrubbing import without_secrets
from .trl_seam import get_config_model_id

logger = logging.getLogger(__name__)

#: Parts of a step whose wall time is logged as `time/...`.
TIMED_PARTS = ("rollout", "verify", "teacher", "reference", "anchor", "loss")


# --- metrics ---------------------------------------------------------------------------------------------------------
class TrainingMetrics:
    """Totals since the last log, for training and evaluation apart; all values are already reduced over ranks."""

    def __init__(self) -> None:
        self._tokens: dict[str, list[TokenStatistics]] = defaultdict(list)
        self._totals: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))

    def add_tokens(self, mode: str, statistics: TokenStatistics) -> None:
        """Add the statistics of a micro-batch; they are merged at once, so that the window does not grow."""
        self._tokens[mode] = [combine([*self._tokens[mode], statistics])]

    def add(self, mode: str, name: str, total: float, count: float = 1.0) -> None:
        """Add to one metric; its logged value is the sum of totals over the sum of counts."""
        entry = self._totals[mode][name]
        entry[0] += total
        entry[1] += count

    def set(self, mode: str, name: str, value: float) -> None:
        """Replace the value of one metric; its logged value is the last one."""
        self._totals[mode][name] = [value, 1.0]

    def drain(self, mode: str) -> dict[str, float]:
        """Values of the window by name; the totals start anew."""
        values = {name: total / count for name, (total, count) in self._totals.pop(mode, {}).items() if count}
        for statistics in self._tokens.pop(mode, []):
            values |= {name: float(value) for name, value in finalize(*statistics).items()}
        return values


def reduce_over_ranks(
    accelerator: Any, statistics: TokenStatistics, sums: Tensor
) -> tuple[TokenStatistics, list[float]]:
    """Reduce everything a micro-batch reports in one exchange and one wait for the device.

    Args:
        accelerator: of the trainer.
        statistics: of this rank.
        sums: `(n,)` further values that add up over ranks.

    Returns:
        The statistics of all ranks on the CPU, and the `n` sums.
    """
    totals, maxima = statistics
    packed = torch.cat([totals, maxima, sums.to(totals.dtype)]).unsqueeze(0)
    ranks = accelerator.gather(packed).cpu()
    end_of_totals, end_of_maxima = totals.numel(), totals.numel() + maxima.numel()
    reduced = TokenStatistics(ranks[:, :end_of_totals].sum(dim=0), ranks[:, end_of_totals:end_of_maxima].amax(dim=0))
    return reduced, ranks[:, end_of_maxima:].sum(dim=0).tolist()


# --- what stops a step -----------------------------------------------------------------------------------------------
def check_step_is_finite(not_finite: int, step: int) -> None:
    """Stop all ranks before anything is updated.

    Args:
        not_finite: log-probs, advantages and losses of the micro-batch that are not, over all ranks.
        step: 1-based optimizer step.

    Raises:
        NonFiniteError: there are some; on every rank, as the count is the same on all of them.
    """
    if not_finite:
        raise NonFiniteError(
            f"{not_finite} of the student's log-probs, advantages or losses of step {step} "
            "are not finite. Nothing was updated in this step. Check the student's weights, lower "
            "`learning_rate`, or train in float32 or bfloat16."
        )


def check_anchor_is_finite(loss: float, step: int) -> None:
    """The same for a micro-batch that is the anchor alone, from its loss over all ranks.

    Raises:
        NonFiniteError: on every rank, before anything is updated.
    """
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"The anchor's loss of step {step} is {loss}. Nothing was updated in this step. "
            "Check the student's weights, lower `learning_rate`, or train in float32 or bfloat16."
        )


def check_grad_norm(grad_norm: Any, step: int, accelerator: Any) -> None:
    """Stop before a gradient that is not finite reaches the optimizer.

    Args:
        grad_norm: of the step over all ranks; None where the backend does not say.
        step: 1-based optimizer step.
        accelerator: of the trainer.

    Raises:
        NonFiniteError: on every rank, as the norm is the same on all of them.
    """
    if grad_norm is None or torch.isfinite(torch.as_tensor(grad_norm)):
        return
    stepped = accelerator.distributed_type == DistributedType.DEEPSPEED
    taken = "DeepSpeed took this step already: go back to a checkpoint."
    now = taken if stepped else "The weights are as they were before."
    raise NonFiniteError(
        f"The gradient norm of step {step} is {float(grad_norm)}, which the optimizer "
        f"spreads to every weight. {now} Lower `learning_rate`, train in float32 or bfloat16, or look at the "
        "rollouts of this step."
    )


def check_overflow(grad_norm: Any, step: int, accelerator: Any) -> None:
    """Stop where a scaler cannot help: a gradient overflows now and then because of its scale, which it then halves.

    Args:
        grad_norm: of the step, as in `check_grad_norm`.
        step: 1-based optimizer step.
        accelerator: of the trainer; DeepSpeed's own scaler stops by itself.

    Raises:
        NonFiniteError: on every rank; the gradient is not finite at a scale below 1.
    """
    if accelerator.scaler is None or grad_norm is None or torch.isfinite(torch.as_tensor(grad_norm)):
        return
    scale = accelerator.scaler.get_scale()
    if scale < 1:
        raise NonFiniteError(
            f"The gradient norm of step {step} is {float(grad_norm)}, and so it was at every scale down to "
            f"{scale:.2g}: what float16 cannot hold is the gradient itself. The weights are as they were before. "
            "Train with bf16=True or in float32, lower `learning_rate`, or look at the rollouts of this step."
        )


# --- facts: what a checkpoint and a model card say of a run ----------------------------------------------------------
class TaughtRun(Run, Protocol):
    """A run with its teacher and reference.

    Attributes:
        teacher: has an `identity`, JSON-ready.
        reference: likewise, or None.
        teacher_tokens: completion tokens scored and generated by teachers so far.
        evaluations: results by name, or None.
        tags: of the model card.
        citation: BibTeX entry of the paper.
    """

    teacher: Any
    reference: Any
    teacher_tokens: Sequence[int]
    evaluations: dict | None

    @property
    def tags(self) -> list[str]:
        """Tags of the model card."""

    @property
    def citation(self) -> str:
        """BibTeX entry of the paper."""


def checkpoint_facts(run: TaughtRun) -> dict:
    """What a checkpoint says about the run's teacher and reference."""
    reference = run.reference.identity if run.reference is not None else None
    return {
        "version": __version__,
        "teacher": without_secrets(run.teacher.identity),
        "reference": without_secrets(reference),
        "teacher_tokens": list(run.teacher_tokens),
    }


def compare_checkpoint_facts(run: TaughtRun, state: dict) -> None:
    """Refuse to resume with other weights in the teacher or reference.

    Raises:
        SGOPDConfigError: names the model and both fingerprints, or where there are none, both names.
    """
    for role, model in (("teacher", run.teacher), ("reference", run.reference)):
        # Hidden on both sides, as older versions wrote them: another key of the same server is the same teacher.
        stored = _identities(role, without_secrets(state.get(role)))
        current = _identities(role, None if model is None else without_secrets(model.identity))
        if stored.keys() != current.keys():
            raise SGOPDConfigError(
                f"The teachers must be those of the checkpoint, got {sorted(current)} in place of {sorted(stored)}. "
                "The resumed run would optimise something else. Give the original ones, or start a new run from the "
                "checkpoint's model."
            )
        for name, facts in stored.items():
            difference = _difference(facts, current[name])
            if difference is not None:
                raise SGOPDConfigError(
                    f"The {name} must be the one of the checkpoint, got {difference}. The resumed run would optimise "
                    f"something else. Give the original {name}, or start a new run from the checkpoint's model."
                )


def _difference(before: dict, now: dict) -> str | None:
    """How a model differs from the checkpoint's, for a message; None where it does not, or nothing tells."""
    old, new = before.get("fingerprint"), now.get("fingerprint")
    if old is not None and new is not None:
        other = f"other weights (fingerprint {new}, the checkpoint has {old} of {before['name']!r})"
        return other if old != new else None
    if old is not None or new is not None:
        return None
    # A server's weights are not seen: it is known by its model's name and by what that was loaded from.
    for key in ("name", "root", "revision"):
        if None not in (before.get(key), now.get(key)) and before[key] != now[key]:
            return f"another model ({key} {now[key]!r}, the checkpoint has {before[key]!r})"
    return None


def _identities(role: str, identity: dict | None) -> dict[str, dict]:
    """What is known of a model, or of each of several teachers, by the name that messages use."""
    several = (identity or {}).get("teachers")
    return {role: identity or {}} if several is None else {f"{role} {name}": part for name, part in several.items()}


def card_arguments(run: TaughtRun, model_name: str | None, dataset_name: str | None, tags: Any) -> dict:
    """What the model card says of a run."""
    args: Any = run.args
    inherited = {field.name for field in fields(GRPOConfig)}
    own = [field.name for field in fields(args) if field.name not in inherited]
    sizes = ("learning_rate", "num_generations", "max_completion_length", "temperature", "beta", "loss_type", "seed")
    return {
        "model_name": model_name or Path(args.output_dir).name,
        "base_model": get_config_model_id(run.model.config) or None,
        "teacher_model": run.teacher.identity["name"] or None,
        "reference_model": run.reference.identity["name"] if run.reference is not None else None,
        "dataset_name": dataset_name,
        "tags": sorted({*run.tags, *([tags] if isinstance(tags, str) else tags or [])}),
        "config": {name: getattr(args, name) for name in (*own, *sizes)},
        "is_adapter": hasattr(run.accelerator.unwrap_model(run.model), "peft_config"),
        "evaluations": run.evaluations,
        "citation": run.citation,
    }
