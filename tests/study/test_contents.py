"""What counts as the content of a local model or data set, and what does not."""

import os

import pytest

from sg_opd_trl.study import contents
from sg_opd_trl.study.contents import local_contents


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"):
        (folder / name).write_text(name)
    return folder


def of_model(folder):
    return local_contents({"model_name_or_path": str(folder)}, {})


def of_data(path):
    return local_contents({}, {"dataset_name": str(path)})


def test_what_is_known_by_its_name_has_no_digest(tmp_path, monkeypatch):
    (tmp_path / "builtin").mkdir()
    (tmp_path / "builtin" / "arithmetic").touch()
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = {
        **{"model_name_or_path": "user/model", "teacher_model_name_or_path": "http://localhost:8000"},
        **{"teacher_rollouts_path": "cache", "dataset_name": "builtin/arithmetic", "dataset_config": "cache"},
        **{"reference_model_name_or_path": None, "datasets": None, "output_dir": "cache"},
    }
    assert local_contents(recipe, {"dataset_name": "builtin/arithmetic"}, "builtin/arithmetic") == {}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_weights_configuration_and_tokenizer_are_a_models_content(model, name):
    before = of_model(model)
    (model / name).write_text("something else")
    assert before
    assert of_model(model) != before


def test_cards_logs_and_checkpoints_are_not(model):
    before = of_model(model)
    (model / "README.md").write_text("something else")
    (model / "trainer_state.json").write_text("{}")
    (model / "checkpoint-1").mkdir()
    (model / "checkpoint-1" / "model.safetensors").write_text("other weights")
    assert of_model(model) == before


def test_every_place_that_names_a_model_or_data_counts(model, tmp_path):
    files = [tmp_path / f"{number}.jsonl" for number in range(4)]
    for file in files:
        file.write_text(file.name)
    recipe = {
        **{"teacher_model_name_or_path": {"a": str(model), "b": "user/hub"}, "dataset_name": str(files[0])},
        **{"datasets": [{"path": "json", "data_files": [str(files[1])]}], "accelerate_config": str(files[2])},
    }
    found = local_contents(recipe, {"dataset_name": str(files[3])})
    assert set(found) == {str(model), *map(str, files)}
    assert len(set(found.values())) == 5
    assert set(local_contents({}, {}, str(model))) == {str(model)}


def test_a_data_folder_is_its_visible_files_at_any_depth(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "train.jsonl").write_text("1")
    before = of_data(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "lock").touch()
    (tmp_path / "deep" / "cache-0123.arrow").touch()
    (tmp_path / "deep" / "tmpab12").touch()
    assert of_data(tmp_path) == before
    (tmp_path / "deep" / "train.jsonl").write_text("2 ")
    changed = of_data(tmp_path)
    (tmp_path / "deep" / "train.jsonl").rename(tmp_path / "deep" / "test.jsonl")
    assert len({str(found) for found in (before, changed, of_data(tmp_path))}) == 3


def test_only_changed_files_are_read_again(model, monkeypatch):
    read = []
    folder_digest = contents.folder_digest
    monkeypatch.setattr(contents, "folder_digest", lambda folder: read.append(folder) or folder_digest(folder))
    first = of_model(model)
    assert of_model(model) == first
    assert len(read) == 1
    os.utime(model / "model.safetensors", ns=(0, 0))
    assert of_model(model) == first, "the time is not the content"
    assert len(read) == 2
