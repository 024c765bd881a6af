"""Importing the package costs nothing, and every public name is where it is promised."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from repository import PATIENCE

import sg_opd_trl

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["torch", "trl", "transformers", "accelerate", "datasets", "peft", "math_verify", "numpy", "pandas", "jinja2"]
PUBLIC = [
    *("SGOPDConfig", "SGOPDTrainer", "TeacherAnchorCallback", "LocalTeacher", "math_reward", "evaluate_model"),
    *("SGOPDError", "SGOPDConfigError", "DataError", "TeacherError", "VerifierError", "NonFiniteError"),
]
CORE = [
    *("reverse_kl_advantage", "extrapolated_advantage", "sign_consistency_gate", "route_advantages"),
    *("stability_weight", "anchor_schedule", "local_support_matching", "drift_gate", "prefix_importance_weight"),
]


def loaded_after(statement: str) -> set[str]:
    """Top-level modules after a statement in a fresh process."""
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{n.partition('.')[0] for n in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import sg_opd_trl",
        "import sg_opd_trl; dir(sg_opd_trl); sg_opd_trl.__version__",
        "from sg_opd_trl import SGOPDError, NonFiniteError",
        "import sg_opd_trl.errors",
    ],
)
def test_a_light_import(statement: str) -> None:
    loaded = loaded_after(statement)
    assert "sg_opd_trl" in loaded
    assert loaded.isdisjoint(HEAVY), sorted(loaded & set(HEAVY))


def test_a_name_brings_what_it_needs() -> None:
    assert {"torch", "trl", "transformers"} <= loaded_after("from sg_opd_trl import SGOPDConfig")


@pytest.mark.parametrize("name", [*PUBLIC, *sg_opd_trl.__all__])
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(sg_opd_trl, name) is not None
    assert name in sg_opd_trl.__all__
    assert name in dir(sg_opd_trl)


@pytest.mark.parametrize("name", CORE)
def test_every_name_of_the_core_resolves(name: str) -> None:
    assert callable(getattr(sg_opd_trl.core, name))


def test_pass_at_k_is_in_evaluation() -> None:
    # 1 - C(2, 2) / C(4, 2) = 1 - 1 / 6
    assert sg_opd_trl.evaluation.pass_at_k(4, 2, 2) == pytest.approx(5 / 6)


def test_names_resolve_to_the_same_object_each_time() -> None:
    assert sg_opd_trl.SGOPDTrainer is sg_opd_trl.SGOPDTrainer
    from sg_opd_trl.trainer import SGOPDTrainer

    assert sg_opd_trl.SGOPDTrainer is SGOPDTrainer


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'sg_opd_trl' has no attribute 'SGOPDTrainr'"):
        sg_opd_trl.SGOPDTrainr  # noqa: B018


def test_errors_are_caught_by_the_builtin_kind_too() -> None:
    pairs = {
        "SGOPDConfigError": ValueError,
        "DataError": ValueError,
        "TeacherError": RuntimeError,
        "VerifierError": ValueError,
        "NonFiniteError": ArithmeticError,
    }
    for name, builtin in pairs.items():
        kind = getattr(sg_opd_trl, name)
        assert issubclass(kind, sg_opd_trl.SGOPDError)
        assert issubclass(kind, builtin)
