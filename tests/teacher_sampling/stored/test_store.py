"""The store on disk: what is found, who writes where, and what a crash leaves. No model is loaded."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from repository import PATIENCE

from sg_opd_trl.errors import DataError
from sg_opd_trl.teacher_sampling.stored.store import RolloutStore, StoredRollout

A, B = "a" * 24, "b" * 24
ROOT = Path(__file__).resolve().parents[3]


def rollout(prompt: tuple[int, ...] = (3, 4), sample: int = 0, ids: list[int] | None = None, context: str = A):
    return StoredRollout(context, prompt, sample, ids or [5, 6, 1], "text", 1.0)


def reading(folder: Path, *contexts: str) -> RolloutStore:
    store = RolloutStore(folder)
    store.read({context: {"of": context} for context in contexts or (A,)})
    return store


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rollouts-*.jsonl"))


def test_what_was_added_is_found_now_and_by_the_next_reader(tmp_path: Path) -> None:
    store = reading(tmp_path)
    store.add([rollout(), rollout(sample=1, ids=[7])])
    for found in (store, reading(tmp_path)):
        assert found.get(A, [3, 4], 0) == [5, 6, 1]
        assert found.get(A, (3, 4), 1) == [7]
        assert len(found) == 2


@pytest.mark.parametrize(
    "other",
    [rollout(prompt=(3, 5)), rollout(prompt=(3,)), rollout(sample=1), rollout(context=B)],
    ids=["prompt", "shorter prompt", "sample", "context"],
)
def test_a_stale_key_is_a_miss(tmp_path: Path, other: StoredRollout) -> None:
    reading(tmp_path, A, B).add([rollout()])
    assert reading(tmp_path, A, B).get(*other.key) is None


def test_contexts_share_a_folder_and_only_those_asked_for_are_read(tmp_path: Path) -> None:
    reading(tmp_path, A, B).add([rollout(), rollout(context=B, ids=[9])])
    assert len(reading(tmp_path, A)) == len(reading(tmp_path, B)) == 1
    assert len(reading(tmp_path, A, B)) == 2
    assert reading(tmp_path, B).get(B, [3, 4], 0) == [9]
    assert reading(tmp_path, A).other_contexts() == {B: {"of": B}}


def test_every_writer_has_a_file_of_its_own(tmp_path: Path) -> None:
    writers = [reading(tmp_path) for _ in range(3)]
    assert files(tmp_path) == [], "a reader leaves no file"
    for number, store in enumerate(writers):
        store.add([rollout(sample=number)])
        store.add([rollout(sample=number + 3)])
    assert [len(path.read_text().splitlines()) for path in files(tmp_path)] == [2, 2, 2]
    assert len(reading(tmp_path)) == 6


def test_two_files_with_one_rollout_give_every_reader_the_same(tmp_path: Path) -> None:
    stores = [reading(tmp_path), reading(tmp_path)]
    for number, store in enumerate(stores):
        store.add([rollout(ids=[7 + number])])
    first = json.loads(files(tmp_path)[0].read_text())["completion_ids"]
    assert [reading(tmp_path).get(A, (3, 4), 0) for _ in range(3)] == [first] * 3


def test_a_store_that_is_only_read_remembers_without_writing(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path, writable=False)
    store.add([rollout()])
    assert store.get(A, (3, 4), 0) == [5, 6, 1]
    assert list(tmp_path.iterdir()) == []


DAMAGE = {
    "cut": lambda line: line[: len(line) // 2],
    "cut before its end": lambda line: line[:-3],
    "one id changed": lambda line: line.replace(b"[5, 6, 1]", b"[5, 7, 1]"),
    "prompt changed": lambda line: line.replace(b"[3, 4]", b"[3, 9]"),
    "sample changed": lambda line: line.replace(b'"sample": 1', b'"sample": 8'),
    "no ids": lambda line: line.replace(b'"completion_ids"', b'"completion"'),
    "not UTF-8": lambda line: b"\xff\xfe" + line[2:],
    "a list": lambda line: b"[1, 2]\n",
    "a number for ids": lambda line: line.replace(b"[5, 6, 1]", b"5"),
    "empty": lambda line: b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_passed_over_and_its_file_is_named(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    reading(tmp_path).add([rollout(sample=number) for number in range(3)])
    (path,) = files(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    broken = DAMAGE[damage](lines[1])
    assert broken != lines[1]
    path.write_bytes(
        b"".join([lines[0], broken, lines[2]] if broken.endswith(b"\n") else [lines[0], lines[2], broken])
    )
    with caplog.at_level(logging.WARNING):
        store = reading(tmp_path)
    assert [sample for sample in range(9) if store.get(A, (3, 4), sample)] == [0, 2]
    assert store.get(A, (3, 9), 1) is None
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(path) in message
    assert "1 of its lines cannot be read" in message


def test_whatever_byte_a_file_is_cut_at_its_whole_batches_are_read(tmp_path: Path) -> None:
    """Of three batches, two, one and three rollouts; the newline at the end of a batch is no part of it."""
    store = reading(tmp_path)
    ends, samples = [], iter(range(9))
    for size in (2, 1, 3):
        store.add([rollout(sample=next(samples)) for _ in range(size)])
        (path,) = files(tmp_path)
        ends.append((path.stat().st_size - 1, size))
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        found = reading(tmp_path)
        expected = sum(size for end, size in ends if end <= cut)
        assert [sample for sample in range(9) if found.get(A, (3, 4), sample)] == list(range(expected)), cut


def test_a_cut_batch_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reading(tmp_path).add([rollout(sample=number) for number in range(3)])
    (path,) = files(tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert len(reading(tmp_path)) == 0
    assert f"{path} ends inside a batch: its last 2 rollouts count as missing" in caplog.text


def test_a_batch_of_several_contexts_is_one(tmp_path: Path) -> None:
    reading(tmp_path, A, B).add([rollout(), rollout(context=B), rollout(sample=1)])
    (path,) = files(tmp_path)
    content = path.read_bytes()
    assert [len(reading(tmp_path, *own)) for own in ((A,), (B,), (A, B))] == [2, 1, 3]
    path.write_bytes(content[:-9])
    assert [len(reading(tmp_path, *own)) for own in ((A,), (B,), (A, B))] == [0, 0, 0]


def test_after_a_failed_write_the_next_batch_is_in_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = reading(tmp_path)

    def cut(descriptor: int) -> None:
        os.truncate(descriptor, os.fstat(descriptor).st_size - 30)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DataError):
        patch.setattr(os, "fsync", cut)
        store.add([rollout(), rollout(sample=1)])
    store.add([rollout(sample=2)])
    found = reading(tmp_path)
    assert [sample for sample in range(3) if found.get(A, (3, 4), sample)] == [2]


# A line as the first version wrote it, letter by letter. Stores are kept for years.
LINE = (
    b'{"context": "aaaaaaaaaaaaaaaaaaaaaaaa", "sample": 4294967296, "prompt_ids": [3, 4], "completion_ids": [5, 6, 1],'
    b' "completion": "5\\u00e9", "verdict": 1.0, "checksum": "2f2d44ac"}\n'
)


def test_the_format_of_a_line_stays(tmp_path: Path) -> None:
    assert StoredRollout(A, (3, 4), 1 << 32, [5, 6, 1], "5é", 1.0).line() == LINE
    (tmp_path / "rollouts-old.jsonl").write_bytes(LINE)
    assert reading(tmp_path).get(A, (3, 4), 1 << 32) == [5, 6, 1]


def test_a_whole_store_is_read_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reading(tmp_path, A, B).add([rollout(), rollout(context=B)])
    with caplog.at_level(logging.WARNING):
        assert len(reading(tmp_path)) == 1
    assert caplog.records == []


def test_a_line_of_another_writer_is_read_whatever_the_order_of_its_fields(tmp_path: Path) -> None:
    fields = json.loads(rollout().line())
    (tmp_path / "rollouts-made-elsewhere.jsonl").write_text(json.dumps(dict(reversed(fields.items()))) + "\n")
    assert reading(tmp_path).get(A, (3, 4), 0) == [5, 6, 1]
    assert len(reading(tmp_path, B)) == 0


def test_a_cut_line_of_another_context_is_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rollouts-cut.jsonl").write_bytes(rollout(context=B).line()[:-30])
    assert len(reading(tmp_path, A)) == 0
    assert "rollouts-cut.jsonl: 1 of its lines cannot be read" in caplog.text


def test_a_killed_writer_leaves_a_readable_store(tmp_path: Path) -> None:
    """SIGKILL while it appends, again and again: nothing that was reported as added is lost."""
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from sg_opd_trl.teacher_sampling.stored.store import RolloutStore, StoredRollout\n"
        "store = RolloutStore(Path(sys.argv[1]))\nnumber = 0\n"
        "while True:\n    store.add([StoredRollout('a' * 24, (3, 4), number, [5] * 4000, 'x' * 9000)])\n"
        "    print(number, flush=True)\n    number += 1\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    with writer:
        for _ in range(20):
            last = int(writer.stdout.readline())
        writer.kill()
    store = reading(tmp_path)
    assert all(store.get(A, (3, 4), number) == [5] * 4000 for number in range(last + 1))
    store.add([rollout(sample=10**6)])
    assert len(reading(tmp_path)) >= last + 2


def test_two_processes_write_at_the_same_time(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from sg_opd_trl.teacher_sampling.stored.store import RolloutStore, StoredRollout\n"
        "store, rank = RolloutStore(Path(sys.argv[1])), int(sys.argv[2])\nstore.read({'a' * 24: {}})\n"
        "for n in range(50):\n    store.add([StoredRollout('a' * 24, (rank,), n, [rank, n] * 50)])\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(rank)], cwd=ROOT) for rank in (1, 2)]
    assert [writer.wait(timeout=PATIENCE) for writer in writers] == [0, 0]
    store = reading(tmp_path)
    assert len(files(tmp_path)) == 2
    assert all(store.get(A, (rank,), n) == [rank, n] * 50 for rank in (1, 2) for n in range(50))


def test_a_folder_that_cannot_be_written_is_an_error_that_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = reading(tmp_path)
    store.add([rollout()])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DataError, match=r"`teacher_rollouts_path` must be a folder that can be written.*No space left"
    ):
        store.add([rollout(sample=1)])
    assert reading(tmp_path).get(A, (3, 4), 0) == [5, 6, 1]


def test_a_write_that_takes_only_a_part_is_an_error(tmp_path: Path) -> None:
    """A limit on the size of files: the system takes what fits, and says so only in its answer."""
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom sg_opd_trl.errors import DataError\n"
        "from sg_opd_trl.teacher_sampling.stored.store import RolloutStore, StoredRollout\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))\n"
        "store = RolloutStore(Path(sys.argv[1]))\n"
        "try:\n    store.add([StoredRollout('a' * 24, (3, 4), 0, [5] * 10_000)])\n"
        "except DataError as error:\n    sys.exit('File too large' not in str(error))\n"
        "sys.exit('a part was written, and nothing said')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr


def test_datasets_reads_a_store_with_and_without_verdicts(tmp_path: Path) -> None:
    from datasets import load_dataset

    folder = tmp_path / "store"
    folder.mkdir()
    for verdicts in ([None, None], [1.0, 0.0]):
        first = len(reading(folder))
        reading(folder).add([replace(rollout(sample=first + i), verdict=v) for i, v in enumerate(verdicts)])
    rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(rows["sample"]) == [0, 1, 2, 3]
    assert sorted(rows["verdict"], key=str) == [0.0, 1.0, None, None]
    assert rows[0]["completion_ids"] == [5, 6, 1]
    assert rows.column_names[:4] == ["context", "sample", "prompt_ids", "completion_ids"]


def test_the_store_needs_no_torch() -> None:
    code = (
        "import sys\nfrom sg_opd_trl.teacher_sampling.stored import keys, store\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=PATIENCE)


def test_a_rollout_that_is_not_there_is_no_empty_one(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.add([StoredRollout("a", (3,), 0, [], "", None)])
    assert store["a", (3,), 0] == []
    with pytest.raises(KeyError):
        store["a", (3,), 1]
