"""Killed at every moment of its saving, a student is the old one, the new one, or refused."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from killed import HALF_WRITTEN, OPERATIONS, killed_before
from safetensors.torch import load_file
from tiny import parity_verifier, save_pair, tiny_data, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sg_opd_trl import CheckpointError
from sg_opd_trl.baselines.config import SeqKDConfig, TeacherSFTConfig
from sg_opd_trl.baselines.sft import build_sft_trainer
from sg_opd_trl.checkpoints import MANIFEST
from sg_opd_trl.evaluation import evaluate_model
from sg_opd_trl.run_folder import has_student
from sg_opd_trl.student_files import STUDENT_ASIDE, check_student, written_aside
from sg_opd_trl.tasks import resolve
from sg_opd_trl.teachers import AdapterTeacher


def save(folder: Path, files: dict[str, str]) -> None:
    with written_aside(folder, 0, own=True) as aside:
        for name, content in files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            with (aside / name).open("w", encoding="utf-8") as file:
                file.write(content[:2])
                file.flush()
                sys.audit(HALF_WRITTEN, str(aside))
                file.write(content[2:])


NEW = {"config.json": "new", "model-00001.safetensors": "new", "model.safetensors.index.json": "new", "part/x": "new"}


def test_whenever_it_is_killed_nobody_takes_a_mixture_for_a_student(tmp_path: Path) -> None:
    outcomes = []
    for operation in range(100):
        folder = tmp_path / str(operation)
        save(folder, dict.fromkeys(NEW, "old"))
        if not killed_before(folder, operation, partial(save, folder, NEW)):
            break
        there = {(folder / name).read_text(encoding="utf-8") for name in NEW}
        try:
            check_student(folder)
            assert len(there) == 1, f"a mixture is taken for a student after {operation} operations"
            outcomes.append(there.pop())
        except CheckpointError:
            assert not has_student(folder)
            outcomes.append("refused")
        # Whatever is there, saving again puts it right.
        save(folder, NEW)
        check_student(folder)
        assert {(folder / name).read_text(encoding="utf-8") for name in NEW} == {"new"}
    assert set(outcomes) == {"old", "refused", "new"}
    assert len(outcomes) > 20


# --- two kills -------------------------------------------------------------------------------------------------------
SINGLE = ("config.json", "model.safetensors", "part/tokenizer.json")
SHARDED = (
    *("config.json", "generation_config.json", "part/tokenizer.json"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
)
STUDENTS = {"old": SINGLE, "first": SHARDED, "second": SINGLE, "third": SHARDED}
State = dict[str, str | None]
"""What is in a folder, and in all below it: a file's content, None for a folder."""


def content_of(folder: Path) -> State:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def restored(folder: Path, state: State) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in state.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_text(content, encoding="utf-8")


def save_as(folder: Path, student: str) -> None:
    save(folder, dict.fromkeys(STUDENTS[student], student))


class Watch:
    """Tells of the file operations of a saving, before each of them.

    Attributes:
        states: what was in the folder then: what a kill would have left.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.states: list[State] = []
        sys.addaudithook(self.on_event)

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        # `rmtree` names what it deletes by descriptors: every operation counts, whatever its path.
        if self.folder is not None and event in OPERATIONS:
            folder, self.folder = self.folder, None
            self.states.append(content_of(folder))
            self.folder = folder

    def saving(self, folder: Path, student: str) -> Iterator[State]:
        """What there is on the way and at the end, each once."""
        self.folder, self.states = folder, []
        try:
            save_as(folder, student)
        finally:
            self.folder = None
        return iter({json.dumps(state): state for state in [*self.states, content_of(folder)]}.values())


@pytest.fixture(scope="module")
def watch() -> Watch:
    """One: Python takes no hook back."""
    return Watch()


def found(folder: Path) -> str:
    """Which student is in the folder: one by its name, `refused`, or `a mixture` that is taken for one."""
    try:
        check_student(folder)
    except CheckpointError:
        return "refused"
    there = {name: content for name, content in content_of(folder).items() if STUDENT_ASIDE not in name}
    weights = {content for name, content in there.items() if name.startswith("model")}
    whole = [student for student, names in STUDENTS.items() if all(there.get(name) == student for name in names)]
    return whole[0] if len(whole) == 1 and weights == set(whole) else "a mixture"


def test_killed_twice_at_every_pair_of_moments_it_is_no_mixture(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student in shards over one in a single file, killed; then another in a single file, killed; then one whole."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    folder, pairs = tmp_path / "student", 0
    outcomes: set[str] = set()
    save_as(folder, "old")
    for after_one in watch.saving(folder, "first"):
        restored(folder, after_one)
        for after_two in watch.saving(folder, "second"):
            pairs += 1
            restored(folder, after_two)
            outcome = found(folder)
            outcomes.add(outcome)
            assert outcome != "a mixture", after_two
            # Whatever is there, saving again puts it right.
            save_as(folder, "third")
            assert found(folder) == "third", after_two
            assert not (folder / STUDENT_ASIDE).exists()
    assert outcomes == {"old", "first", "second", "refused"}
    assert pairs > 500


def test_a_full_disk_leaves_the_mark_of_a_half_student(tmp_path: Path) -> None:
    half(tmp_path)
    with pytest.raises(CheckpointError, match="full"), written_aside(tmp_path, 0, own=True) as aside:
        (aside / "model.safetensors").write_text("new", encoding="utf-8")
        raise OSError(28, "No space left on device")
    with pytest.raises(CheckpointError, match="is not whole"):
        check_student(tmp_path)
    assert [path.name for path in (tmp_path / STUDENT_ASIDE).iterdir()] == [MANIFEST]


def test_the_trainer_saves_so_and_leaves_nothing_aside(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings={"max_steps": 1, "teacher_sampling_enable": False})
    trainer.train()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        trainer.save_model(str(folder))
        saved = load_file(folder / "model.safetensors")
        assert all(torch.equal(saved[name], weight) for name, weight in trainer.model.named_parameters())
        assert (folder / "tokenizer.json").is_file()
        assert not (folder / STUDENT_ASIDE).exists()


def half(folder: Path) -> Path:
    """A student of which the weights are still to come."""
    save_pair(folder, 0)
    half_of(folder, "model.safetensors")
    return folder


def half_of(folder: Path, last: str) -> None:
    (folder / STUDENT_ASIDE).mkdir()
    (folder / last).rename(folder / STUDENT_ASIDE / last)
    (folder / STUDENT_ASIDE / MANIFEST).write_text(json.dumps({"files": [last]}), encoding="utf-8")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A whole student, a half one, a half adapter on the whole one, and a whole adapter on the half one."""
    peft = pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("students")
    whole, student = save_pair(root / "whole", 0), root / "student"
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    adapters = {"adapter": whole, "on_half": str(student)}
    for name, base in adapters.items():
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(whole), config)
        model.save_pretrained(root / name)
        path = root / name / "adapter_config.json"
        facts = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
        path.write_text(json.dumps(facts), encoding="utf-8")
        AutoTokenizer.from_pretrained(whole).save_pretrained(root / name)
    half_of(root / "adapter", "adapter_model.safetensors")
    return SimpleNamespace(
        whole=whole,
        student=str(half(student)),
        adapter=str(root / "adapter"),
        on_half=str(root / "on_half"),
        peft=peft,
    )


def baseline(kind: str, folder: Path, student: str, teacher: str) -> None:
    settings = {
        **{
            "output_dir": str(folder),
            "teacher_model_name_or_path": teacher,
            "model_init_kwargs": {"dtype": "float32"},
        },
        **{"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1},
    }
    if kind == "gkd":
        from sg_opd_trl.baselines.gkd import OnPolicyGKDConfig, build_gkd_trainer

        build_gkd_trainer(student, OnPolicyGKDConfig(**settings, num_generations=4), tiny_data())
    else:
        config = SeqKDConfig(**settings) if kind == "seqkd" else TeacherSFTConfig(**settings, num_generations=4)
        build_sft_trainer(student, config, [parity_verifier], tiny_data())


def with_lora(folder: Path, broken: SimpleNamespace, teacher: Any) -> None:
    lora = broken.peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    tiny_trainer(folder, model=broken.whole, peft_config=lora, teacher_model=teacher, teacher_processing_class=None)


LOADS: dict[str, Callable[[SimpleNamespace, Path], Any]] = {
    "evaluated": lambda it, _: evaluate_model(it.student, None, [{"prompt": "1+1=", "solution": "2"}]),
    "evaluated adapter": lambda it, _: evaluate_model(it.adapter, None, [{"prompt": "1+1=", "solution": "2"}]),
    "evaluated base": lambda it, _: evaluate_model(it.on_half, None, [{"prompt": "1+1=", "solution": "2"}]),
    "student": lambda it, run: tiny_trainer(run, model=it.student),
    "student's base": lambda it, run: tiny_trainer(run, model=it.on_half),
    "teacher": lambda it, run: tiny_trainer(run, teacher_model=it.student, teacher_processing_class=None),
    "reference": lambda it, run: tiny_trainer(run, reference_model=it.student),
    "adapter as teacher": lambda it, run: with_lora(run, it, it.adapter),
    "adapter of its own": lambda it, run: with_lora(run, it, AdapterTeacher(it.adapter)),
    "teacher's base": lambda it, run: tiny_trainer(run, teacher_model=it.on_half, teacher_processing_class=None),
    **{
        f"{role} of {kind}": lambda it, run, kind=kind, role=role: baseline(
            kind, run, *((it.student, it.whole) if role == "student" else (it.whole, it.student))
        )
        for kind in ("sft", "seqkd", "gkd")
        for role in ("student", "teacher")
    },
    "named in a command": lambda it, _: resolve(it.student),
    "adapter named in a command": lambda it, _: resolve(it.adapter),
}


@pytest.mark.filterwarnings("ignore:.*trl.experimental.*")
@pytest.mark.parametrize("load", LOADS)
def test_a_half_one_is_refused_wherever_it_is_loaded(broken: SimpleNamespace, tmp_path: Path, load: str) -> None:
    said = r"is not whole.*\['(adapter_)?model.safetensors'\] were in their place.*resume_from_checkpoint: true"
    with pytest.raises(CheckpointError, match=said):
        LOADS[load](broken, tmp_path / "run")


def test_a_full_disk_leaves_the_student_that_was_there(tmp_path: Path) -> None:
    save(tmp_path, {"model.safetensors": "old"})
    with pytest.raises(CheckpointError, match="full"), written_aside(tmp_path, 0, own=True):
        raise OSError(28, "No space left on device")
    assert (tmp_path / "model.safetensors").read_text(encoding="utf-8") == "old"
    assert not (tmp_path / STUDENT_ASIDE).exists()
