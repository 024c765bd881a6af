"""No file of a run holds a token or a key; the running configuration keeps them for the Hub."""

import copy
import json
import logging
import math
import pickle
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from teachers.fake_server import FakeServer
from teachers.model_server import by_url
from tiny import save_pair, tiny_config, tiny_data, tiny_model, tiny_trainer
from transformers import TrainerCallback

from sg_opd_trl.cli import main
from sg_opd_trl.reporting import write_report
from sg_opd_trl.scrubbing import is_secret_name, remember, scrubbed, scrubbed_text, shown, without_secrets

SECRETS = {
    "hub_token": "canary-hub",
    "model_init_kwargs": {"token": "canary-student", "dtype": "float32"},
    "teacher_model_init_kwargs": {"token": "canary-teacher"},
}
ENVIRONMENT = {
    "HF_TOKEN": "canary-environment",
    "SG_OPD_TEACHER_API_KEY": "canary-served",
    "WANDB_API_KEY": "canary-w",
}
# As gateways have it, in front of what is asked for.
KEY_IN_THE_PATH = "/KEY-canary0123abcd4567"


class GatewayServer(FakeServer):
    """A served teacher that is only found behind a key."""

    def serve(self, handler: Any, path: str) -> None:
        assert path.startswith(KEY_IN_THE_PATH)
        super().serve(handler, path.removeprefix(KEY_IN_THE_PATH))


class Tracker(TrainerCallback):
    """Writes what trackers are given: the settings in all forms that transformers has for them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        forms = (
            args.to_dict(),
            args.to_json_string(),
            args.to_sanitized_dict(),
            vars(pickle.loads(pickle.dumps(args))),
        )
        (Path(args.output_dir) / "tracked.txt").write_text("\n".join(map(str, forms)), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, and what is inside of archives."""
    found = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        found[str(path)] = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found |= {f"{path}:{name}": archive.read(name) for name in archive.namelist()}
    return found


def assert_no_canary(folder: Path, expected: list[str]) -> None:
    """No file of a folder has one, and there are files that end like these."""
    files = contents(folder)
    missing = [ending for ending in expected if not any(name.endswith(ending) for name in files)]
    assert missing == []
    assert [name for name, content in files.items() if b"canary" in content] == []


@pytest.fixture
def said(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], str]:
    """All that was printed and logged since, in a process whose environment has secrets."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sg_opd_trl.scrubbing._known", set())
    caplog.set_level(logging.DEBUG, "sg_opd_trl")
    return lambda: caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("served", [False, True])
def test_no_file_or_log_of_a_run_holds_a_token(served: bool, tmp_path: Path, said: Callable[[], str]) -> None:
    models = [str(tmp_path / "models" / name) for name in ("student", "teacher")]
    for seed, name in enumerate(models):
        tiny_model(seed).save_pretrained(name)
    settings = SECRETS | {"save_strategy": "steps", "save_steps": 1, "push_to_hub": False}
    with GatewayServer() as server:
        if served:
            del settings["teacher_model_init_kwargs"]
            url = server.url + KEY_IN_THE_PATH
            trainer = by_url(tmp_path / "run", url, settings=settings, model=models[0], callbacks=[Tracker()])
        else:
            trainer = tiny_trainer(
                tmp_path / "run", settings=settings, model=models[0], teacher_model=models[1], callbacks=[Tracker()]
            )
        # A step that is skipped is written aside.
        trainer.model.lm_head.weight.register_hook(
            lambda gradient: gradient * (math.nan if trainer.state.global_step == 0 else 1.0)
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "run"))
        trainer.create_model_card()
        history = trainer.state.log_history
        write_report(tmp_path / "run", title="run", config=trainer.args, log_history=history, evaluations={})
    names = ("run.json", "tracked.txt", "README.md", "report.html", "step-1-rank-0.safetensors")
    checkpoint = [f"checkpoint-1/{name}" for name in ("training_args.bin", "sg_opd_state.json", "trainer_state.json")]
    assert_no_canary(tmp_path, [*names, *checkpoint, "run/training_args.bin"])
    assert "canary" not in said()
    assert trainer.args.hub_token == "canary-hub", "the Hub gets it"
    assert not served or trainer.args.teacher_model_server_url.endswith(KEY_IN_THE_PATH), "the server gets it"


def test_no_file_or_output_of_the_commands_holds_a_token(tmp_path: Path, said: Callable[[], str]) -> None:
    """Training by several methods, the teacher's rollouts, an evaluation and a check, by their flags."""
    student, teacher = save_pair(tmp_path / "student", 0), save_pair(tmp_path / "teacher", 1)
    tiny_data().to_json(tmp_path / "data" / "train.jsonl")
    settings = {
        "model_name_or_path": student, "dataset_name": str(tmp_path / "data"), "teacher_model_name_or_path": teacher,
        "reward_funcs": "exact_match_reward", "max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2,
        "max_completion_length": 4, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "disable_tqdm": True, "max_prompt_tokens": 32,
    }  # fmt: skip

    def started(command: str, output: str, secrets: dict[str, Any], **more: Any) -> None:
        flags = settings | {"output_dir": str(tmp_path / output)} | secrets | more
        texts = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in flags.items()}
        assert main(["--debug", command, *(word for name, text in texts.items() for word in (f"--{name}", text))]) == 0

    anchor = {"teacher_sampling_phase1_end_frac": 1.0, "teacher_sampling_phase2_end_frac": 1.0}
    started("train", "sg_opd", SECRETS, teacher_rollouts_path=str(tmp_path / "rollouts"), **anchor)
    sft = {
        "method": "sft",
        "teacher_sampling_filter_correct": False,
        "use_peft": True,
        "lora_target_modules": "all-linear",
    }
    started("train", "sft", SECRETS, **sft)
    recipe = tmp_path / "recipes" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text(yaml.safe_dump(settings | anchor), encoding="utf-8")
    flags = [word for name in ("hub_token",) for word in (f"--{name}", SECRETS[name])]
    recipe_flags = ["--config", str(recipe), *flags, "--model_init_kwargs", json.dumps(SECRETS["model_init_kwargs"])]
    assert main(["teacher-rollouts", "--output", str(tmp_path / "stored"), *recipe_flags]) == 0
    assert main(["check", "--json", str(tmp_path / "check.json"), *recipe_flags]) in (0, 1, 2)
    evaluated = ["--model", student, "--dataset_name", str(tmp_path / "data"), "--dataset_split", "train"]
    files = ["--output", str(tmp_path / "result.json"), "--samples_path", str(tmp_path / "samples.jsonl")]
    short = ["--max_new_tokens", "4", "--num_samples", "2", "--reward_func", "exact_match_reward"]
    assert main(["evaluate", *evaluated, *files, *short]) == 0
    names = ("run.json", "README.md", "report.html", "log_history.json", "training_args.bin", "checkpoint-1/run.json")
    expected = [f"{method}/{name}" for method in ("sg_opd", "sft") for name in names]
    assert_no_canary(tmp_path, [*expected, "check.json", "result.json", "samples.jsonl", "teacher_rollouts.jsonl"])
    assert any(name.endswith(".jsonl") for name in contents(tmp_path / "stored"))
    assert "canary" not in said()
    cards = list((tmp_path / "sft").rglob("README.md"))
    assert {card.parent.name for card in cards} == {"sft", "checkpoint-1", "checkpoint-2"}
    for card in cards:
        assert str(tmp_path) not in card.read_text(encoding="utf-8"), "no folder of this machine"


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
        ("API_KEY=\"$OTHER\" sg-opd --hub_token $HF_TOKEN, token: <HUB_TOKEN>", None),
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


def test_mappings_of_any_kind_and_sets_are_looked_into() -> None:
    ordered = OrderedDict(token="canary", kept=1)
    assert scrubbed({"model_init_kwargs": ordered}) == {"model_init_kwargs": {"token": "(hidden)", "kept": 1}}
    assert scrubbed({"urls": {"http://me:canary@host"}}) == {"urls": {"http://host"}}
    assert ordered["token"] == "canary"


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


# Each could begin something that is looked for, and goes on for ever.
PIECES = ["a", "a-", "a.", "a=", "a/", "'a", "\\'", "http://a", "token=", "--a", "--", "0a", "eyJ-", "sk-", "hf_", " "]


def test_a_long_text_takes_a_time_that_grows_with_its_length() -> None:
    """As a model may write it; a time that grew with the square of the length would be minutes for each."""
    started = time.perf_counter()
    for piece in PIECES:
        scrubbed_text(piece * (200_000 // len(piece)))
    assert time.perf_counter() - started < 60
