"""Stored teacher rollouts without a model: what the judge is given, batch by batch, and what the file then holds."""

from pathlib import Path
from types import SimpleNamespace

from sg_opd_trl.baselines.rollouts import ROLLOUTS_FILE, Rollout, RolloutFile, RolloutRequest, _stored


def test_golds_that_were_edited_count_for_stored_rollouts(tmp_path: Path) -> None:
    file = RolloutFile(tmp_path / ROLLOUTS_FILE, "key", batch_size=2, total=5)
    file.replace([Rollout([number], 0.0) for number in range(5)])
    request = RolloutRequest(
        [[7]] * 5, [{"prompt": "7", "gold": number % 2} for number in range(5)], 4, 1.0, 1.0, 0, 2
    )
    tokenizer = SimpleNamespace(batch_decode=lambda ids, **_: [str(row[0]) for row in ids])
    asked = []

    def judge(examples: list[dict], texts: list[str], ids: list[list[int]]) -> list[float | None]:
        asked.append(texts)
        return [float(example["gold"]) for example in examples]

    rollouts = _stored(file, tokenizer, request, judge)
    assert asked == [["0", "1"], ["2", "3"], ["4"]]
    assert rollouts == file.read() == [Rollout([number], float(number % 2)) for number in range(5)]
    assert [rollout.verdict for rollout in _stored(file, tokenizer, request, None)] == [None] * 5
