"""Settings without effect are named, and no others."""

from dataclasses import fields
from typing import Any

import pytest
from tiny import tiny_config

from sg_opd_trl import SGOPDConfig
from sg_opd_trl.config import unused_settings

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


def test_all_settings_of_the_anchor_are_known() -> None:
    changed = {"teacher_sampling_time_separated", "teacher_sampling_enable"}  # refused, and the switch itself
    from sg_opd_trl.config import _ANCHOR, AnchorFields

    assert {field.name for field in fields(AnchorFields)} - changed == set(_ANCHOR)
