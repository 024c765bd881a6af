"""The trainer's arguments -> its teacher and its reference: which one is meant, and what is refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import save_pair, tiny_data, tiny_model, tiny_tokenizer, tiny_trainer

from sg_opd_trl import LocalTeacher, RoutedTeacher, ServerTeacher, SGOPDConfigError, TeacherError
from teachers.fake_server import FakeServer
from teachers.model_server import by_url, refused

OFF = {"teacher_sampling_enable": False}


def test_teacher_that_is_the_student(tmp_path: Path) -> None:
    student = tiny_model(0)
    with pytest.raises(SGOPDConfigError, match=r"`teacher_model` must be another object than `model`.*copy\.deepcopy"):
        tiny_trainer(tmp_path, model=student, teacher_model=student)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_teacher_that_shares_the_students_weights(tmp_path: Path) -> None:
    """LoRA is put into the base model in place: as a teacher it would carry the student's adapter and be frozen."""
    peft = pytest.importorskip("peft")
    base = tiny_model(0)
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(SGOPDConfigError, match="`teacher_model` must be another object than `model`"):
        tiny_trainer(tmp_path, model=base, teacher_model=base, peft_config=lora)


def test_reference_that_is_the_student(tmp_path: Path) -> None:
    student = tiny_model(0)
    with pytest.raises(SGOPDConfigError, match="`reference_model` must be another object than `model`"):
        tiny_trainer(tmp_path, model=student, reference_model=student)


def test_teacher_folder_with_another_tokenizer(tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "teacher", 1)
    tiny_tokenizer("1023456789+=abcdefgh ").save_pretrained(folder)
    with pytest.raises(TeacherError, match=r"got 2 differences.*'0': 5 and 6"):
        tiny_trainer(tmp_path, teacher_model=folder, teacher_processing_class=None)


def test_reference_folder_with_another_tokenizer(tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "reference", 1)
    tiny_tokenizer("1023456789+=abcdefgh ").save_pretrained(folder)
    with pytest.raises(TeacherError, match="The reference's tokenizer"):
        tiny_trainer(tmp_path, reference_model=folder)


def test_the_same_teacher_named_twice_is_fine(tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "teacher", 1)
    trainer = tiny_trainer(
        tmp_path,
        settings={"teacher_model_name_or_path": folder},
        teacher_model=folder,
        teacher_processing_class=None,
    )
    assert trainer.teacher.identity["name"] == folder


def test_a_larger_embedding_is_fine_with_the_same_tokenizer(tmp_path: Path) -> None:
    """Checkpoints of one family pad their embeddings differently: 26 ids in use, 32 rows."""
    trainer = tiny_trainer(tmp_path, teacher_model=tiny_model(1, vocab_size=32))
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("role", ["teacher", "reference"])
@pytest.mark.parametrize(("option", "value"), [("revision", "main"), ("init_kwargs", {"dtype": "float32"})])
def test_loading_options_without_loading_are_refused(tmp_path: Path, role: str, option: str, value: Any) -> None:
    settings = OFF | {f"{role}_model_{option}": value}
    with pytest.raises(SGOPDConfigError, match=f"`{role}_model_{option}` must go with a path"):
        tiny_trainer(tmp_path, settings=settings, **{f"{role}_model": tiny_model(2)})


def test_a_revision_of_the_initial_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SGOPDConfigError, match="`reference_model_revision` must go with a reference of its own"):
        tiny_trainer(tmp_path, settings=OFF | {"reference_model_revision": "main"})


def test_loading_options_of_the_default_reference(tmp_path: Path) -> None:
    student = save_pair(tmp_path / "student", 0)
    settings = OFF | {"reference_model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = tiny_trainer(tmp_path / "run", model=student, settings=settings)
    assert trainer.reference.model.dtype == torch.bfloat16
    assert trainer.model.dtype == torch.float32


def test_a_reference_given_as_a_model_is_told_what_can_be_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="sg_opd_trl"):
        tiny_trainer(tmp_path, settings=OFF, reference_model=tiny_model(2), processing_class=tiny_tokenizer())
    assert "Pass the model's path to have it checked" in caplog.text


# --- which server for which teacher ----------------------------------------------------------------------------------
def test_given_twice_or_not_to_be_told_apart(tmp_path: Path, server: FakeServer) -> None:
    said = "must be given once, got `teacher_model` and `teacher_model_server_url`"
    refused(tmp_path, server.url, SGOPDConfigError, said, teacher_model=tiny_model(1))
    refused(
        *(tmp_path, {"a": server.url}, SGOPDConfigError, "must be a mapping with the names"),
        settings={"teacher_model_name_or_path": "teacher"},
    )
    refused(
        *(tmp_path, server.url, SGOPDConfigError, r"must hold nothing but dtype .* got \['attn_implementation'\]"),
        settings={"teacher_model_init_kwargs": {"attn_implementation": "eager", "dtype": "float32"}},
    )
    refused(
        *(tmp_path, server.url, SGOPDConfigError, "`teacher_model_revision` must go with"),
        settings={"teacher_model_revision": "v2"},
    )
    with pytest.raises(SGOPDConfigError, match="URLs of one teacher, got a mapping"):
        ServerTeacher({"a": server.url})


def routed_data() -> Dataset:
    return tiny_data().add_column("teacher_id", ["one", "other"] * 8)


def test_servers_by_teacher_id_beside_local_teachers(tmp_path: Path, server: FakeServer) -> None:
    path = save_pair(tmp_path / "local", 2)
    trainer = by_url(
        *(tmp_path, {"one": server.url}),
        settings={"teacher_model_name_or_path": {"one": "teacher", "other": path}},
        train_dataset=routed_data(),
    )
    kinds = {label: type(teacher) for label, teacher in trainer.teacher.teachers.items()}
    assert kinds == {"one": ServerTeacher, "other": LocalTeacher}
    assert trainer.teacher.distillation_modes == {"sampled_token", "topk_logits", "asymmetric"}
    trainer.train()
    assert all(teacher.tokens_scored for teacher in trainer.teacher.distinct)


def test_one_server_with_several_models(tmp_path: Path, server: FakeServer) -> None:
    """Adapters that a server has beside their base."""
    server.models.append({"id": "adapter", "root": "folder/adapter", "parent": "teacher"})
    names = {"one": "teacher", "other": "adapter", "third": "adapter"}
    server.change = lambda path, request, answer: answer | {"model": request["model"]} if "model" in answer else None
    trainer = by_url(
        *(tmp_path, server.url), settings={"teacher_model_name_or_path": names}, train_dataset=routed_data()
    )
    assert isinstance(trainer.teacher, RoutedTeacher)
    assert [teacher.client.model for teacher in trainer.teacher.distinct] == ["teacher", "adapter"]


def test_the_named_folders_tokenizer_is_checked(tmp_path: Path, server: FakeServer) -> None:
    path = save_pair(tmp_path / "teacher", 1)
    server.models[0]["root"] = path
    named = {"teacher_model_name_or_path": path}
    assert by_url(tmp_path, server.url, settings=named).teacher.client.model == "teacher"
    tiny_tokenizer("1023456789+=abcdefgh ").save_pretrained(path)
    refused(tmp_path, server.url, TeacherError, "got 2 differences", settings=named)
