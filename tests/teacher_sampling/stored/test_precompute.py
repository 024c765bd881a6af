"""Ranks that read a store at different times write one schedule together. No model is loaded."""

from types import SimpleNamespace
from typing import Any

import pytest

from sg_opd_trl.teacher_sampling.stored import precompute as module

WANTED = [(row, 0) for row in range(5)]


class Cache:
    """Holds some rows; remembers what it was asked to write, and what it was given to keep."""

    def __init__(self, held: set[int]) -> None:
        self.held, self.calls, self.kept = held, [], []
        self.store = SimpleNamespace(add=self.kept.append)

    def holds(self, example: dict, prompt: list[int], sample: int) -> bool:
        return example["row"] in self.held

    def written(self, examples: list[dict], *_: Any) -> list[int]:
        rows = [example["row"] for example in examples]
        self.calls.append(rows)
        return rows


def run(rank: int, held: set[int]) -> tuple[Cache, Any]:
    cache = Cache(held)
    trainer = SimpleNamespace(
        rollout_cache=cache,
        accelerator=SimpleNamespace(num_processes=2, process_index=rank, is_main_process=rank == 0),
        train_dataset=[{"row": row, "prompt": "x" * row} for row in range(5)],
        tokenize_prompts=lambda prompts: [[len(prompt)] for prompt in prompts],
        args=SimpleNamespace(disable_tqdm=True, seed=0),
    )
    return cache, module.precompute(trainer, WANTED, batch_size=1)


def test_every_rank_works_off_the_first_ranks_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process appended rows 1 to 3 before the second rank read the folder."""
    sent: list[Any] = []

    def broadcast(values: list[Any]) -> list[Any]:
        sent.append(values[0])
        return sent[:1]

    monkeypatch.setattr(module, "broadcast_object_list", broadcast, raising=False)
    # What the second rank would have sent is not in a test without one.
    monkeypatch.setattr(module, "gather_object", lambda own: own)
    (first, counts), (second, _) = run(0, set()), run(1, {1, 2, 3})
    assert first.calls == [[0], [2], [4]]
    assert second.calls == [[1], [3], []]
    assert (first.kept, second.kept) == ([[0], [2], [4]], []), "one process writes"
    assert counts.stored == 0
    assert sent == [WANTED, [(0, 0), (4, 0)]], "each rank has read another state"
