"""`SGOPDConfig`: every refusal with its message, the defaults, and that no field forgets its declaration."""

import inspect
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from tiny import tiny_config
from trl import GRPOConfig

from sg_opd_trl import SGOPDConfig, SGOPDConfigError, core
from sg_opd_trl.config import DISTILLATION_MODES, settings_of
from sg_opd_trl.core import routing
from sg_opd_trl.objectives import OBJECTIVES
from sg_opd_trl.setting import Setting

PACKAGE = Path(__file__).resolve().parents[1] / "sg_opd_trl"
INHERITED = {field.name for field in fields(GRPOConfig)}
OWN = [field for field in fields(SGOPDConfig) if field.name not in INHERITED]
SETTINGS = settings_of(SGOPDConfig)
HINTS = get_type_hints(SGOPDConfig)
NUMERIC = [field for field in OWN if HINTS[field.name] in (int, float, int | None, float | None)]
BOUNDED = [each for each in SETTINGS.values() if each.rule.bounded]

NOT_NUMBERS = [math.nan, True, "1.8"]
CHOICES = {
    "disagree_mode": "'interp', 'interp_lambda', 'preserve', 'grpo', 'cells'",
    "neutral_mode": "'base', 'conflict'",
    "coef_schedule": "'linear', 'cosine'",
    "distillation_mode": "'sampled_token', 'topk_logits', 'full_logits', 'asymmetric'",
    "stability_norm": "'sequence', 'batch', 'none'",
    "gate_signal": "'verifier', 'random'",
    "drift_gate_mean": "'signed', 'absolute'",
    "special_token_mask_scope": "'first', 'all'",
    "teacher_sampling_prompts": "'reserve', 'share'",
    "teacher_sft_phi": "'none', 'chord', 'dft'",
    "teacher_sft_reduction": "'token_mean', 'seq_mean', 'sum'",
    "vllm_importance_sampling_mode": "'token_truncate', 'token_mask', 'sequence_truncate', 'sequence_mask'",
}
# name -> (values refused beside those that are no numbers, values at the edge that are accepted), by hand
NUMBERS: dict[str, tuple[list[Any], list[Any]]] = {
    "lambda_high": ([-0.1, math.inf, None], [0.0, 1]),
    "lambda_base": ([-0.1, math.inf, None], [0.0, 1]),
    "disagree_interp_beta": ([-0.1, math.inf, None], [0.0, 2]),
    "gate_dead_zone": ([-1e-9, math.inf, None], [0.0]),
    "stability_tau": ([0.0, -1.0, math.inf], [1e-6, None]),
    "iw_opd_gamma": ([-0.1, math.inf, None], [0.0, 0.5]),
    "drift_gate_tau": ([0.0, -1.0, math.inf], [1e-6, None]),
    "verifier_timeout": ([0.0, -1.0, math.inf], [1e-6, 30, None]),
    "wrong_rollout_advantage": ([0.1, 1, -math.inf], [0.0, -1, None]),
    "teacher_sampling_ratio": ([0.0, 1.0, -0.1, math.inf, None], [0.01, 0.99]),
    "teacher_sampling_phase1_end_frac": ([-0.01, 1.01, math.inf, None], [0.0, 0.35]),
    "teacher_sampling_phase2_end_frac": ([-0.01, 1.01, math.inf, None], [0.30, 1.0]),
    "teacher_sft_alpha_start": ([-0.1, math.inf, None], [0.0, 1]),
    "teacher_sft_alpha_end": ([-0.1, math.inf, None], [0.0, 1]),
    "beta": ([-0.1, math.inf, None], [0.0, 0.04]),
    "temperature": ([0.0, -1.0, math.inf, None], [0.7]),
    "top_p": ([0.0, 1.01, math.inf, None], [1e-6, 1]),
    "epsilon": ([-0.1, math.inf, None], [0.0]),
    "epsilon_high": ([-0.1, math.inf], [0.0, None]),
    "delta": ([0.0, -1.0, math.inf], [1e-6, None]),
    "vllm_importance_sampling_clip_max": ([0.99, math.inf], [1]),
    "vllm_importance_sampling_clip_min": ([-0.1, 1.01, math.inf], [0.0, 1, None]),
    "asymmetric_threshold": ([-1.01, 1.01, math.inf, None], [-1, 1]),
    "asymmetric_forward_kl_scale": ([0.0, -1.0, math.inf], [1e-6, None]),
    "teacher_request_timeout": ([0.0, -1.0, math.inf, None], [600.0]),
}
COUNTS = [
    "distillation_topk",
    "teacher_num_generations",
    "teacher_max_completion_length",
    "max_tokens_per_scoring_batch",
]
# setting, value, a word of the reason, the way out
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"loss_type": "cispo"}, "one advantage per sequence", "Set loss_type to 'grpo', 'bnpo', 'dr_grpo' or 'dapo'"),
    ({"loss_type": "luspo"}, "one advantage per sequence", "Set loss_type to"),
    ({"importance_sampling_level": "sequence"}, "one ratio per sequence", "Set importance_sampling_level='token'"),
    ({"off_policy_mask_threshold": 0.5}, "sign of one advantage", "Set it to None"),
    (
        {"multi_objective_aggregation": "normalize_then_sum"},
        "replace the mixed reward",
        "Set multi_objective_aggregation='sum_then_normalize'",
    ),
    (
        {"gate_signal": "random", "sign_gated_extrapolation": False},
        "no consensus",
        "Set sign_gated_extrapolation=True",
    ),
    (
        {"teacher_rollouts_path": "folder", "teacher_sampling_enable": False},
        "is not supported with teacher_sampling_enable=False: the teacher writes no rollout",
        "Leave it out, or set teacher_sampling_enable=True",
    ),
    ({"num_generations": 1}, "group of one has no verifier advantage", "Set num_generations to at least 2"),
    ({"scale_rewards": "groups"}, "verifier's advantage", "Set"),
]


def make(**settings: Any) -> SGOPDConfig:
    return tiny_config(Path("unused"), **settings)


def refusal(**settings: Any) -> str:
    with pytest.raises(SGOPDConfigError) as caught:
        make(**settings)
    return str(caught.value)


def test_a_mode_that_the_forward_kl_would_pass_over_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its entry in the table of routes says; none of today's says so."""
    make(distillation_mode="asymmetric", disagree_mode="preserve")
    entry = routing.DISAGREE_ROUTES["preserve"]._replace(forward_kl=False)
    monkeypatch.setitem(routing.DISAGREE_ROUTES, "preserve", entry)
    message = refusal(distillation_mode="asymmetric", disagree_mode="preserve")
    assert "`disagree_mode='preserve'` is not supported with distillation_mode='asymmetric'" in message
    assert "whatever their route is. Set disagree_mode='interp'" in message
    make(distillation_mode="topk_logits", disagree_mode="preserve")


def check_form(message: str, name: str, value: Any) -> None:
    """Setting, value, reason, way out: one line, the last two each a sentence of their own."""
    assert "\n" not in message
    assert f"`{name}" in message
    assert repr(value) in message
    assert re.search(r"\. [A-Z]", message), f"no reason: {message}"
    assert re.search(r"\bSet\b", message), f"no way out: {message}"


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["nonsense", None, True, math.nan, ["base"]])
def test_unknown_choice(name: str, value: Any) -> None:
    message = refusal(**{name: value})
    check_form(message, name, value)
    assert CHOICES[name] in message


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (bad, _) in NUMBERS.items() for v in bad + NOT_NUMBERS])
def test_number_out_of_range(name: str, value: Any) -> None:
    check_form(refusal(**{name: value}).splitlines()[0], name, value)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, (_, good) in NUMBERS.items() for v in good])
def test_number_at_the_edge(name: str, value: Any) -> None:
    assert getattr(make(**{name: value}), name) == value


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, math.inf, True, "4"])
def test_count_that_counts_nothing(name: str, value: Any) -> None:
    check_form(refusal(**{name: value}), name, value)


@pytest.mark.parametrize(
    "value",
    [
        [1.0, 1.0, 1.0],
        [1.0] * 5,
        [1, 1, 1, -0.1],
        [1, 1, 1, math.nan],
        [1, 1, 1, math.inf],
        [1, 1, 1, True],
        "1.5",
        None,
    ],
)
def test_cell_lambdas(value: Any) -> None:
    check_form(refusal(disagree_cell_lambdas=value), "disagree_cell_lambdas", value)


@pytest.mark.parametrize("value", ["lines", "", "0", "-3", "6.4", "\u0663", 0, 1.5, True, None])
def test_drift_gate_block(value: Any) -> None:
    check_form(refusal(drift_gate_block=value), "drift_gate_block", value)


@pytest.mark.parametrize(("value", "size"), [("64", 64), ("1", 1), (32, 32), ("newline", None)])
def test_drift_block_size(value: Any, size: int | None) -> None:
    assert make(drift_gate_block=value).drift_block_size == size


@pytest.mark.parametrize("value", [[], "<think>", ["<think>", ""], [3], {"<think>": 1}])
def test_special_token_mask(value: Any) -> None:
    check_form(refusal(special_token_mask=value), "special_token_mask", value)


@pytest.mark.parametrize("value", ["", " ", 3])
def test_teacher_rollouts_path(value: Any) -> None:
    message = refusal(teacher_rollouts_path=value)
    check_form(message, "teacher_rollouts_path", value)
    assert "must be a folder or a data set on the Hub" in message


@pytest.mark.parametrize(("path", "enabled"), [(None, False), (None, True), ("folder", True), ("user/set", True)])
def test_accepted_teacher_rollouts_path(path: str | None, enabled: bool) -> None:
    assert make(teacher_rollouts_path=path, teacher_sampling_enable=enabled).teacher_rollouts_path == path


@pytest.mark.parametrize(("settings", "reason", "way_out"), REFUSED)
def test_refused_combination(settings: dict[str, Any], reason: str, way_out: str) -> None:
    name, value = next(iter(settings.items()))
    message = refusal(**settings)
    assert f"`{name}" in message
    assert str(value) in message
    assert reason in message
    assert way_out in message


def test_a_group_of_one_is_refused_without_the_gate_too() -> None:
    """TRL refuses it in any case, so switching the gate off is no way out."""
    message = refusal(num_generations=1, sign_gated_extrapolation=False)
    assert "Set num_generations to at least 2" in message
    assert "sign_gated_extrapolation" not in message


def test_phase_1_after_phase_2() -> None:
    message = refusal(teacher_sampling_phase1_end_frac=0.5, teacher_sampling_phase2_end_frac=0.4)
    check_form(message, "teacher_sampling_phase1_end_frac", 0.5)
    assert "0.4" in message
    assert make(teacher_sampling_phase1_end_frac=0.5, teacher_sampling_phase2_end_frac=0.5)


def test_all_problems_are_reported_together() -> None:
    lines = refusal(lambda_high=-1.0, neutral_mode="x", teacher_num_generations=0, loss_type="cispo").splitlines()
    assert sorted(re.match(r"`(\w+)", line).group(1) for line in lines) == [
        "lambda_high",
        "loss_type",
        "neutral_mode",
        "teacher_num_generations",
    ]


def test_defaults_are_the_papers() -> None:
    """Appendix C of the paper, and `our choice` where it prints no value."""
    expected = {
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "loss_type": "grpo",
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": 3.0,
        "beta": 0.0,
        "num_generations": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "scale_rewards": "group",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_max": 5.0,
        "vllm_importance_sampling_clip_min": None,
        "sign_gated_extrapolation": True,
        "lambda_high": 1.8,
        "lambda_base": 1.0,
        "disagree_mode": "interp",
        "disagree_interp_beta": 1.0,
        "disagree_cell_lambdas": [1.5, 1.0, 1.0, 1.5],
        "neutral_mode": "base",
        "task_reward_coef": [0.0],
        "teacher_kl_coef": [1.0],
        "coef_schedule": "linear",
        "coef_phase_end_fracs": [0.0, 1.0],
        "gate_dead_zone": 1e-4,
        "verifier_reward_func": None,
        "verifier_timeout": None,
        "gate_signal": "verifier",
        "wrong_rollout_advantage": None,
        "stability_tau": 5.0,
        "stability_norm": "sequence",
        "iw_opd_gamma": 0.0,
        "drift_gate_tau": None,
        "special_token_mask": None,
        "teacher_sampling_enable": True,
        "teacher_sampling_ratio": 0.125,
        "teacher_sampling_prompts": "reserve",
        "teacher_num_generations": 1,
        "teacher_sampling_filter_correct": True,
        "teacher_sampling_phase1_end_frac": 0.30,
        "teacher_sampling_phase2_end_frac": 0.35,
        "teacher_sft_alpha_start": 0.2,
        "teacher_sft_alpha_end": 0.0,
        "teacher_sft_phi": "chord",
        "teacher_sft_reduction": "token_mean",
        "teacher_max_completion_length": None,
        "eval_with_teacher": False,
    }
    config = SGOPDConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none")
    assert {name: getattr(config, name) for name in expected} == expected
    plain = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none")
    for name in ("per_device_train_batch_size", "max_completion_length", "gradient_accumulation_steps"):
        assert getattr(config, name) == getattr(plain, name), "sizes stay TRL's"


@pytest.mark.parametrize("name", [field.name for field in OWN])
def test_no_own_field_is_accepted_and_ignored(name: str) -> None:
    # Of the configuration itself only its properties count: the checks read every field.
    files = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path.name != "config.py"]
    text = "".join([*files, inspect.getsource(SGOPDConfig)])
    assert re.search(rf"\.{name}\b", text), f"nothing reads {name}"


@pytest.mark.parametrize("field", OWN, ids=lambda field: field.name)
def test_every_own_field_is_declared_with_a_help_that_names_its_source(field: Any) -> None:
    assert field.name in SETTINGS, "it was not made by `setting`"
    assert len(field.metadata["help"]) > 30
    assert SETTINGS[field.name].help == field.metadata["help"]
    assert SETTINGS[field.name].group
    # How a model is loaded is nobody's method.
    loading = re.search(r"_model_(revision|init_kwargs)$", field.name)
    assert loading or re.search(r"paper|our choice|arXiv|Eq\.|AOPD", field.metadata["help"])


@pytest.mark.parametrize("name", [field.name for field in NUMERIC])
def test_every_own_number_has_bounds_and_a_reason(name: str) -> None:
    assert SETTINGS[name].rule.bounded
    assert SETTINGS[name].rule.why.endswith(".")


def test_the_tables_of_these_tests_hold_all_numbers_and_choices() -> None:
    assert {each.name for each in BOUNDED} == {*NUMBERS, *COUNTS, "teacher_max_retries", "max_skipped_steps"}
    assert {name for name, each in SETTINGS.items() if each.rule.choices} == set(CHOICES)


def just_outside(setting: Setting) -> list[float]:
    rule, step = setting.rule, 1 if setting.whole else 1e-9
    low = [] if rule.at_least is None else [rule.at_least - step]
    high = [] if rule.at_most is None else [rule.at_most + step]
    return [*low, *high, *(bound for bound in (rule.above, rule.below) if bound is not None)]


@pytest.mark.parametrize("setting", BOUNDED, ids=lambda setting: setting.name)
def test_every_declared_bound_is_enforced(setting: Setting) -> None:
    values = just_outside(setting)
    assert values
    for value in values:
        # A setting of servers is refused without a server too, in a message of its own that comes after this one.
        check_form(refusal(**{setting.name: value}).splitlines()[0], setting.name, value)


def test_every_choice_is_accepted() -> None:
    for name, setting in SETTINGS.items():
        for value in setting.rule.choices:
            assert getattr(make(**{name: value}), name) == value
    assert set(OBJECTIVES) == set(DISTILLATION_MODES)
    assert SETTINGS["disagree_mode"].rule.choices == core.DISAGREE_MODES


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, True),
        ({"lambda_high": 1.0}, False),
        ({"lambda_high": 1.0, "lambda_base": 1.25}, True),
        ({"sign_gated_extrapolation": False}, False),
        ({"sign_gated_extrapolation": False, "lambda_base": 1.25}, True),
        ({"lambda_high": 1.0, "disagree_mode": "interp_lambda", "disagree_interp_beta": 0.5}, True),
        ({"lambda_high": 1.0, "disagree_mode": "grpo"}, False),
    ],
)
def test_the_reference_is_needed_only_where_a_lambda_is_not_1(settings: dict[str, Any], needed: bool) -> None:
    assert make(**settings).needs_reference is needed


def test_teacher_length_defaults_to_the_students() -> None:
    assert make(max_completion_length=6).teacher_completion_length == 6
    assert make(max_completion_length=6, teacher_max_completion_length=9).teacher_completion_length == 9


@pytest.mark.parametrize(
    ("mode", "size"), [("sampled_token", 32), ("topk_logits", 32), ("full_logits", 32), ("asymmetric", 10)]
)
def test_the_size_of_the_support_is_that_of_the_modes_paper(mode: str, size: int) -> None:
    assert tiny_config("unused", distillation_mode=mode, teacher_sampling_enable=False).support_size == size
    assert tiny_config("unused", distillation_mode=mode, distillation_topk=7).support_size == 7
