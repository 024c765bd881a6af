"""All rows of a run; and those that are looked at in the first seconds of training."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from transformers import TrainerState

from ..agreement import Agreement, plain_ids
from ..data import datasets_of, first_prompts, first_rows
from ..errors import SGOPDConfigError, SGOPDError
from ..models.context import extended_positions
from ..models.internals import inner_model
from ..noise import MeasuredRun, can_be_measured, measure
from ..random_state import forked_random_state
from ..teacher_sampling.stored.precompute import PlannedRun, total_steps
from ..teachers.fit import RenderingRun
from ..teachers.local import FrozenModel, LocalTeacher
from ..teachers.routed import RoutedTeacher
from ..teachers.server import ServerTeacher
from ..verifiers.verdicts import RunVerifier
from .machine import estimated_need, memory_of, memory_row, time_row
from .models import context_row, log_prob_row
from .report import Report, Row, rows_of_error
from .rollouts import PROMPTS, FirstRollouts, SampledRun, make_first_rollouts, rollout_rows
from .servers import server_rows
from .stack import stack_row
from .texts import chat_rows, tokenizer_rows
from .verifier import GOLDS_COUNTED, GOLDS_TRIED, Judge, gold_column, is_built_in, verifier_rows

logger = logging.getLogger(__name__)


class InspectedRun(SampledRun, RenderingRun, MeasuredRun, PlannedRun, Protocol):
    """A run that is ready to train.

    Attributes:
        tokenizers: of teachers and reference, by what messages call them; None where one is not known.
        reference: the model, None without one of its own.
        agreements: what the check of log-probs has found when the run was set up.
    """

    tokenizers: dict[str, Any]
    reference: Any
    agreements: list[Agreement]


def inspect_run(run: InspectedRun, prompts: int = PROMPTS) -> Report:
    """Look at everything; an error in one part is a red row of it, and hides no other.

    Args:
        run: ready to train.
        prompts: that are sampled, a group of rollouts each; 0 samples nothing.
    """
    start = time.perf_counter()
    with forked_random_state(run.accelerator.device):
        rows = [stack_row(), *_text_rows(run), *_context_rows(run), log_prob_row(run.agreements)]
        rows += _verifier_rows(run)
        rows += server_rows(_teachers(run), _probe(run), run.dead_zone)
        rows.append(_memory_row(run))
        rows += _sampled_rows(run, prompts)
    return Report(tuple(rows), time.perf_counter() - start)


def first_seconds(run: InspectedRun) -> None:
    """Look at what takes no time, before the first step: yellow rows are warnings, a red one ends the run.

    No model runs, nothing is sampled, and no function of the caller's is called: a run goes on as it would without.

    Raises:
        SGOPDConfigError: names what cannot go well.
    """
    with forked_random_state(run.accelerator.device):
        # An estimate is no reason to stop.
        rows = [stack_row(), _as_doubt(_memory_row(run))]
        if is_built_in(run.verifier.function):
            rows += _verifier_rows(run, counted=GOLDS_TRIED)
    report = Report(tuple(rows))
    if run.accelerator.is_main_process:
        for row in report.in_state("yellow"):
            logger.warning("%s: %s %s", row.name, row.found, row.change)
    wrong = [f"{row.name}: {row.found} {row.change}" for row in report.in_state("red")]
    # A verifier may be too slow on one rank alone: the others would wait for that one in the first step.
    own = torch.tensor([len(wrong)], device=run.accelerator.device)
    if int(run.accelerator.gather(own).max()):
        wrong = wrong or ["Another process has found what cannot go well, and says it."]
        raise SGOPDConfigError("\n".join([*wrong, "To train all the same set preflight=False."]))


def _as_doubt(row: Row) -> Row:
    return Row(row.name, "yellow", row.found, row.change) if row.state == "red" else row


# --- the parts -------------------------------------------------------------------------------------------------------
def _text_rows(run: InspectedRun) -> Iterator[Row]:
    yield from tokenizer_rows(run.tokenizer, run.tokenizers)
    # An environment writes its own prompts, which nobody knows yet.
    if run.environment_factories is None:
        prompts, kwargs = first_prompts(run.train_dataset), dict(run.chat_template_kwargs or {})
        yield from chat_rows(run.tokenizer, run.tokenizers, prompts, kwargs, run.eos_token_ids)


def _context_rows(run: InspectedRun) -> Iterator[Row]:
    if run.environment_factories is not None:
        return
    rooms: dict[str, int | None] = {"student": extended_positions(run.accelerator.unwrap_model(run.model).config)}
    for model in _frozen(run):
        rooms[model.role] = extended_positions(run.accelerator.unwrap_model(model.model).config)
    for teacher in _teachers(run):
        if isinstance(teacher, ServerTeacher):
            rooms[f"teacher server {teacher.client.addresses[0]}"] = teacher.client.max_length
    prompts = [row["prompt"] for row in first_rows(run.train_dataset)[:GOLDS_COUNTED]]
    longest = max(map(len, run.tokenize_prompts(prompts)))
    yield context_row(rooms, longest, run.args.longest_completion)


def _verifier_rows(run: InspectedRun, counted: int = GOLDS_COUNTED) -> list[Row]:
    datasets = {name: first_rows(dataset) for name, dataset in datasets_of(run)}
    rows = rows_of_verifier(run.verifier, run.tokenizer, datasets, run.state, counted)
    # What the verifier logged on these answers belongs to no rollouts.
    run.verifier.take_metrics()
    return rows


def rows_of_verifier(
    verifier: RunVerifier,
    tokenizer: Any,
    datasets: dict[str, list[dict]],
    state: Any = None,
    counted: int = GOLDS_COUNTED,
) -> list[Row]:
    """The verifier's rows, see `verifier_rows`, also where there is no run yet.

    Args:
        verifier: of the run.
        tokenizer: the student's.
        datasets: rows by the data set's name.
        state: of transformers.
        counted: golds of each data set that are counted; of a verifier of the caller's fewer.
    """
    counted = counted if is_built_in(verifier.function) else GOLDS_TRIED

    def judge(examples: Sequence[dict], texts: Sequence[str]) -> Sequence[float | None]:
        ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        completions = [
            text if isinstance(example["prompt"], str) else [{"role": "assistant", "content": text}]
            for example, text in zip(examples, texts, strict=True)
        ]
        return verifier.judge(list(examples), completions, ids, state or TrainerState())

    asked: Judge = judge
    return verifier_rows(verifier.name, asked, gold_column(verifier.function), datasets, counted)


def _teachers(run: InspectedRun) -> Sequence[object]:
    return run.teacher.distinct if isinstance(run.teacher, RoutedTeacher) else [run.teacher]


def _frozen(run: InspectedRun) -> list[FrozenModel]:
    """Models with weights of their own; an adapter on the student's has its model only while it scores."""
    models = [each for each in (*_teachers(run), run.reference) if isinstance(each, FrozenModel)]
    return [each for each in models if each.model is not None]


def on_device_at_once(models: Sequence[FrozenModel]) -> list[FrozenModel]:
    """Those that are there at once: of teachers that wait in host memory the largest."""

    def size(each: FrozenModel) -> int:
        return sum(weight.numel() * weight.element_size() for weight in each.model.parameters())

    waiting = [each for each in models if isinstance(each, LocalTeacher) and each.host_weights is not None]
    return [each for each in models if each not in waiting] + sorted(waiting, key=size)[-1:]


def _probe(run: InspectedRun) -> list[int]:
    """The beginning of a real prompt, or some ids where prompts are not known."""
    if run.environment_factories is not None:
        return plain_ids(run.tokenizer, inner_model(run.model).config.get_text_config().vocab_size)[:32]
    return run.tokenize_prompts(first_prompts(run.train_dataset)[:1])[0][:32]


def _memory_row(run: InspectedRun) -> Row:
    args: Any = run.args  # TRL has filled in by now what its fields leave open
    # A model that is teacher and reference is there once.
    frozen = list({id(each.model): each.model for each in on_device_at_once(_frozen(run))}.values())
    tokens = args.per_device_train_batch_size * (args.max_completion_length or 0)
    need = estimated_need(
        run.accelerator.unwrap_model(run.model), frozen, tokens, checkpointing=args.gradient_checkpointing
    )
    return memory_row(need, memory_of(run.accelerator.device))


def _sampled_rows(run: InspectedRun, prompts: int) -> list[Row]:
    several = run.accelerator.num_processes > 1
    if not prompts or several or run.environment_factories is not None:
        why = "there are several processes" if several else "nothing was to be sampled"
        return [Row("rollouts", "yellow", f"No rollout was made: {why}.", "Look in one process, with some prompts.")]
    try:
        found = make_first_rollouts(run, prompts)
    except SGOPDError as error:
        return rows_of_error("rollouts", error)
    except Exception as error:  # noqa: BLE001  # a reward function of the caller's, or a library under a model
        said = f"No rollout could be made, scored and judged: {type(error).__name__}: {str(error)[:300]}"
        return [Row("rollouts", "red", said, "Mend what raises it; a run would end in it with its traceback.")]
    gated = run.args.sign_gated_extrapolation
    noise = measure(run, run.dead_zone) if gated and can_be_measured(run) else None
    return [*rollout_rows(found, gated=gated, noise=noise), _time_row(run, found)]


def _time_row(run: InspectedRun, found: FirstRollouts) -> Row:
    args: Any = run.args  # TRL has filled in by now what its fields leave open
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return time_row(found.seconds, found.rollouts, rows, total_steps(run), checkpointing=args.gradient_checkpointing)
