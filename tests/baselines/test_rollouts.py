"""Stored teacher rollouts without a model: what the judge is given, batch by batch, and what the file then holds."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

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


ROLLOUTS = [Rollout([number, 1], 1.0) for number in range(6)]


def file_of(folder: Path, key: str = "key") -> RolloutFile:
    """Of six rollouts in batches of two."""
    return RolloutFile(folder / ROLLOUTS_FILE, key, batch_size=2, total=6)


def taken(folder: Path, key: str = "key") -> list[Rollout]:
    """What a start of these settings finds, and what it then leaves there."""
    file = file_of(folder, key)
    file.take()
    rollouts = file.read()
    file.replace(rollouts)
    return rollouts


def contents(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in folder.iterdir()}


def test_whatever_byte_it_is_cut_at_whole_batches_are_read(tmp_path: Path) -> None:
    file_of(tmp_path).replace(ROLLOUTS)
    path = tmp_path / ROLLOUTS_FILE
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    # The newline at its end is no part of a line.
    ends = [sum(map(len, lines[: number + 2])) - 1 for number in range(6)]
    head = len(lines[0]) - 1
    for cut in range(head, len(content) + 1):
        path.write_bytes(content[:cut])
        expected = sum(end <= cut for end in ends) // 2 * 2
        assert taken(tmp_path) == ROLLOUTS[:expected], cut
        file = file_of(tmp_path)
        file.append(ROLLOUTS[expected:])
        assert path.read_bytes() == content, "written on, it is the whole file"
    assert len(list(tmp_path.iterdir())) == 1, "a kill is nothing to be looked at"


BROKEN = {
    "no JSON": b"{broken\n",
    "cut": b'{"ke\n',
    "no key": b'{"kez": "key"}\n',
    "a list": b"[1]\n",
    "not UTF-8": b'{"key": "\xff"}\n',
    "a flipped bit": b'{"key": "kex"}\n',
}


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("name", ["teacher_rollouts.jsonl", "teacher_rollouts-key.jsonl"])
def test_a_file_whose_first_line_is_broken_is_kept(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file_of(tmp_path).replace(ROLLOUTS)
    path = tmp_path / ROLLOUTS_FILE
    content = BROKEN[damage] + b"".join(path.read_bytes().splitlines(keepends=True)[1:])
    path.unlink()
    (tmp_path / name).write_bytes(content)
    with caplog.at_level(logging.INFO):
        assert taken(tmp_path) == []
    file_of(tmp_path).append(ROLLOUTS[:2])
    assert taken(tmp_path) == ROLLOUTS[:2]
    assert content in contents(tmp_path)
    kept = "teacher_rollouts-kex.jsonl" if (damage, name) == ("a flipped bit", ROLLOUTS_FILE) else "-aside-1.jsonl"
    assert f"kept {'in' if 'kex' in kept else 'as'} " in caplog.text
    assert kept in caplog.text


def test_what_is_behind_a_broken_line_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file_of(tmp_path).replace(ROLLOUTS)
    path = tmp_path / ROLLOUTS_FILE
    content = path.read_bytes().replace(b"[3, 1]", b"[3; 1]")
    path.write_bytes(content)
    assert taken(tmp_path) == ROLLOUTS[:2]
    assert (tmp_path / "teacher_rollouts-aside-1.jsonl").read_bytes() == content
    assert "has a line 5 that is no rollout: it is kept as teacher_rollouts-aside-1.jsonl" in caplog.text


def test_no_file_of_other_settings_takes_the_place_of_another(tmp_path: Path) -> None:
    file_of(tmp_path, "other").replace(ROLLOUTS)
    (tmp_path / "teacher_rollouts-other.jsonl").write_bytes((tmp_path / ROLLOUTS_FILE).read_bytes() + b"more\n")
    before = contents(tmp_path)
    assert taken(tmp_path) == []
    assert before < contents(tmp_path)
    assert taken(tmp_path, "other") == ROLLOUTS
