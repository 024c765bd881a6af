"""`teacher_rollouts_path`: a local folder, which is created and filled, or a data set on the Hub, which is read."""

import re
from pathlib import Path

from ...errors import SGOPDConfigError
from .store import CONTEXT_FOLDER, ROLLOUT_FILES, RolloutStore

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_FILES = [ROLLOUT_FILES, f"{CONTEXT_FOLDER}/*.json", "README.md"]


def is_hub_id(path: str) -> bool:
    """Whether a path means a data set on the Hub: `user/name` or `user/name@revision`, and no such folder exists."""
    return _HUB_ID.fullmatch(path) is not None and not Path(path).exists()


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


def push_store(folder: Path, repo_id: str, *, private: bool | None, token: str | None) -> str:
    """Upload a store as a data set; files of other processes' rollouts that are there stay.

    Returns:
        Address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    commit = api.upload_folder(
        folder_path=folder,
        repo_id=repo_id,
        repo_type="dataset",
        allow_patterns=_FILES,
        commit_message="Teacher rollouts",
    )
    return str(commit.commit_url)


def _download(path: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo_id, _, revision = path.partition("@")
    try:
        folder = Path(
            snapshot_download(repo_id, repo_type="dataset", revision=revision or None, allow_patterns=_FILES)
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
