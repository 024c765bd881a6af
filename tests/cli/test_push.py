"""A Hub that fails costs nothing but the push."""

import json
import logging

import huggingface_hub
import pytest
import tiny as tiny_parts

from sg_opd_trl.cli import main
from sg_opd_trl.errors import SGOPDConfigError


def without_hub(*args, **kwargs):
    raise ConnectionError("the Hub answered 500")


class Repository:
    repo_id = "me/student"


@pytest.fixture
def failing_uploads(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *args, **kwargs: Repository)
    # Under the client's threads and futures, which are the real ones.
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", without_hub)


def test_a_failed_push_leaves_the_run_whole_and_says_how_to_push(failing_uploads, tiny_recipe, tmp_path, capsys):
    flags = ["--push_to_hub", "true", "--hub_model_id", "me/student", "--output_dir", str(tmp_path / "run")]
    assert main(["train", "--config", str(tiny_recipe), *flags]) == 2
    said = capsys.readouterr().err
    assert f"hf upload me/student {tmp_path / 'run'} ." in said
    for name in ("model.safetensors", "README.md", "log_history.json", "report.html"):
        assert (tmp_path / "run" / name).is_file(), name
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "finished"


def test_a_checkpoint_that_cannot_be_pushed_is_a_warning(failing_uploads, tmp_path, caplog):
    pushing = {"push_to_hub": True, "hub_model_id": "me/student", "save_strategy": "steps", "save_steps": 1}
    trainer = tiny_parts.tiny_trainer(tmp_path, settings=pushing)
    with caplog.at_level(logging.WARNING, "sg_opd_trl"):
        trainer.train()
        trainer.push_in_progress.wait_until_done()
    assert trainer.state.global_step == 2
    assert "was not pushed" in caplog.text


def test_a_hub_that_cannot_be_reached_is_told_before_training(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", without_hub)
    with pytest.raises(SGOPDConfigError, match=r"`push_to_hub`.*hub_model_id.*answered 500"):
        tiny_parts.tiny_trainer(tmp_path, settings={"push_to_hub": True, "hub_model_id": "me/student"})
