"""Teacher rollouts in a folder that `datasets.load_dataset` reads: JSON Lines, one file per process that wrote.

`teacher_rollouts_path` names it: a local folder, which is created and filled, or a data set on the Hub, which is read.
A process appends to a file of its own, a batch at a time, and reads everybody's when it starts. Rollouts of a batch
depend on one another, as they were drawn from one seed: what a killed process has left of its last batch is passed
over by the next reader, so that the batch is written again as it would have been. A line that begins with a space has
another one of its batch behind it.
"""

import json
import logging
import os
import re
import uuid
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError, SGOPDConfigError
from .keys import DIGEST_LENGTH

logger = logging.getLogger(__name__)


CARD_FILE = "README.md"
ROLLOUT_FILES = "rollouts-*.jsonl"
CONTEXT_FOLDER = "contexts"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_UPLOADED = [ROLLOUT_FILES, f"{CONTEXT_FOLDER}/*.json", CARD_FILE]

Key = tuple[str, tuple[int, ...], int]
"""What a rollout is found by: context, prompt ids, sample index."""
_GOES_ON = b" "
_START = re.compile(rb' ?\{"context": "([0-9a-f]{%d})", ' % DIGEST_LENGTH)


@dataclass(frozen=True)
class StoredRollout:
    """One line of a store.

    Attributes:
        context: digest of teacher, tokenizer and sampling settings.
        prompt_ids: what the teacher read.
        sample: tells the rollouts of one prompt apart.
        completion_ids: what it wrote, the end token included.
        completion: the same as text, for readers of the data set.
        verdict: of the verifier at the time: 1 right, 0 wrong, None not judged then. Runs judge anew.
    """

    context: str
    prompt_ids: tuple[int, ...]
    sample: int
    completion_ids: list[int]
    completion: str = ""
    verdict: float | None = None

    @property
    def key(self) -> Key:
        """What a rollout is found by."""
        return self.context, self.prompt_ids, self.sample

    def line(self) -> bytes:
        """As JSON, the context first, so that readers can pass over other contexts unread."""
        fields = {
            "context": self.context,
            "sample": self.sample,
            "prompt_ids": list(self.prompt_ids),
            "completion_ids": self.completion_ids,
            "completion": self.completion,
            "verdict": self.verdict,
            "checksum": _checksum(self.context, self.sample, self.prompt_ids, self.completion_ids),
        }
        return (json.dumps(fields) + "\n").encode()

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "StoredRollout":
        """Check and convert one line.

        Raises:
            ValueError: ids that are not those that were written.
            KeyError: a field is missing.
            TypeError: no mapping, or a field of another type.
        """
        context, sample, prompt = fields["context"], fields["sample"], tuple(fields["prompt_ids"])
        completion_ids = list(fields["completion_ids"])
        if fields["checksum"] != _checksum(context, sample, prompt, completion_ids):
            raise ValueError("checksum")
        return cls(context, prompt, sample, completion_ids, fields["completion"], fields["verdict"])


class RolloutStore:
    """The rollouts of a folder that belong to given contexts.

    Args:
        folder: exists; its rollouts are read by `read`.
        writable: whether `add` writes into it; otherwise it only remembers.
        name: what messages call the store; default: the folder.
    """

    def __init__(self, folder: Path, *, writable: bool = True, name: str | None = None) -> None:
        self.folder = folder
        self.writable = writable
        self.name = str(folder) if name is None else name
        self._rollouts: dict[Key, list[int]] = {}
        self._facts: dict[str, dict] = {}
        self._own_file = self._new_file()

    def __len__(self) -> int:
        return len(self._rollouts)

    def __getitem__(self, key: Key) -> list[int]:
        """Completion ids of a rollout that the store has."""
        return self._rollouts[key]

    def read(self, contexts: Mapping[str, dict]) -> None:
        """Read the rollouts of some contexts; where two files have the same one, the first file's counts.

        Args:
            contexts: digest -> facts.
        """
        self._facts.update(contexts)
        for path in sorted(self.folder.glob(ROLLOUT_FILES)):
            for rollout in _rollouts_of(path, contexts):
                self._rollouts.setdefault(rollout.key, rollout.completion_ids)

    def get(self, context: str, prompt_ids: Sequence[int], sample: int) -> list[int] | None:
        """Completion ids of a rollout; None where the store has none."""
        return self._rollouts.get((context, tuple(prompt_ids), sample))

    def add(self, rollouts: Sequence[StoredRollout]) -> None:
        """Keep a batch of rollouts, on disk before this returns where the store is writable.

        Raises:
            DataError: the folder cannot be written.
        """
        for rollout in rollouts:
            self._rollouts.setdefault(rollout.key, rollout.completion_ids)
        if not self.writable or not rollouts:
            return
        try:
            self._describe({rollout.context for rollout in rollouts})
            *before, last = (rollout.line() for rollout in rollouts)
            with self._own_file.open("ab") as file:
                # Buffered: a plain file may take a part of what it is given, and says so only in its answer.
                file.write(b"".join([*(_GOES_ON + line for line in before), last]))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            # A part of the batch may be there, behind which nothing can be read.
            self._own_file = self._new_file()
            raise DataError(
                f"`teacher_rollouts_path` must be a folder that can be written, got {self.name!r}: {error.strerror}. "
                "The teacher's rollouts are kept there. Make room or choose another folder; what it holds stays "
                "readable."
            ) from error

    def _new_file(self) -> Path:
        return self.folder / ROLLOUT_FILES.replace("*", uuid.uuid4().hex[:16])

    def other_contexts(self) -> dict[str, dict]:
        """Facts by digest of the contexts that were not asked for."""
        found = {}
        for path in sorted((self.folder / CONTEXT_FOLDER).glob("*.json")):
            if path.stem in self._facts:
                continue
            try:
                found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                logger.warning("%s is not readable; it only describes rollouts and is passed over.", path)
        return found

    def _describe(self, contexts: Collection[str]) -> None:
        """Write card and facts where they are missing; several processes may do so at once."""
        texts = {self.folder / CARD_FILE: _CARD}
        for context in contexts:
            path = self.folder / CONTEXT_FOLDER / f"{context}.json"
            texts[path] = json.dumps(self._facts.get(context, {}), indent=1, sort_keys=True) + "\n"
        for path, text in texts.items():
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)


# --- where it is -----------------------------------------------------------------------------------------------------
def open_store(path: str) -> RolloutStore:
    """The store of a `teacher_rollouts_path`.

    Raises:
        SGOPDConfigError: a file, a folder that cannot be made, or no such data set.
    """
    if is_hub_id(path):
        return RolloutStore(_download(path), writable=False, name=path)
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SGOPDConfigError(
            f"`teacher_rollouts_path` must be a folder or a data set on the Hub, got {path!r}: {error.strerror}. "
            "Teacher rollouts are read there and written there. Choose another folder."
        ) from error
    return RolloutStore(folder, name=path)


def is_hub_id(path: str) -> bool:
    """Whether a path means a data set on the Hub: `user/name` or `user/name@revision`, and no such folder exists."""
    return _HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def push_store(folder: Path, repo_id: str, *, private: bool | None, token: str | None) -> str:
    """Upload a store as a data set; files of other processes' rollouts that are there stay.

    Returns:
        Address of the commit.

    Raises:
        SGOPDConfigError: the Hub cannot be reached or refuses the data set.
        PushError: the Hub did not take it; has the command that pushes again.
    """
    # Not above: a store is read without the client of the Hub.
    import huggingface_hub

    from ...hub import make_repository, push_command, push_error

    make_repository(repo_id, private=private, token=token, repo_type="dataset")
    try:
        commit = huggingface_hub.HfApi(token=token).upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            repo_type="dataset",
            allow_patterns=_UPLOADED,
            commit_message="Teacher rollouts",
        )
    except Exception as error:
        command = push_command(repo_id, str(folder), repo_type="dataset", include=_UPLOADED)
        raise push_error(f"the rollouts are in {folder}", command, error) from error
    return str(commit.commit_url)


def _download(path: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo_id, _, revision = path.partition("@")
    try:
        folder = Path(
            snapshot_download(repo_id, repo_type="dataset", revision=revision or None, allow_patterns=_UPLOADED)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise SGOPDConfigError(
            f"`teacher_rollouts_path` must be a folder or a data set on the Hub, got {path!r}, which is neither a "
            f"folder here nor a data set that can be read ({type(error).__name__}). Nothing can be read there. To "
            f"have a folder made, write ./{path}; otherwise check the name and the connection."
        ) from error
    if not any(folder.glob(ROLLOUT_FILES)):
        raise SGOPDConfigError(
            f"`teacher_rollouts_path` must hold files {ROLLOUT_FILES}, got the data set {path!r} without any. It is "
            "not a store of teacher rollouts. Push one with `sg-opd teacher-rollouts --push_to_hub`."
        )
    return folder


# --- lines -----------------------------------------------------------------------------------------------------------
def _rollouts_of(path: Path, contexts: Collection[str]) -> Iterator[StoredRollout]:
    bad: list[int] = []
    batch: list[StoredRollout] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                rollout = _rollout_of(line, contexts)
            except (ValueError, KeyError, TypeError):
                rollout = None
                bad.append(number)
            if rollout is not None:
                batch.append(rollout)
            # What is no line up to its end is cut, and may have begun as any.
            cut = bad[-1:] == [number] and not line.endswith(b"\n")
            if not line.startswith(_GOES_ON) and not cut:
                yield from batch
                batch = []
    if bad:
        logger.warning(
            "%s: %d of its lines cannot be read, the first is line %d. They count as missing, and their rollouts are "
            "written again. A process that was killed leaves such a line.",
            path,
            len(bad),
            bad[0],
        )
    if batch:
        logger.warning(
            "%s ends inside a batch: its last %d rollouts count as missing, and the batch is written again, so that "
            "it is what it would have been.",
            path,
            len(batch),
        )


def _rollout_of(line: bytes, contexts: Collection[str]) -> StoredRollout | None:
    """A line's rollout; None if it is of none of these contexts, whose ids are not even looked at."""
    start = _START.match(line)
    if start and start.group(1).decode() not in contexts and line.endswith(b"}\n"):
        return None
    rollout = StoredRollout.from_fields(json.loads(line))
    return rollout if rollout.context in contexts else None


def _checksum(context: str, sample: int, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> str:
    return f"{zlib.crc32(json.dumps([context, sample, list(prompt_ids), list(completion_ids)]).encode()):08x}"


_CARD = """\
---
configs:
- config_name: default
  data_files: rollouts-*.jsonl
dataset_info:
  features:
  - name: context
    dtype: string
  - name: sample
    dtype: int64
  - name: prompt_ids
    list: int64
  - name: completion_ids
    list: int64
  - name: completion
    dtype: string
  - name: verdict
    dtype: float64
  - name: checksum
    dtype: string
tags:
- sg-opd
- teacher-rollouts
---

# Teacher rollouts

Completions that a frozen teacher wrote for the anchor of SG-OPD runs (`sg_opd_trl`). Set `teacher_rollouts_path` to
this folder or data set, and runs that ask for the same rollouts read them here.

| column | meaning |
|---|---|
| `context` | digest of teacher, tokenizer and sampling settings; `contexts/DIGEST.json` lists them |
| `sample` | tells the rollouts of one prompt apart |
| `prompt_ids` | token ids that the teacher read |
| `completion_ids` | token ids that it wrote, the end token included |
| `completion` | the same as text, special tokens left out |
| `verdict` | of the verifier when the rollout was written: 1 right, 0 wrong, null not judged then; runs judge anew |
| `checksum` | of the four columns that matter; a line that does not fit it is passed over |

A line that begins with a space has another one of its batch behind it. A file that ends inside a batch was cut, and
what is there of the batch is passed over.
"""
