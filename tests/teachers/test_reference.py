"""Which reference a run gets, and that only rows that can use it are scored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import copied_weights, inject_rollouts, save_pair, tiny_model, tiny_trainer

from sg_opd_trl import SGOPDConfigError
from sg_opd_trl.teachers.local import FrozenModel, fingerprint
from sg_opd_trl.teachers.reference import (
    REFERENCE_ADAPTER,
    AdapterReference,
    add_reference_adapter,
    save_without_reference,
)

OFF = {"teacher_sampling_enable": False, "max_steps": 1}


def adapted(**settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(**({"target_modules": ["q_proj"], "r": 2, "task_type": "CAUSAL_LM"} | settings))
    return peft.get_peft_model(tiny_model(0), lora)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, FrozenModel),
        ({"lambda_high": 1.0}, type(None)),
        ({"sign_gated_extrapolation": False}, type(None)),
        ({"sign_gated_extrapolation": False, "lambda_base": 1.25}, FrozenModel),
        # TRL keeps the initial student itself where it needs it for the KL term ...
        ({"beta": 0.1}, type(None)),
        # ... but not while it moves it towards the student.
        ({"beta": 0.1, "sync_ref_model": True}, FrozenModel),
    ],
)
def test_which_reference_a_run_gets(tmp_path: Path, settings: dict, kind: type) -> None:
    folder = save_pair(tmp_path / "student", 0)
    for student in (folder, tiny_model(0)):
        # TRL loads its own reference by path, and has none for a model without one.
        if student is folder or "beta" not in settings:
            check_reference(tiny_trainer(tmp_path, settings=OFF | settings, model=student), kind, student is folder)


def check_reference(trainer: Any, kind: type, by_path: bool) -> None:
    assert type(trainer.reference) is kind
    if kind is FrozenModel:
        name = trainer.model.config.name_or_path if by_path else "initial student"
        assert trainer.reference.identity["name"] == name
        assert trainer.reference.identity["fingerprint"] == fingerprint(tiny_model(0))
        assert trainer.reference.model is not trainer.model
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_reference_of_its_own(tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "reference", 3)
    named = tiny_trainer(tmp_path, settings=OFF | {"reference_model_name_or_path": folder})
    given = tiny_trainer(tmp_path, settings=OFF, reference_model=folder)
    as_model = tiny_trainer(tmp_path, settings=OFF, reference_model=tiny_model(3))
    fingerprints = {t.reference.identity["fingerprint"] for t in (named, given, as_model)}
    assert fingerprints == {fingerprint(tiny_model(3))}
    assert named.reference.identity["name"] == given.reference.identity["name"] == folder


def test_one_model_as_teacher_and_reference(tmp_path: Path) -> None:
    """lR = lT takes the extrapolation away, so the step is that of lambda 1."""

    def step(**arguments: Any) -> dict[str, torch.Tensor]:
        trainer = tiny_trainer(tmp_path, settings=OFF | arguments.pop("settings", {}), **arguments)
        inject_rollouts(trainer, lambda prompt, row: [5 + row % 3, 7, 9])
        trainer.train()
        return copied_weights(trainer.model)

    teacher = tiny_model(1)
    shared = step(teacher_model=teacher, reference_model=teacher)
    plain = step(settings={"lambda_high": 1.0})
    for name, value in plain.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-5)


def scored_rows(folder: Path, settings: dict) -> list[list[bool]]:
    """Rows for which the reference was asked: row i of the first prompt has verdicts 0 0 0 0, the second's 0 1 0 1."""

    def verifier(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(row >= 4 and row % 2) for row in range(len(completion_ids))]

    trainer = tiny_trainer(folder, settings=OFF | settings, reward_funcs=verifier)
    inject_rollouts(trainer, lambda prompt, row: [5 + row, 7, 9])
    seen: list[list[bool]] = []
    score = trainer.reference.score

    def recording(batch: Any, rows: torch.Tensor, max_tokens: int) -> torch.Tensor:
        seen.append(rows.tolist())
        return score(batch, rows, max_tokens)

    trainer.reference.score = recording
    trainer.train()
    return seen


@pytest.mark.parametrize(
    ("settings", "first_group", "second_group"),
    [
        ({}, False, True),
        ({"lambda_base": 1.25}, True, True),
        ({"lambda_high": 1.0, "lambda_base": 1.25}, True, True),
        ({"sign_gated_extrapolation": False, "lambda_base": 1.25}, True, True),
    ],
)
def test_only_rows_with_a_route_to_it_are_scored(
    tmp_path: Path, settings: dict, first_group: bool, second_group: bool
) -> None:
    assert scored_rows(tmp_path, settings) == [[first_group] * 4 + [second_group] * 4]


def test_rows_that_were_not_scored_carry_the_teachers_log_probs(tmp_path: Path) -> None:
    """So that the extrapolation term is 0 there, whatever lambda a row gets."""
    trainer = tiny_trainer(tmp_path, settings=OFF, reward_funcs=lambda completion_ids, **_: [0, 0, 0, 0, 0, 1, 0, 1])
    inject_rollouts(trainer, lambda prompt, row: [5 + row, 7, 9])
    seen: list[dict] = []
    on_rollouts = trainer.on_rollouts

    def recording(rollouts: dict, examples: list[dict]) -> dict:
        seen.append(on_rollouts(rollouts, examples))
        return seen[-1]

    trainer.on_rollouts = recording
    trainer.train()
    (rollouts,) = seen
    same = (rollouts["reference_logps"] == rollouts["teacher_logps"]).all(dim=1)
    assert same.tolist() == [True] * 4 + [False] * 4


def test_the_copy_is_of_the_adapters_state_and_frozen() -> None:
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    add_reference_adapter(model)
    named = dict(model.named_parameters())
    pairs = {name: name.replace(".default.", f".{REFERENCE_ADAPTER}.") for name in named if ".default." in name}
    assert len(pairs) == 4
    for name, copy in pairs.items():
        assert torch.equal(named[name], named[copy])
        assert named[name].requires_grad
        assert not named[copy].requires_grad
    assert model.active_adapter == "default"


def test_a_second_trainer_on_the_same_student_takes_its_present_state() -> None:
    """A notebook cell that is run again."""
    model = adapted()
    add_reference_adapter(model)
    with torch.no_grad():
        dict(model.named_parameters())["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"] += 1
    add_reference_adapter(model)
    named = dict(model.named_parameters())
    copy = named[f"base_model.model.model.layers.0.self_attn.q_proj.lora_B.{REFERENCE_ADAPTER}.weight"]
    assert torch.equal(copy, torch.ones_like(copy))
    assert not copy.requires_grad


def test_several_active_adapters() -> None:
    model = adapted()
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(SGOPDConfigError, match="must carry one active adapter"):
        add_reference_adapter(model)


def test_saving_leaves_the_copy_out(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("second", model.peft_config["default"])
    add_reference_adapter(model)
    save_without_reference(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "second" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / REFERENCE_ADAPTER).exists()


def test_a_student_without_weights_to_copy_has_no_second_model(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, settings=OFF, model=adapted())
    assert isinstance(trainer.reference, AdapterReference)
    assert trainer.reference.identity == {"name": "initial student", "adapter": REFERENCE_ADAPTER, "fingerprint": None}
