"""No file of a run holds a token or a key; the running configuration keeps them for the Hub."""

import copy
import json
import logging
import pickle
import zipfile
from pathlib import Path
from urllib.parse import quote

import pytest
from tiny import tiny_config, tiny_model, tiny_trainer

from sg_opd_trl.scrubbing import is_secret_name, remember, scrubbed, scrubbed_text, shown, without_secrets

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


SECRET_NAMES = """
    token hub_token HF_TOKEN HF_TOKEN_2 access_token use_auth_token api_key X-Api-Key apikey APIKey wandb_api_key key
    access_key AWS_ACCESS_KEY_ID secret_access_key private_key OPENAI_KEY VLLM_API_KEY Authorization
    proxy-authorization
    XAUTHORITY SSH_AUTH_SOCK session session_id sessionToken cookie Set-Cookie pwd MYSQL_PWD DB_PASS SSHPASS PGPASSWORD
    password passphrase GITHUB_PAT client_secret GOOGLE_APPLICATION_CREDENTIALS X-Amz-Signature sig hubToken
"""
OTHER_NAMES = """
    pad_token eos_token bos_token mask_token unk_token image_token max_tokens max_new_tokens token_ids eos_token_id
    additional_special_tokens special_token_mask tokenizer seconds_per_token teacher_tokens_scored sort_key primary_key
    key_mapping missing_keys metric_key_prefix num_key_value_heads keyboard monkey author GIT_AUTHOR_NAME PATH HOME
    compass pass_at_k pass@8 length_column_name XDG_SESSION_TYPE
"""


def test_names_of_secrets_and_others() -> None:
    assert [name for name in SECRET_NAMES.split() if not is_secret_name(name)] == []
    assert [name for name in OTHER_NAMES.split() if is_secret_name(name)] == []


# Keys as gateways write them into paths, and what paths are made of otherwise.
KEYS = """
    KEY-abc123def456 KEY-abc123 0123456789abcdef kJHgfdsAqwRtyUioPlKm 550e8400-e29b-41d4-a716-446655440000
    abc123-def456-ghi789 sk-proj-abc123def456 hf_abcdefghijklmno key=canary token:canary A1B2C-D3E4F-G5H6I-J7K8L
    d41d8cd98f00b204e9800998ecf8427e abc%31%32%33def456ghi789
"""
WORDS = """
    v1 chat completions Qwen2.5-7B-Instruct meta-llama Llama-3.1-405B-Instruct-FP8 gpt-4o-mini-2024-07-18 us-central1
    DeepSeek-R1-Distill-Qwen-32B Qwen3-30B-A3B-Instruct-2507-FP8 mixtral-8x7b-instruct-v0.1 SmolLM2-135M-Instruct
    my-project-123456 ChatCompletionsEndpoint DistributedDataParallelEndpoint checkpoint-1000 2024-07-18 token-server
"""


def test_a_key_in_a_path_is_hidden_and_words_and_models_are_not() -> None:
    for key in KEYS.split():
        assert scrubbed_text(f"https://host:1/v1/{key}/chat") == "https://host:1/v1/(hidden)/chat", key
        assert scrubbed_text(f"see http://host/{key}.") == "see http://host/(hidden).", key
        assert scrubbed_text(f'"POST /{key}/v1 HTTP/1.1" 200') == '"POST /(hidden)/v1 HTTP/1.1" 200', key
    for word in WORDS.split():
        assert scrubbed_text(f"https://host:1/v1/{word}/chat") == f"https://host:1/v1/{word}/chat"
    commit = f"https://hub.example/me/student/commit/{'0123456789' * 4}"
    assert scrubbed_text(commit) == commit, "public, and what the address is about"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("token='canary'", "token='(hidden)'"),
        (r"token='ca\'nary', b=2", "token='(hidden)', b=2"),
        ('{"token": "canary", "n": 1}', '{"token": "(hidden)", "n": 1}'),
        (r'got "{\"token\": \"canary\"}"', r'got "{\"token\": \"(hidden)\"}"'),
        ("{'authorization': 'Bearer canary-x', 'x': 1}", "{'authorization': '(hidden)', 'x': 1}"),
        ("Authorization: Bearer canary yy\nnext", "Authorization: (hidden)\nnext"),
        ("Cookie: a=canary; b=canary", "Cookie: (hidden)"),
        (r"Illegal header value b'Bearer canary-x\n'", r"Illegal header value b'Bearer (hidden)\n'"),
        ('hub_token: "canary\\q', 'hub_token: "(hidden)'),
        ("run --hub_token=canary --seed 1", "run --hub_token=(hidden) --seed 1"),
        ("http://me:p@canary@host:1/v1?x=1&api_key=canary", "http://host:1/v1?x=1&api_key=(hidden)"),
        ("https://h/a?X-Amz-Signature=canary#access_token=canary", "https://h/a?X-Amz-Signature=(hidden)#access_token=(hidden)"),
        ("pad_token='<pad>', max_tokens=512, key=None", None),
        ("Missing key: prompt. A session: the first.", None),
        ("hf_hub_download(name) has Bearer tokens", None),
    ],
)  # fmt: skip
def test_texts_of_errors_and_headers(text: str, hidden: str | None) -> None:
    expected = text if hidden is None else hidden
    assert scrubbed_text(text) == expected
    assert scrubbed_text(expected) == expected, "once is enough"


def test_what_stands_under_a_secrets_name_is_hidden_whole() -> None:
    given = {"credentials": {"user": "me", "n": 3}, "cookies": ["canary"], "pad_token": "<pad>", "max_tokens": 5}
    assert scrubbed(given) == {**given, "credentials": {"user": "(hidden)", "n": 3}, "cookies": ["(hidden)"]}
    assert without_secrets(given) == {"pad_token": "<pad>", "max_tokens": 5}


def test_tokens_of_a_vocabulary_stay_in_a_configuration(tmp_path: Path) -> None:
    from sg_opd_trl.baselines.config import TeacherSFTConfig

    config = TeacherSFTConfig(
        str(tmp_path), teacher_model_name_or_path="a", pad_token="<pad>", hub_token="canary", use_cpu=True, bf16=False
    )
    assert pickle.loads(pickle.dumps(config)).pad_token == "<pad>"
    assert pickle.loads(pickle.dumps(config)).hub_token is None
    assert config.to_dict()["pad_token"] == "<pad>"
    assert config.to_dict()["hub_token"] == "(hidden)"
    assert "pad_token='<pad>'" in repr(config)


def test_known_secrets_are_found_in_every_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sg_opd_trl.scrubbing._known", set())
    secret = "can\\ary \t'x\"é"
    remember({"model_init_kwargs": {"token": secret}, "url": "http://h/KEY-abc123def456/v1", "name": "harmless"})
    remember('{"token": "broken canary\\d', "model_init_kwargs")
    monkeypatch.setenv("MY_SECRET", "of the shell")
    for text in (secret, repr(secret), json.dumps(secret), quote(secret, safe=""), "of the shell", "KEY-abc123def456"):
        assert shown(f"got {text}, harmless").endswith(", harmless")
        assert text[2:-2] not in shown(f"got {text}, harmless")
    assert "canary" not in shown("no JSON: 'broken canary\\\\d'")
