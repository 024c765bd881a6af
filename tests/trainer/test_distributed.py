"""Two gloo ranks give the gradient and the metrics of one process on the same global batch."""

from pathlib import Path

import pytest
import torch
from two_ranks import launch

from . import distributed_script as script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("two") / "results.pt"
    done = launch(script.__file__, "cases", str(output))
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(output, weights_only=True)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return script.run_cases(tmp_path_factory.mktemp("one"))


def norm(gradient: dict) -> float:
    return float(torch.stack([value.norm() for value in gradient.values()]).norm())


@pytest.mark.parametrize("case", script.CASES)
def test_the_gradient_is_that_of_one_process(case: str, two_ranks: dict, one_process: dict) -> None:
    two, one = two_ranks[case]["gradient"], one_process[case]["gradient"]
    assert two.keys() == one.keys()
    assert norm(one) > 0.1
    assert norm({name: two[name] - one[name] for name in one}) / norm(one) < 1e-5


@pytest.mark.parametrize("case", [*script.CASES, "evaluation"])
def test_the_metrics_are_those_of_one_process(case: str, two_ranks: dict, one_process: dict) -> None:
    two, one = two_ranks[case]["metrics"], one_process[case]["metrics"]
    assert two.keys() == one.keys()
    assert len(one) > 40
    assert {n: two[n] for n in one} == {n: pytest.approx(one[n], rel=1e-4, abs=1e-6) for n in one}


@pytest.mark.parametrize("case", script.CASES)
def test_ranks_run_and_exchange_the_same_in_the_same_order(case: str, two_ranks: dict) -> None:
    """Else one of them would wait for ever."""
    first, second = two_ranks[case]["ranks"]
    assert first == second
    assert len(first["collectives"]) > 20
    assert first["forwards"] >= (2 if case.startswith("two micro-batches") else 1)


@pytest.mark.parametrize(
    ("case", "rollouts", "share"),
    [
        ("verified on both ranks", 3, 2 / 3),
        ("verified on one rank only", 3, 2 / 3),
        ("verified on no rank", 3, 0),
        ("more ranks than teacher prompts", 1, 1),
    ],
)
def test_the_cases_are_what_they_say(case: str, rollouts: int, share: float, two_ranks: dict) -> None:
    metrics = two_ranks[case]["metrics"]
    assert metrics["anchor/rollouts"] == rollouts
    assert metrics["anchor/verified_share"] == pytest.approx(share)
    assert (metrics.get("anchor/loss", 0.0) > 0) is ("anchor/loss" in metrics) is (share > 0)


def test_the_anchor_changes_the_gradient(two_ranks: dict) -> None:
    with_anchor, without = (two_ranks[f"verified on {where}"]["gradient"] for where in ("one rank only", "no rank"))
    assert norm({name: with_anchor[name] - without[name] for name in without}) > 1e-2


def test_shared_prompts_do_not_hang(two_ranks: dict) -> None:
    assert two_ranks["shared"] == 3


def test_a_bad_log_prob_on_one_rank_stops_every_rank(two_ranks: dict) -> None:
    assert two_ranks["errors"] == ["raised=1 steps=0"] * 2


def test_a_bad_verdict_on_one_rank_ends_the_run(tmp_path: Path) -> None:
    done = launch(script.__file__, "fail", str(tmp_path / "results.pt"))
    assert done.returncode != 0
    assert "VerifierError" in done.stderr
    assert not (tmp_path / "results.pt").exists()
