"""Facts of a teacher: they change with what decides its rollouts, and with nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from sg_opd_trl import AdapterTeacher, LocalTeacher, ServerTeacher, SGOPDConfigError
from sg_opd_trl.teacher_sampling.stored import identity
from sg_opd_trl.teacher_sampling.stored.identity import source_facts, teacher_facts


def local(model: Any) -> LocalTeacher:
    teacher = LocalTeacher(model)
    teacher.accelerator = Accelerator(cpu=True)
    return teacher


def loaded(path: Path, **options: Any) -> Any:
    like = tiny_model(0)
    teacher = LocalTeacher.from_pretrained(
        str(path), role="teacher", like=like, revision=None, init_kwargs={"trust_remote_code": False, **options}
    )
    teacher.accelerator = Accelerator(cpu=True)
    return teacher


def test_a_model_given_as_an_object_is_known_by_every_weight() -> None:
    facts = teacher_facts(local(tiny_model(1)), None)
    assert facts == teacher_facts(local(tiny_model(1)), None)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        model = tiny_model(1)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[7] += 1e-4
        assert teacher_facts(local(model), None) != facts, name


def test_the_hash_of_weights_stays_as_it_is() -> None:
    model = tiny_model(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 1000)
    assert teacher_facts(local(model), None)["weights"] == "815ce4a47aab0a68ffaa9d075f383643"


def test_the_path_in_a_config_says_nothing_of_the_weights(tmp_path: Path) -> None:
    tiny_model(1).save_pretrained(tmp_path)
    same = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        trained.lm_head.weight.view(-1)[3] += 1e-5
    assert teacher_facts(local(trained), None) != teacher_facts(local(same), None)


def test_a_model_by_path_is_known_by_its_folder_dtype_and_options(tmp_path: Path) -> None:
    tiny_model(1).save_pretrained(tmp_path / "a")
    tiny_model(1).save_pretrained(tmp_path / "b")
    facts = teacher_facts(loaded(tmp_path / "a"), None)
    assert facts == teacher_facts(loaded(tmp_path / "b"), None)
    assert facts == teacher_facts(loaded(tmp_path / "a", attn_implementation="eager"), None)
    assert facts != teacher_facts(loaded(tmp_path / "a", dtype="bfloat16"), None)
    assert facts != teacher_facts(loaded(tmp_path / "a", rms_norm_eps=1e-3), None)
    assert str(tmp_path) not in str(facts)


def test_a_sharded_model_by_path_is_known_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(1).save_pretrained(tmp_path)
    whole = teacher_facts(loaded(tmp_path), None)
    monkeypatch.setattr(identity, "is_sharded", lambda accelerator: True)
    assert teacher_facts(loaded(tmp_path), None) == whole
    with pytest.raises(SGOPDConfigError, match="of which no process has all"):
        teacher_facts(local(tiny_model(1)), None)


def snapshot(root: Path, commit: str) -> str:
    folder = root / "models--user--model" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return str(folder / "config.json")


def test_a_hub_id_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {None: snapshot(tmp_path, "a" * 40), "v2": snapshot(tmp_path, "b" * 40)}
    monkeypatch.setattr(identity, "find_adapter_config_file", lambda name, revision: None)
    monkeypatch.setattr(identity, "cached_file", lambda name, file, revision: files[revision])
    assert source_facts("user/model", None) == {"model": {"id": "user/model", "commit": "a" * 40}}
    assert source_facts("user/model", "v2") == {"model": {"id": "user/model", "commit": "b" * 40}}
    monkeypatch.setattr(identity, "cached_file", lambda name, file, revision: "/elsewhere/config.json")
    with pytest.raises(SGOPDConfigError, match=r"got 'user/model', whose commit is not known.*as a local folder"):
        source_facts("user/model", None)


def given_options(path: Path, **options: Any) -> Any:
    """A loaded teacher that says it was loaded so."""
    teacher = loaded(path)
    teacher.loaded_from = str(path), None, options
    return teacher


def test_where_files_are_found_and_with_which_key_is_no_part_of_the_facts(tmp_path: Path) -> None:
    tiny_model(1).save_pretrained(tmp_path)
    own = {
        **{"token": "hf_secret", "use_auth_token": "hf_secret", "proxies": {"https": "http://me:secret@host"}},
        **{"cache_dir": "/models/somebody/cache", "offload_folder": "/somebody/offload", "max_memory": {0: "1GB"}},
        **{"local_files_only": True, "force_download": False, "low_cpu_mem_usage": True},
    }
    facts = teacher_facts(given_options(tmp_path), None)
    assert teacher_facts(given_options(tmp_path, **own), None) == facts
    deep = {"quantization_config": {"token": "hf_secret", "of": ["/models/somebody/a", "~somebody/b"], "bits": 4}}
    inside = teacher_facts(given_options(tmp_path, **deep), None)
    assert inside != facts
    assert inside["options"]["quantization_config"]["bits"] == 4
    assert not any(word in str(inside) for word in ("secret", "somebody"))


def test_weights_in_a_subfolder_count(tmp_path: Path) -> None:
    tiny_model(0).save_pretrained(tmp_path)
    found = []
    for seed in (1, 1, 2):
        tiny_model(seed).save_pretrained(tmp_path / "sub")
        found.append(teacher_facts(loaded(tmp_path, subfolder="sub"), None))
    assert found[0] == found[1] != found[2]
    assert "contents" in found[0]["model"]


def test_a_gguf_file_counts(tmp_path: Path) -> None:
    tiny_model(1).save_pretrained(tmp_path)
    found = []
    for weights in ("one", "one", "two"):
        (tmp_path / "model.gguf").write_text(weights)
        found.append(teacher_facts(given_options(tmp_path, gguf_file="model.gguf"), None))
    assert found[0] == found[1] != found[2]


def test_weights_in_no_known_file_are_hashed_as_they_are_loaded(tmp_path: Path) -> None:
    tiny_model(1).save_pretrained(tmp_path / "model")
    teacher = loaded(tmp_path / "model")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{}")
    teacher.loaded_from = str(tmp_path / "odd"), None, {}
    assert teacher_facts(teacher, None) == teacher_facts(local(teacher.model), None)
    assert "weights" in teacher_facts(teacher, None)
    (tmp_path / "local.gguf").write_text("weights")
    teacher.loaded_from = "user/model", None, {"gguf_file": str(tmp_path / "local.gguf")}
    assert "weights" in teacher_facts(teacher, None), "a file here is loaded in place of the one on the Hub"


def test_a_hub_id_is_looked_up_where_it_was_loaded_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(1).save_pretrained(tmp_path / "model")
    teacher, asked = loaded(tmp_path / "model"), []

    def cached_file(name: str, file: str, **where: Any) -> str:
        asked.append((file, where))
        return commit

    commit = snapshot(tmp_path, "a" * 40)
    monkeypatch.setattr(identity, "find_adapter_config_file", lambda name, **where: None)
    monkeypatch.setattr(identity, "cached_file", cached_file)
    teacher.loaded_from = "user/model", None, {"revision": "v2", "subfolder": "sub", "token": "hf_secret"}
    facts = teacher_facts(teacher, None)
    assert asked == [("config.json", {"revision": "v2", "subfolder": "sub", "token": "hf_secret"})]
    assert facts["model"] == {"id": "user/model", "commit": "a" * 40}
    assert facts["options"]["subfolder"] == "sub"
    assert "secret" not in str(facts)


def server(name: str, root: str | None, **more: Any) -> ServerTeacher:
    teacher = ServerTeacher("http://localhost:8000")
    teacher.identity = {"name": name, "root": root, "revision": None, "dtype": "float32", "fingerprint": None} | more
    return teacher


def test_a_server_is_known_by_its_model_and_folders_by_their_hash() -> None:
    facts = teacher_facts(server("served", "/models/somebody/model"), None)
    assert facts["identity"]["name"] == "served"
    assert "somebody" not in str(facts)
    assert facts != teacher_facts(server("other", "/models/somebody/model"), None)
    assert facts != teacher_facts(server("served", "/models/somebody/model2"), None)
    assert facts != teacher_facts(server("served", "/models/somebody/model", revision="v2"), None)
    assert facts != teacher_facts(server("served", "/models/somebody/model", dtype="bfloat16"), None)
    assert teacher_facts(server("served", "user/model"), None)["identity"]["root"] == "user/model"
    assert teacher_facts(server("n" * 5000, None), None)["identity"]["name"] == "n" * 5000


@pytest.mark.parametrize("key", ["name", "root"])
def test_a_server_of_a_folder_that_is_here_is_known_by_its_contents(tmp_path: Path, key: str) -> None:
    def facts(folder: Path) -> dict:
        return teacher_facts(server(**({"name": "served", "root": None} | {key: str(folder)})), None)

    for name, weights in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(weights)
    before = facts(tmp_path / "a")
    assert before == facts(tmp_path / "b") != facts(tmp_path / "c")
    (tmp_path / "a" / "model.safetensors").write_text("three")
    assert facts(tmp_path / "a") != before
    (tmp_path / "empty").mkdir()
    assert facts(tmp_path / "empty")["identity"][key].startswith("path ")


# --- an adapter on the student's base --------------------------------------------------------------------------------
def student(base: int = 0, **lora: Any) -> Any:
    """A student with an adapter of its own, and the teacher's beside it."""
    torch.manual_seed(5)
    model = get_peft_model(tiny_model(base), LoraConfig(**({"r": 2, "target_modules": ["q_proj"]} | lora)))
    model.add_adapter("teacher", LoraConfig(r=2, target_modules=["v_proj"]))
    return model


def on_the_student(path: Path) -> AdapterTeacher:
    teacher = AdapterTeacher(str(path))
    teacher.accelerator = Accelerator(cpu=True)
    return teacher


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(tiny_model(0), LoraConfig(r=2, target_modules=["v_proj"])).save_pretrained(folder)
    return folder


def test_the_students_own_adapter_is_no_part_of_an_adapter_teacher(adapter: Path) -> None:
    facts = teacher_facts(on_the_student(adapter), student())
    trained = student()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if ".default." in name:
                parameter.add_(1.0)
    others = {"r": 4, "target_modules": ["k_proj", "down_proj"]}, {"modules_to_save": ["lm_head"]}
    for other in (trained, *(student(**lora) for lora in others)):
        assert teacher_facts(on_the_student(adapter), other) == facts


def test_base_and_files_of_an_adapter_teacher_count(adapter: Path, tmp_path: Path) -> None:
    facts = teacher_facts(on_the_student(adapter), student())
    assert teacher_facts(on_the_student(adapter), student(base=2)) != facts
    other = get_peft_model(tiny_model(0), LoraConfig(r=2, target_modules=["v_proj"]))
    with torch.no_grad():
        other.get_parameter("base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight")[0, 0] = 0.1
    other.save_pretrained(tmp_path)
    assert teacher_facts(on_the_student(tmp_path), student()) != facts


def test_an_adapter_merged_into_its_base_is_known_by_what_came_out(adapter: Path) -> None:
    def merged(scale: float) -> LocalTeacher:
        model = PeftModel.from_pretrained(tiny_model(0), str(adapter))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(scale)
        return local(model.merge_and_unload())

    assert teacher_facts(merged(0.1), None) == teacher_facts(merged(0.1), None)
    assert teacher_facts(merged(0.1), None) != teacher_facts(merged(0.2), None)
