"""All teacher rollouts that a run will ask for, written before it starts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import TrainerState

from ...errors import SGOPDConfigError
from ...random_state import mixed_seed
from ...run import Run
from ...teachers.routed import teacher_prompt_ids
from ..callback import TeacherAnchorCallback
from ..prompts import PRECOMPUTE_SEED, prompt_stream, stream_samples
from .cache import CacheRun, RolloutCache

if TYPE_CHECKING:
    from ...run import SGOPDConfig


class PlannedRun(Run, Protocol):
    """A run that knows how long it will be."""

    def get_train_dataloader(self) -> Any:
        """The student's batches, of which their number is asked."""

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple:
        """What transformers' loop starts from, the steps of the run the last of it."""


class PrecomputeRun(CacheRun, PlannedRun, Protocol):
    """A run that is built and will not train, as this module sees it.

    Attributes:
        rollout_cache: receives the rollouts.
    """

    rollout_cache: RolloutCache

    def judge(self, examples: list[dict], completion_ids: list[list[int]]) -> list[float | None]:
        """The verifier's verdicts on completions for these rows."""


@dataclass
class RolloutCounts:
    """What became of the rollouts of a schedule, over all processes.

    Attributes:
        stored: were in the store before.
        written: were generated now.
        right: of those written, judged right by the verifier.
        tokens: generated now.
        seconds: wall time.
    """

    stored: int = 0
    written: int = 0
    right: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class _PlannedRun:
    """A run of so many steps and processes, for its prompts: see `PromptSource`."""

    args: "SGOPDConfig"
    state: TrainerState
    train_dataset: Any
    processes: int


def planned_rollouts(run: PrecomputeRun, processes: int | None = None) -> list[tuple[int, int]]:
    """Row of the training set and sample index of every rollout that the anchor will ask for, in that order.

    Args:
        run: ready to train.
        processes: that will train; default: as many as now.

    Raises:
        SGOPDConfigError: another number of processes where the number of steps depends on it.
    """
    args: Any = run.args  # what it declares as optional is filled in by now
    if processes is None:
        processes = run.accelerator.num_processes
    elif processes != run.accelerator.num_processes and args.max_steps <= 0:
        raise SGOPDConfigError(
            f"`train_processes` must be left out where `max_steps` is not set, got {processes}. The number of steps "
            "follows from the number of processes. Set max_steps, or start as many processes as will train."
        )
    total = total_steps(run)
    planned = _PlannedRun(args, TrainerState(max_steps=total), run.train_dataset, processes)
    callback, stream, each = TeacherAnchorCallback(), prompt_stream(planned), args.teacher_num_generations
    wanted: dict[tuple[int, int], None] = {}
    for step in range(1, total + 1):
        if callback.alpha(args, step, total) <= 0:
            continue
        first, end = callback.prompt_range(planned, step)
        slots = range((end - first) * each)
        chosen = [row for row in stream.between(first, end) for _ in range(each)]
        samples = stream_samples(stream, first, slots, each, run.rollout_cache.repeats)
        wanted |= dict.fromkeys(zip(chosen, samples, strict=True))
    return list(wanted)


def total_steps(run: PlannedRun) -> int:
    """Optimizer steps of a run that has not started."""
    if run.args.max_steps > 0:
        return run.args.max_steps
    return run.set_initial_training_values(run.args, run.get_train_dataloader())[-1]


def precompute(run: PrecomputeRun, wanted: Sequence[tuple[int, int]], batch_size: int) -> RolloutCounts:
    """Have the teacher write the rollouts that the run's cache lacks; all processes together.

    Every batch, of all processes together, is stored as soon as it is judged: a killed run goes on where it stopped,
    with the batches, and so with the rollouts, that it would have had.

    Args:
        run: with a writable `rollout_cache`.
        wanted: row of the training set and sample index of each.
        batch_size: rollouts that one process writes at once.
    """
    started, counts = time.perf_counter(), RolloutCounts()
    cache, accelerator = run.rollout_cache, run.accelerator
    examples = {row: run.train_dataset[row] for row, _ in wanted}
    prompt_ids = run.tokenize_prompts([example["prompt"] for example in examples.values()])
    read_ids = teacher_prompt_ids(list(examples.values()), prompt_ids, run.tokenize_prompts)
    read = dict(zip(examples, read_ids, strict=True))
    missing = [(row, sample) for row, sample in wanted if not cache.holds(examples[row], read[row], sample)]
    # What was read may differ, as other runs append: all go through one list, in calls of the same number.
    missing = broadcast_object_list([missing])[0]
    at_once = batch_size * accelerator.num_processes

    def judge(rows: list[dict], completion_ids: list[list[int]]) -> list[float | None]:
        verdicts = run.judge(rows, completion_ids)
        counts.written += len(verdicts)
        counts.right += sum(verdict == 1 for verdict in verdicts)
        counts.tokens += sum(map(len, completion_ids))
        return verdicts

    quiet = run.args.disable_tqdm or not accelerator.is_main_process
    with tqdm(
        total=len(wanted),
        initial=len(wanted) - len(missing),
        desc="Teacher rollouts",
        unit="rollout",
        dynamic_ncols=True,
        disable=quiet,
    ) as bar:
        for start in range(0, len(missing), at_once):
            batch = missing[start : start + at_once]
            own = batch[accelerator.process_index :: accelerator.num_processes]
            # The first of the batch, not its number, so that a resumed run does not repeat an earlier seed.
            seed = mixed_seed(run.args.seed, PRECOMPUTE_SEED, *batch[0], accelerator.process_index)
            rows, samples = [row for row, _ in own], [sample for _, sample in own]
            written = cache.written([examples[row] for row in rows], [read[row] for row in rows], samples, seed, judge)
            # By one process and at once: where one had stored its part and another had not, a run that goes on would
            # divide what is left in another way.
            gathered = gather_object(written)
            if accelerator.is_main_process:
                cache.store.add(gathered)
            bar.update(len(batch))
    counts.seconds = time.perf_counter() - started
    return _over_processes(counts, stored=len(wanted) - len(missing))


def _over_processes(counts: RolloutCounts, stored: int) -> RolloutCounts:
    ranks = gather_object([counts])
    total = {field.name: sum(getattr(rank, field.name) for rank in ranks) for field in fields(RolloutCounts)}
    return RolloutCounts(**total | {"stored": stored, "seconds": max(rank.seconds for rank in ranks)})
