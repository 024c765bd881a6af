"""What makes a run the run it is: every setting sorted, and told by name where a run goes on."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_config, tiny_data, tiny_model

from sg_opd_trl import SGOPDConfigError
from sg_opd_trl.cli.methods import METHODS
from sg_opd_trl.run_identity import (
    CARRIED_OUT,
    MATHEMATICS,
    SURROUNDINGS,
    changes,
    compare,
    data_fingerprint,
    peft_identity,
    settings_identity,
    stored_identity,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*trl.experimental.*")
KINDS = {"mathematics": MATHEMATICS, "carried out": CARRIED_OUT, "surroundings": SURROUNDINGS}


# --- every setting is sorted -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_every_method_is_of_one_kind(method: str) -> None:
    """A new field of TRL or of ours fails here until somebody has decided what it does to a resumed run."""
    names = [each.name for each in fields(METHODS[method].config_class) if each.init]
    found = {name: [kind for kind, group in KINDS.items() if name in group] for name in names}
    assert {name: kinds for name, kinds in found.items() if len(kinds) != 1} == {}


def test_no_name_is_sorted_that_no_method_has() -> None:
    beside = {"method", "reward_funcs", "peft_config", "world_size", "train_dataset"}
    beside |= {"load_in_8bit", "load_in_4bit", "model_name_or_path", "model_revision"}  # of TRL's ModelConfig
    beside |= {"version", "trl", "transformers"}
    known = {each.name for method in METHODS.values() for each in fields(method.config_class)} | beside
    assert (MATHEMATICS | CARRIED_OUT | SURROUNDINGS) - known == set()


def test_a_name_that_nobody_has_sorted_is_mathematics() -> None:
    with pytest.raises(SGOPDConfigError, match="`new_field` 2 in place of 1"):
        compare({"new_field": 1}, {"new_field": 2}, "it", ())


# --- what is compared ------------------------------------------------------------------------------------------------
# Names and values that change a run, each by itself.
CHANGED = {
    "learning_rate": 0.5,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
    "seed": 7,
    "lr_scheduler_type": "linear",
    "max_steps": 9,
    "num_train_epochs": 5,
    "lambda_high": 3.0,
    "lambda_base": 1.5,
    "beta": 0.1,
    "teacher_sampling_phase1_end_frac": 0.1,
    "bf16": True,
    "model_init_kwargs": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", CHANGED)
def test_other_mathematics_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    before = settings_identity(tiny_config(tmp_path))
    now = settings_identity(tiny_config(tmp_path, **{name: CHANGED[name]}))
    with pytest.raises(SGOPDConfigError) as caught:
        compare(before, now, "checkpoint-2", ())
    for part in (
        f"`{name}` {now[name]!r} in place of {before[name]!r}",
        "checkpoint-2",
        "allow_changed",
        "output_dir",
    ):
        assert part in str(caught.value)
    everything = changes(before, now)
    assert not compare(before, now, "checkpoint-2", everything)


def test_what_surrounds_a_run_is_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = settings_identity(tiny_config(tmp_path))
    other = {"save_steps": 3, "logging_steps": 5, "run_name": "other", "report_to": ["tensorboard"], "eval_delay": 2}
    assert compare(before, settings_identity(tiny_config(tmp_path / "b", **other)), "it", ())
    assert caplog.text == ""


def test_how_it_is_carried_out_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = settings_identity(tiny_config(tmp_path))
    now = settings_identity(tiny_config(tmp_path, gradient_checkpointing=True))
    assert compare(before, now, "it", ())
    assert "`gradient_checkpointing` True in place of False" in caplog.text


def test_processes_and_data_are_compared_too() -> None:
    for name, before, now in (("world_size", 1, 2), ("train_dataset", "a", "b"), ("reward_funcs", ["a"], ["b"])):
        assert changes({name: before}, {name: now}) == {name: (before, now)}
    # A stream cannot be looked into: nothing is known, nothing is said.
    assert changes({"train_dataset": "a"}, {"train_dataset": None}) == {}


def test_names_of_models_give_way_to_their_weights() -> None:
    name = "teacher_model_name_or_path"
    assert changes({name: "a"}, {name: "b"}) == {name: ("a", "b")}
    known = {"teacher": {"name": "a"}}
    assert changes({name: "a", **known}, {name: "b", **known}) == {}


def test_an_identity_has_no_secrets_and_is_what_a_file_gives_back(tmp_path: Path) -> None:
    secrets = {"hub_token": "hf_canary1", "model_init_kwargs": {"token": "hf_canary2", "dtype": "float32"}}
    identity = settings_identity(tiny_config(tmp_path, **secrets), teacher={"api_key": "canary3", "name": "t"})
    text = json.dumps(identity)
    assert "canary" not in text
    assert json.loads(text) == identity
    assert identity["model_init_kwargs"] == {"dtype": "float32"}


def test_another_key_of_the_same_server_is_the_same_run_and_another_server_is_not(tmp_path: Path) -> None:
    """A setting of mathematics may hold an address: its key may be renewed, its host is compared."""

    def identity(address: str, pad_token: str) -> dict[str, Any]:
        loading = {"proxies": address, "token": address}
        return settings_identity(tiny_config(tmp_path, model_init_kwargs=loading), pad_token=pad_token)

    before = identity("http://one/KEY-abc123def456/v1", "<pad>")
    assert "abc123" not in json.dumps(before)
    assert changes(before, identity("http://one/KEY-xyz789uvw012/v1", "<pad>")) == {}
    assert list(changes(before, identity("http://two/KEY-abc123def456/v1", "<pad>"))) == ["model_init_kwargs"]
    assert list(changes(before, identity("http://one/KEY-abc123def456/v1", "<eos>"))) == ["pad_token"]


# --- fingerprints ----------------------------------------------------------------------------------------------------
def test_a_fingerprint_is_of_the_rows() -> None:
    data = tiny_data(8)
    assert data_fingerprint(data) == data_fingerprint(Dataset.from_list(data.to_list()))
    assert data_fingerprint(data.select(range(7))) != data_fingerprint(data)
    assert data_fingerprint(data.select([1, 0, *range(2, 8)])) != data_fingerprint(data), "their order counts"
    changed = data.to_list()
    changed[5]["solution"] = "other"
    assert data_fingerprint(Dataset.from_list(changed)) != data_fingerprint(data)


def test_large_data_are_read_at_even_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sg_opd_trl.run_identity._FINGERPRINT_ROWS", 3)
    rows: list[dict[str, Any]] = [{"prompt": str(i)} for i in range(8)]  # 0, 3 and 6 are read
    before = data_fingerprint(Dataset.from_list(rows))
    assert data_fingerprint(Dataset.from_list([*rows[:6], {"prompt": "x"}, rows[7]])) != before
    assert data_fingerprint(Dataset.from_list(rows[:7])) != before


def test_streams_have_none() -> None:
    assert data_fingerprint(IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))) is None
    assert data_fingerprint(None) is None


def test_adapters_are_part_of_it() -> None:
    assert peft_identity(tiny_model(0)) is None
    found = [
        peft_identity(get_peft_model(tiny_model(0), LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"])))
        for alpha in (2, 4)
    ]
    assert found[0] is not None and found[0]["default"]["lora_alpha"] == 2
    assert found[0] != found[1]


# --- where it is kept ------------------------------------------------------------------------------------------------
def test_the_stored_identity(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert stored_identity(tmp_path) is None
    (tmp_path / "run.json").write_text('{"seconds": 1, "identity": {"seed": 1}}')
    assert stored_identity(tmp_path) == {"seed": 1}
    (tmp_path / "sg_opd_state.json").write_text('{"identity": {}}')  # of a trainer that never started
    assert stored_identity(tmp_path) == {"seed": 1}
    (tmp_path / "run.json").write_text("{")
    assert stored_identity(tmp_path) is None
    assert "run.json is not readable" in caplog.text


# --- what may be allowed ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "said"),
    [("learning_rat", "Did you mean `learning_rate`"), ("save_steps", "may differ anyway"), ("bf16x", "called so")],
)
def test_a_name_that_is_not_compared_cannot_be_allowed(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(SGOPDConfigError, match=f"allow_changed.*{name}.*{said}"):
        tiny_config(tmp_path, allow_changed=[name])


def test_names_that_are_compared_can(tmp_path: Path) -> None:
    tiny_config(tmp_path, allow_changed=["learning_rate", "max_steps", "world_size", "train_dataset"])
