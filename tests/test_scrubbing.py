"""No file of a run holds a token or a key; the running configuration keeps them for the Hub."""

import copy
import logging
import pickle
import zipfile
from pathlib import Path

import pytest
from tiny import tiny_config, tiny_model, tiny_trainer

from sg_opd_trl.scrubbing import scrubbed

SECRETS = {
    "hub_token": "canary-hub",
    "model_init_kwargs": {"token": "canary-student", "dtype": "float32"},
    "teacher_model_init_kwargs": {"token": "canary-teacher"},
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, and what is inside of archives."""
    found = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        found[str(path)] = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found |= {f"{path}:{name}": archive.read(name) for name in archive.namelist()}
    return found


def test_no_file_or_log_of_a_run_holds_a_token(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-environment")
    caplog.set_level(logging.DEBUG, "sg_opd_trl")
    models = [str(tmp_path / "models" / name) for name in ("student", "teacher")]
    for seed, name in enumerate(models):
        tiny_model(seed).save_pretrained(name)
    settings = SECRETS | {"save_strategy": "steps", "save_steps": 1}
    trainer = tiny_trainer(tmp_path / "run", settings=settings, model=models[0], teacher_model=models[1])
    trainer.train()
    trainer.save_model(str(tmp_path / "run"))
    trainer.create_model_card()
    files = contents(tmp_path)
    assert any("training_args.bin:" in name and "checkpoint-1" in name for name in files)
    assert any(name.endswith("run.json") for name in files)
    assert [name for name, content in files.items() if b"canary" in content] == []
    said = capfd.readouterr()
    assert "canary" not in caplog.text + said.out + said.err
    assert trainer.args.hub_token == "canary-hub", "the Hub gets it"


def test_what_shows_a_configuration_hides_its_secrets_and_copies_keep_them(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **SECRETS)
    for text in (repr(config), str(config), str(config.to_dict()), str(pickle.dumps(config))):
        assert "canary" not in text
        assert "float32" in text, "the rest is there"
    for copied in (copy.copy(config), copy.deepcopy(config)):
        assert copied.hub_token == "canary-hub"
        assert copied.model_init_kwargs["token"] == "canary-student"
    assert pickle.loads(pickle.dumps(config)).max_steps == config.max_steps


def test_a_url_loses_its_user_and_a_mapping_its_keys() -> None:
    given = {"url": "http://me:pw@host/v1", "api_key": "abc", "use_auth_token": True, "n": [1, "hf_" + "a" * 20]}
    hidden = {"url": "http://host/v1", "api_key": "(hidden)", "use_auth_token": True, "n": [1, "(hidden)"]}
    assert scrubbed(given) == hidden
