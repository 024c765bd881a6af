"""Settings without effect are named, and no others."""

from dataclasses import MISSING
from typing import Any

import pytest
import torch
from tiny import tiny_config

from sg_opd_trl import SGOPDConfig, core
from sg_opd_trl.config import settings_of, unused_settings
from sg_opd_trl.setting import ON

OFF = {"teacher_sampling_enable": False}
UNGATED = {"sign_gated_extrapolation": False}


@pytest.mark.parametrize(
    ("switch", "changed", "used_with"),
    [
        (UNGATED, {"lambda_high": 2.5}, {}),
        (UNGATED, {"disagree_mode": "grpo"}, {}),
        (UNGATED, {"neutral_mode": "conflict"}, {}),
        (UNGATED, {"gate_dead_zone": 0.5}, {}),
        (UNGATED, {"disagree_interp_beta": 0.7}, {}),
        (UNGATED, {"disagree_cell_lambdas": [1, 2, 3, 4]}, {"disagree_mode": "cells"}),
        ({"disagree_mode": "cells"}, {"lambda_high": 2.5}, {}),
        ({"disagree_mode": "preserve"}, {"disagree_interp_beta": 0.7}, {"disagree_mode": "interp_lambda"}),
        ({"stability_tau": None}, {"stability_norm": "none"}, {}),
        ({}, {"drift_gate_block": "newline"}, {"drift_gate_tau": 1.0}),
        ({}, {"drift_gate_mean": "absolute"}, {"drift_gate_tau": 1.0}),
        ({}, {"special_token_mask_scope": "all"}, {"special_token_mask": ["<think>"]}),
        ({}, {"distillation_topk": 7}, {"distillation_mode": "topk_logits"}),
        ({"distillation_mode": "full_logits"}, {"distillation_topk": 7}, {"distillation_mode": "asymmetric"}),
        ({}, {"asymmetric_threshold": 0.5}, {"distillation_mode": "asymmetric"}),
        (
            {"distillation_mode": "topk_logits"},
            {"asymmetric_forward_kl_scale": 1.0},
            {"distillation_mode": "asymmetric"},
        ),
        (OFF, {"teacher_sampling_ratio": 0.5}, {}),
        (OFF, {"teacher_max_completion_length": 3}, {}),
        ({"neutral_mode": "conflict"}, {"lambda_base": 1.25}, {"disagree_mode": "preserve"}),
        ({"lambda_high": 1.0}, {"reference_model_init_kwargs": {"dtype": "float32"}}, {"lambda_high": 1.8}),
    ],
)
def test_a_setting_is_named_where_its_part_is_off_and_nowhere_else(
    switch: dict[str, Any], changed: dict[str, Any], used_with: dict[str, Any]
) -> None:
    ((name, _),) = changed.items()
    found = unused_settings(tiny_config("unused", **switch, **changed))
    assert name in found
    field, _, value = found[name].partition("=")
    assert repr(getattr(tiny_config("unused", **switch), field)) == value
    assert name not in unused_settings(tiny_config("unused", **(changed | used_with)))


@pytest.mark.parametrize(
    "settings", [{}, OFF, UNGATED, {"distillation_mode": "asymmetric"}, {"disagree_mode": "cells"}]
)
def test_defaults_are_never_named(settings: dict[str, Any]) -> None:
    assert unused_settings(SGOPDConfig("unused", use_cpu=True, bf16=False, **settings)) == {}


#: Settings of the gate's group that are read without the gate: `lambda_base` then counts for every token.
WITHOUT_THE_GATE = {"sign_gated_extrapolation", "lambda_base", "verifier_reward_func", "wrong_rollout_advantage"}


@pytest.mark.parametrize(
    ("switch", "group", "still_read"),
    [
        (OFF, "Phased teacher sampling", {"teacher_sampling_enable"}),
        (UNGATED, "Gate", WITHOUT_THE_GATE),
        ({"lambda_high": 1.0}, "Reference", set()),
    ],
)
def test_all_settings_of_a_part_that_is_off_are_named_or_refused(
    switch: dict[str, Any], group: str, still_read: set[str]
) -> None:
    names = [name for name, setting in settings_of(SGOPDConfig).items() if setting.group == group]
    assert names
    config = tiny_config("unused", **switch)
    for name in names:
        before = getattr(config, name)
        setattr(config, name, "another value")  # past the checks: some of these are refused as well
        assert (name in unused_settings(config)) == (name not in still_read), name
        setattr(config, name, before)


def test_the_switch_that_is_named_is_the_first_of_a_chain() -> None:
    """Without the gate there is no mode of conflicts, whatever `disagree_mode` says."""
    found = unused_settings(tiny_config("unused", **UNGATED, disagree_mode="grpo", disagree_interp_beta=0.7))
    assert found == dict.fromkeys(("disagree_mode", "disagree_interp_beta"), "sign_gated_extrapolation=False")


@pytest.mark.parametrize("mode", core.DISAGREE_MODES)
@pytest.mark.parametrize("neutral", core.NEUTRAL_MODES)
def test_a_lambda_is_named_where_the_advantages_do_not_depend_on_it(mode: str, neutral: str) -> None:
    """What `used_if` says of a mode, against what the equations do: tokens of every class, each lambda moved."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, reference = (-3 * torch.rand(9, 40, generator=generator) for _ in range(3))
    teacher[:, ::4] = student[:, ::4]  # neutral by a2; the rows in which a1 is 0 are neutral by a1
    verifier = torch.tensor([1.0, -1.0, 0.0]).repeat(3)
    route = {"disagree_mode": mode, "neutral_mode": neutral}

    def advantages(**changed: Any) -> torch.Tensor:
        config = tiny_config("unused", **route, **changed)
        return core.route_advantages(student, teacher, reference, verifier, **config.route_settings)

    for name, value in (
        ("lambda_high", 2.5),
        ("lambda_base", 1.3),
        ("disagree_interp_beta", 0.7),
        ("disagree_cell_lambdas", [1.1, 1.2, 1.3, 1.4]),
    ):
        read = not torch.equal(advantages(), advantages(**{name: value}))
        assert (name in unused_settings(tiny_config("unused", **route, **{name: value}))) != read, name


def test_every_condition_is_of_settings_that_exist_and_can_hold() -> None:
    settings = settings_of(SGOPDConfig)
    for name, setting in settings.items():
        for switch, wanted in (item for conditions in setting.used_if for item in conditions.items()):
            if wanted is ON:
                assert settings[switch].off is not MISSING, (name, switch)
            elif switch in settings and settings[switch].rule.choices:
                assert set(wanted) < set(settings[switch].rule.choices), (name, switch)
            else:
                assert set(wanted) < {True, False}, (name, switch)
                assert hasattr(tiny_config("unused"), switch)
