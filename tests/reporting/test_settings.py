"""What may be shown of a configuration."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from sg_opd_trl.reporting.settings import display_name, is_local, show_value, shown_settings


class Kind(Enum):
    CONSTANT = "constant"


@dataclass
class Config:
    output_dir: str = "runs"
    learning_rate: float = 1e-5
    kind: Kind | str = "constant"
    report_to: Any = "none"
    hub_token: str | None = None
    names: list[str] = field(default_factory=lambda: ["a"])
    plugin: Any = None
    special_token_mask: str | None = None


def test_only_what_differs_from_the_defaults():
    config = Config(learning_rate=2e-5, kind=Kind.CONSTANT, report_to=[], names=["a"], plugin=object())
    assert shown_settings(config) == [("learning_rate", "2e-05", "1e-05")]
    assert shown_settings(Config(names=["a", "b"])) == [("names", "['a', 'b']", "['a']")]


def test_secret_names_are_left_out_and_harmless_ones_kept():
    assert shown_settings(Config(hub_token="x", special_token_mask="y")) == [("special_token_mask", "y", "None")]
    secret = ["hub_token", "token", "api_key", "wandb_api_key", "password", "client_secret", "aws_credentials"]
    harmless = ["max_tokens_per_scoring_batch", "tokenizer_name", "add_eos_tokens", "teacher_token_share"]
    assert [setting.name for setting in shown_settings(dict.fromkeys([*secret, *harmless], "v"))] == harmless


def test_mappings_are_compared_with_the_defaults_of_a_run():
    shown = shown_settings({"num_generations": 8, "lambda_high": 1.5, "own_field": 3, "own_nothing": None})
    assert shown == [("lambda_high", "1.5", "1.8"), ("own_field", "3", "")]


def test_the_real_configuration(tmp_path):
    from sg_opd_trl import SGOPDConfig

    config = SGOPDConfig(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, learning_rate=7e-4, hub_token="x")
    for given in (config, config.to_dict()):
        shown = {name: value for name, value, _ in shown_settings(given)}
        assert shown["learning_rate"] == "0.0007"
        assert shown["output_dir"] == "run"
        assert "hub_token" not in shown
        assert "lambda_high" not in shown
        assert len(shown) < 15


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"token": "x", "a": [{"password": "y"}]}, "{'token': '(hidden)', 'a': [{'password': '(hidden)'}]}"),
        ("http://me:pw@host:8000/v1", "http://host:8000/v1"),
        ("use hf_abcdefghijklmnop now", "use (hidden) now"),
        (Path("/somewhere/deep/run"), "run"),
        (["/somewhere/deep/run"], "['run']"),
        (Kind.CONSTANT, "constant"),
        (0.1, "0.1"),
        (None, "None"),
    ],
)
def test_values(value, shown):
    assert show_value(value) == shown


def test_long_values_are_cut():
    assert len(show_value("x" * 1000)) == 200


def test_names(tmp_path):
    assert display_name("org/model") == "org/model"
    assert display_name("/a/b/") == "b"
    assert display_name(str(tmp_path)) == tmp_path.name
    assert not is_local("")
    assert is_local("~/x")
