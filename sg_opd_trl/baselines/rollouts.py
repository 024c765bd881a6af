"""Teacher rollouts, written once before training, and read again where nothing that they depend on has changed."""

import hashlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..agreement import check_writer
from ..evaluation_sampling import end_token_ids
from ..files import write_atomically
from ..models.generate import generate_completions
from ..random_state import mixed_seed
from ..teachers.local import fingerprint
from ..verifiers.calls import read_completions
from .teacher import TeacherUse, padding_ids

logger = logging.getLogger(__name__)

ROLLOUTS_FILE = "teacher_rollouts.jsonl"

Judge = Callable[[list[dict], list[Any], list[list[int]]], list[float | None]]
"""`(rows, completions as reward functions get them, their ids) -> verdicts`."""


@dataclass(frozen=True)
class Rollout:
    """Token ids of a completion, the end token included, and its verdict: 1 right, 0 wrong, None not judged."""

    completion_ids: list[int]
    verdict: float | None

    @classmethod
    def from_line(cls, line: bytes) -> "Rollout":
        """Read one line of a file.

        Raises:
            ValueError: it is not JSON, or its ids are none.
            TypeError: it has other fields.
        """
        rollout = cls(**json.loads(line))
        if not isinstance(rollout.completion_ids, list) or not all(type(x) is int for x in rollout.completion_ids):
            raise ValueError("completion_ids")
        return rollout


@dataclass(frozen=True)
class RolloutRequest:
    """What the teacher is asked to write, one rollout per entry.

    Attributes:
        prompt_ids: rendered prompts; equal ones behind one another share a prefill.
        examples: training rows of the prompts.
        max_new_tokens: longest completion.
        temperature: None decodes greedily.
        top_p: nucleus, 1 is off.
        seed: of the run; every batch has its own, so that neither a kill nor the number of processes changes them.
        batch_size: rollouts that one process writes at once.
    """

    prompt_ids: list[list[int]]
    examples: list[dict]
    max_new_tokens: int
    temperature: float | None
    top_p: float
    seed: int
    batch_size: int

    def key(self, teacher: Any, end_ids: list[int]) -> str:
        """Hash of everything the rollouts depend on; verdicts are no part of them, stored rollouts are judged anew."""
        facts = asdict(self) | {"teacher": fingerprint(teacher), "dtype": str(teacher.dtype), "end": end_ids}
        del facts["examples"]  # they only serve the verdicts
        if self.temperature is None:
            del facts["seed"]  # greedy decoding draws nothing: runs of all seeds share their targets
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]

    def generation_config(self, end_ids: list[int], teacher: Any, tokenizer: Any) -> GenerationConfig:
        """Settings of `generate`."""
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            do_sample=self.temperature is not None,
            **(sampled if self.temperature is not None else {}),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=end_ids,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=padding_ids(teacher, tokenizer),
            disable_compile=True,  # lengths change with every batch, and each would be compiled anew
        )


class RolloutFile:
    """Rollouts behind a line with their key, in whole batches, so that a killed run goes on where it stopped.

    They were paid for: a file is never written over unless all that it holds is in the new one. What cannot be read,
    or is in the way, is kept beside it.
    """

    def __init__(self, path: Path, key: str, batch_size: int, total: int) -> None:
        self.path, self.key, self.batch_size, self.total = path, key, batch_size, total

    def take(self) -> None:
        """Have the file be that of this key; what it holds of another one is kept beside it, for when that is back."""
        self._clear_of_others()
        stored = self._of(self.key)
        if not stored.is_file() or self.path.exists():
            return
        if _key_of(stored) == self.key:
            stored.replace(self.path)
        else:
            _set_aside(stored, "does not begin with the key of its rollouts")

    def _clear_of_others(self) -> None:
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return
        other = _key_of(self.path)
        if other is None:
            _set_aside(self.path, "does not begin with the key of its rollouts")
        elif other != self.key:
            kept = self._of(other)
            if kept.exists():
                _set_aside(kept, "is in the place of other rollouts of these settings")
            logger.info("%s holds rollouts of other settings: they are kept in %s.", self.path, kept.name)
            self.path.replace(kept)

    def _of(self, key: str) -> Path:
        return self.path.with_name(f"{self.path.stem}-{key}{self.path.suffix}")

    def read(self) -> list[Rollout]:
        """The complete batches; `take` comes before."""
        rollouts = self._rollouts()
        whole = len(rollouts) if len(rollouts) == self.total else len(rollouts) // self.batch_size * self.batch_size
        return rollouts[:whole]

    def replace(self, rollouts: list[Rollout]) -> None:
        """Leave the file with exactly these, whole or as it was."""
        write_atomically(self.path, json.dumps({"key": self.key}) + "\n" + _lines(rollouts))

    def append(self, rollouts: list[Rollout]) -> None:
        """Add batches."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines(rollouts))

    def _rollouts(self) -> list[Rollout]:
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        rollouts = []
        for line in lines[1:]:
            try:
                rollouts.append(Rollout.from_line(line))
            except (ValueError, TypeError):
                break
        if len(rollouts) == len(lines[1:]):
            return rollouts
        if len(rollouts) == len(lines) - 2 and not lines[-1].endswith(b"\n"):
            logger.warning("%s ends in the middle of a rollout; it is written on from there.", self.path)
        else:
            # No kill leaves that. What is behind it is not read, but may be worth a look.
            _set_aside(self.path, f"has a line {len(rollouts) + 2} that is no rollout", copied=True)
        return rollouts


def _key_of(path: Path) -> str | None:
    """The key in a file's first line; None for a line that has none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.readline()
    try:
        return str(json.loads(head)["key"])
    except (ValueError, TypeError, KeyError):
        return None


def _set_aside(path: Path, reason: str, *, copied: bool = False) -> None:
    """Keep a file under another name, where nothing reads it or writes over it."""
    aside = next(
        free
        for number in itertools.count(1)
        if not (free := path.with_name(f"{path.stem}-aside-{number}{path.suffix}")).exists()
    )
    logger.warning(
        "%s %s: it is kept as %s, and the teacher writes what is missing anew. Mend it and give it its name back, or "
        "delete it.",
        path,
        reason,
        aside.name,
    )
    if copied:
        shutil.copyfile(path, aside)
    else:
        path.replace(aside)


def teacher_rollouts(
    teacher: Any,
    tokenizer: Any,
    request: RolloutRequest,
    judge: Judge | None,
    *,
    path: Path,
    args: Any,
) -> tuple[list[Rollout], TeacherUse]:
    """Read the rollouts that are stored and judge them anew, write the others, all processes together.

    Args:
        teacher: model on this process's device.
        tokenizer: of the student.
        request: what is asked for.
        judge: None leaves rollouts unjudged.
        path: file of the rollouts, read and written by the main process.
        args: training arguments.

    Returns:
        One rollout per entry of the request, the same on every process, and what this process took part in.
    """
    started = time.perf_counter()
    end_ids = end_token_ids(teacher, tokenizer)
    total, size = len(request.prompt_ids), request.batch_size
    file = RolloutFile(path, request.key(teacher, end_ids), size, total)
    # As many lists as objects are exchanged: accelerate broadcasts the entries of a list.
    found = _stored(file, tokenizer, request, judge) if args.process_index == 0 else None
    rollouts: list[Rollout] = broadcast_object_list([found])[0]
    use = TeacherUse(tokens_reused=_tokens(rollouts) if args.process_index == 0 else 0)
    starts = list(range(len(rollouts), total, size))
    config = request.generation_config(end_ids, teacher, tokenizer)
    quiet = args.disable_tqdm or args.process_index != 0
    if starts:
        check_writer(teacher, tokenizer)
    with tqdm(total=total, initial=len(rollouts), desc="Teacher rollouts", disable=quiet, dynamic_ncols=True) as bar:
        for first in range(0, len(starts), args.world_size):
            mine = starts[first : first + args.world_size][args.process_index : args.process_index + 1]
            written = [
                rollout for start in mine for rollout in _write(teacher, tokenizer, request, config, start, judge)
            ]
            gathered = gather_object(written)
            if args.process_index == 0:
                file.append(gathered)
            rollouts += gathered
            use.tokens_generated += _tokens(written)
            bar.update(len(gathered))
    use.seconds = time.perf_counter() - started
    return rollouts, use


def _stored(file: RolloutFile, tokenizer: Any, request: RolloutRequest, judge: Judge | None) -> list[Rollout]:
    """What the file holds, with verdicts of now: verifier or golds may have changed under their names."""
    file.take()
    rollouts, size = file.read(), request.batch_size
    judged: list[Rollout] = []
    for start in range(0, len(rollouts), size):
        ids = [rollout.completion_ids for rollout in rollouts[start : start + size]]
        judged += _judged(tokenizer, request, start, ids, judge)
    file.replace(judged)
    return judged


def _write(
    teacher: Any, tokenizer: Any, request: RolloutRequest, config: GenerationConfig, start: int, judge: Judge | None
) -> list[Rollout]:
    """One batch, whose randomness depends on the seed and its place alone."""
    batch = slice(start, start + request.batch_size)
    devices = [teacher.device] if teacher.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(mixed_seed(request.seed, 4, start))
        ids = generate_completions(teacher, request.prompt_ids[batch], config, role="teacher")
    return _judged(tokenizer, request, start, ids, judge)


def _judged(
    tokenizer: Any, request: RolloutRequest, start: int, ids: list[list[int]], judge: Judge | None
) -> list[Rollout]:
    """Completions of the batch that begins at `start`, with their verdicts."""
    verdicts: Sequence[float | None] = [None] * len(ids)
    if judge is not None:
        batch = slice(start, start + len(ids))
        examples = request.examples[batch]
        prompts = [example["prompt"] for example in examples]
        completions = read_completions(tokenizer, prompts, ids, lambda _: request.prompt_ids[batch])
        verdicts = judge(examples, completions, ids)
    return [Rollout(completion, verdict) for completion, verdict in zip(ids, verdicts, strict=True)]


def _lines(rollouts: list[Rollout]) -> str:
    return "".join(json.dumps(asdict(rollout)) + "\n" for rollout in rollouts)


def _tokens(rollouts: list[Rollout]) -> int:
    return sum(len(rollout.completion_ids) for rollout in rollouts)
