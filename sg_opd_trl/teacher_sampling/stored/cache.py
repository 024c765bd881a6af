"""The teacher's rollouts, read where they are stored and written by the teacher where they are not."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, Protocol

from ...data import TEACHER_ID
from ...machines import machines_without
from ...run import Run
from ...teachers import RoutedTeacher, Sampling, Teacher
from ...teachers.routed import teacher_of
from ..prompts import occurrences
from .identity import teacher_facts
from .keys import context_facts, differences, digest, tokenizer_facts
from .store import Key, RolloutStore, StoredRollout, open_store

logger = logging.getLogger(__name__)

Judge = Callable[[list[dict], list[list[int]]], list[float | None]]
"""`(rows of the data set, completion ids) -> verdicts`."""
_SHOWN = 5


class CacheRun(Run, Protocol):
    """The run as the cache sees it.

    Attributes:
        teacher: writes what is not stored.
        teacher_sampling: how it writes.
    """

    teacher: Teacher | RoutedTeacher
    teacher_sampling: Sampling

    def generation_budget(self, prompt_ids: list[list[int]]) -> int:
        """Tokens of one of the teacher's generation batches for these prompts."""

    def agree_on_calls(self, calls: int) -> int:
        """The largest number of calls over all ranks, where a call is a collective operation."""


class RolloutCache:
    """Stands between the anchor and the teacher: what is stored is read, the rest is generated and stored.

    Args:
        run: whose teacher writes.
        store: where rollouts are kept; a data set on the Hub is only read.

    Attributes:
        tokens_reused: completion tokens read in place of generated ones, by this process.
    """

    def __init__(self, run: CacheRun, store: RolloutStore) -> None:
        self.run = run
        self.store = store
        self.tokens_reused = 0
        self._contexts: dict[int, str] = {}
        self._told_of_misses = False
        tokenizer, sampling = tokenizer_facts(run.tokenizer), asdict(run.teacher_sampling)
        facts, student = {}, run.accelerator.unwrap_model(run.model)
        for teacher in run.teacher.distinct if isinstance(run.teacher, RoutedTeacher) else [run.teacher]:
            own = context_facts(teacher_facts(teacher, student), tokenizer, sampling)
            self._contexts[id(teacher)] = digest(own)
            facts[digest(own)] = own
        store.read(facts)
        self._say_what_was_found(list(facts.values()))

    @cached_property
    def repeats(self) -> list[int]:
        """Of every row of the training set, how many rows before it have the same prompt."""
        return occurrences(map(repr, self.run.train_dataset["prompt"]))

    def complete(
        self,
        examples: Sequence[dict],
        prompts: Sequence[list[int]],
        samples: Sequence[int],
        seed: int,
        judge: Judge | None = None,
    ) -> tuple[list[list[int]], list[bool]]:
        """One completion per prompt; all ranks must call this the same number of times.

        Args:
            examples: rows of the data set.
            prompts: token ids that the teacher reads.
            samples: sample index of each rollout.
            seed: of those that have to be generated.
            judge: verdicts on new rollouts, stored beside them; None stores them unjudged.

        Returns:
            The completions, and whether each was stored before.
        """
        keys = self._keys(examples, prompts, samples)
        stored = [self.store.get(*key) is not None for key in keys]
        missing = [row for row, known in enumerate(stored) if not known]
        self._say_what_is_missing(len(missing), len(keys))
        # A rank that lacks nothing calls all the same where the teacher is sharded: its forwards are collective.
        if self.run.agree_on_calls(len(missing)):
            own = [examples[row] for row in missing]
            self.store.add(self._written(own, [keys[row] for row in missing], seed, judge))
        completions = [self.store[key] for key in keys]
        self.tokens_reused += sum(len(ids) for ids, known in zip(completions, stored, strict=True) if known)
        return completions, stored

    def written(
        self, examples: Sequence[dict], prompts: Sequence[list[int]], samples: Sequence[int], seed: int, judge: Judge
    ) -> list[StoredRollout]:
        """New rollouts, judged and not stored yet; all ranks must call this the same number of times.

        Args:
            examples: rows of the data set, of none of which the rollout is stored.
            prompts: token ids that the teacher reads.
            samples: sample index of each rollout.
            seed: that they are drawn from.
            judge: gives their verdicts.
        """
        if not self.run.agree_on_calls(len(examples)):
            return []
        return self._written(list(examples), self._keys(examples, prompts, samples), seed, judge)

    def prefetch(
        self, examples: Sequence[dict], prompts: Sequence[list[int]], samples: Sequence[int], seed: int
    ) -> None:
        """Have the teacher begin what `complete` will have to generate; only where it is a `PrefetchingTeacher`."""
        keys = self._keys(examples, prompts, samples)
        missing = [row for row, key in enumerate(keys) if self.store.get(*key) is None]
        own: list[list[int]] = [prompts[row] for row in missing]
        teacher: Any = teacher_of(self.run.teacher, [examples[row] for row in missing])
        teacher.prefetch_rollouts(own, self.run.teacher_sampling, seed, self.run.generation_budget(own))

    def holds(self, example: dict, prompt: Sequence[int], sample: int) -> bool:
        """Whether a rollout is stored."""
        return self.store.get(self._context(example), prompt, sample) is not None

    def _written(self, examples: list[dict], keys: list[Key], seed: int, judge: Judge | None) -> list[StoredRollout]:
        run, prompts = self.run, [list(prompt) for _, prompt, _ in keys]
        teacher = teacher_of(run.teacher, examples)
        written = teacher.generate(prompts, run.teacher_sampling, seed, run.generation_budget(prompts))
        texts = run.tokenizer.batch_decode(written, skip_special_tokens=True) if written else []
        verdicts = judge(examples, written) if judge is not None and written else [None] * len(written)
        return [
            StoredRollout(context, prompt, sample, ids, text, verdict)
            for (context, prompt, sample), ids, text, verdict in zip(keys, written, texts, verdicts, strict=True)
        ]

    def _keys(self, examples: Sequence[dict], prompts: Sequence[list[int]], samples: Sequence[int]) -> list[Key]:
        return [
            (self._context(example), tuple(prompt), sample)
            for example, prompt, sample in zip(examples, prompts, samples, strict=True)
        ]

    def _context(self, example: dict) -> str:
        teacher = self.run.teacher
        if isinstance(teacher, RoutedTeacher):
            teacher = teacher.teachers[str(example.get(TEACHER_ID))]
        return self._contexts[id(teacher)]

    # --- messages ------------------------------------------------------------------------------------------------
    def _say_what_was_found(self, own: list[dict]) -> None:
        logger.info("%s: %d teacher rollouts for this run's teacher and settings.", self.store.name, len(self.store))
        others = [] if len(self.store) else list(self.store.other_contexts().values())
        if others:
            closest = min((list(differences(facts, other)) for facts in own for other in others), key=len)
            logger.warning(
                "`teacher_rollouts_path` %s has rollouts, but none of this run's teacher and settings, so that they "
                "are %s. Closest are rollouts that differ in (this run and the stored): %s.",
                self.store.name,
                "generated and added" if self.store.writable else "generated in every run",
                "; ".join(closest[:_SHOWN]),
            )

    def _say_what_is_missing(self, missing: int, wanted: int) -> None:
        if missing and not self.store.writable and not self._told_of_misses:
            self._told_of_misses = True
            logger.warning(
                "%d of %d teacher rollouts of this step are not in the data set %s. They are generated and not kept, "
                "as are later ones. Give a folder as `teacher_rollouts_path` to keep them.",
                missing,
                wanted,
                self.store.name,
            )


def open_cache(run: CacheRun) -> RolloutCache | None:
    """The cache of `teacher_rollouts_path`; None without one.

    Raises:
        SGOPDConfigError: a path that is no folder and no data set, or a teacher that cannot be told from others.
    """
    path = run.args.teacher_rollouts_path
    if path is None:
        return None
    with run.args.main_process_first(desc="teacher rollouts"):
        store = open_store(path)
    if store.writable and (without := machines_without(store.folder)) and run.accelerator.is_main_process:
        logger.warning(
            "`teacher_rollouts_path` %s is not one folder: %s have one of their own. Each machine reads and keeps "
            "what its own processes wrote, and a run with other processes on it writes anew. Set a folder on a disk "
            "that all machines share.",
            path,
            without,
        )
    cache = RolloutCache(run, store)
    # Nobody writes before everybody has read: ranks must agree on what is stored.
    run.accelerator.wait_for_everyone()
    return cache
