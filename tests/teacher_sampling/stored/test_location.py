"""Folder or data set: what a path means, and what is refused. Nothing is downloaded."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.teacher_sampling.stored.store import RolloutStore, StoredRollout, is_hub_id, open_store, push_store

A = "a" * 24


@pytest.mark.parametrize(
    ("path", "hub"),
    [
        ("user/rollouts", True),
        ("user/rollouts@v1.0", True),
        ("user/rollouts@refs/pr/1", True),
        ("rollouts", False),
        ("./user/rollouts", False),
        ("/user/rollouts", False),
        ("~/rollouts", False),
        ("../user/rollouts", False),
        ("a/b/c", False),
        ("existing/folder", False),
    ],
)
def test_what_a_path_means(path: str, hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "existing" / "folder").mkdir(parents=True)
    assert is_hub_id(path) is hub


def test_a_folder_is_made_and_written_to(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "new" / "folder"))
    assert store.folder.is_dir()
    assert store.writable


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SGOPDConfigError, match=r"`teacher_rollouts_path` must be a folder.*got '.*file'.*Choose"):
        open_store(str(tmp_path / "file"))


class Hub:
    """Folders by repository id in place of the Hub."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple] = []

    def snapshot_download(self, repo_id: str, **settings: Any) -> str:
        self.calls.append((repo_id, settings))
        folder = self.root / repo_id
        if not folder.is_dir():
            raise LocalEntryNotFoundError("offline")
        return str(folder)

    def create_repo(self, repo_id: str, **settings: Any) -> Any:
        self.calls.append((repo_id, settings))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def auth_check(self, repo_id: str, **settings: Any) -> None:
        self.calls.append((repo_id, settings))

    def upload_folder(self, folder_path: Path, repo_id: str, allow_patterns: list[str], **settings: Any) -> Any:
        self.calls.append((repo_id, settings))
        for path in {path for pattern in allow_patterns for path in folder_path.glob(pattern)}:
            target = self.root / repo_id / path.relative_to(folder_path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        return SimpleNamespace(commit_url="https://example.org/commit")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: fake)
    return fake


def test_a_store_goes_to_the_hub_and_is_read_from_there(tmp_path: Path, hub: Hub) -> None:
    local = tmp_path / "local"
    local.mkdir()
    RolloutStore(local).add([StoredRollout(A, (3,), 0, [5, 1])])
    (local / "notes.txt").write_text("mine")
    assert push_store(local, "user/rollouts", private=True, token=None) == "https://example.org/commit"
    assert hub.calls[0] == ("user/rollouts", {"repo_type": "dataset", "private": True, "exist_ok": True})
    names = sorted(str(path.relative_to(hub.root)) for path in hub.root.rglob("*") if path.is_file())
    assert [name.split("/")[2] for name in names][:2] == ["README.md", "contexts"]
    assert len(names) == 3

    store = open_store("user/rollouts@v1")
    assert hub.calls[-1][1]["revision"] == "v1"
    assert hub.calls[-1][1]["repo_type"] == "dataset"
    store.read({A: {}})
    assert store.get(A, (3,), 0) == [5, 1]
    assert not store.writable
    assert store.name == "user/rollouts@v1"


def test_a_data_set_that_is_not_there_is_refused(hub: Hub) -> None:
    with pytest.raises(SGOPDConfigError, match=r"got 'user/none'.*have a folder made, write \./user/none"):
        open_store("user/none")


def test_a_data_set_that_the_hub_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=404)

    def unknown(*_: Any, **__: Any) -> None:
        raise RepositoryNotFoundError("secret", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unknown)
    with pytest.raises(SGOPDConfigError, match="RepositoryNotFoundError") as error:
        open_store("user/none")
    assert "secret" not in str(error.value)


def test_a_data_set_without_rollouts_is_refused(hub: Hub) -> None:
    hub.create_repo("user/other")
    with pytest.raises(SGOPDConfigError, match=r"must hold files rollouts-\*\.jsonl, got the data set 'user/other'"):
        open_store("user/other")
