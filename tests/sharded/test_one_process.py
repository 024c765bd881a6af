"""Two ranks of every launch log and save what one process does, and exchange the same in the same order."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from sharded.cases import ACTIONS, CASES, HALF, OF_WHOLE_WEIGHTS, run_case
from sharded.launches import LAUNCHES, SHARDED, launch_ranks, pytestmark

__all__ = ["pytestmark"]
SCRIPT = str(Path(__file__).with_name("ranks_script.py"))
#: Cases that a launch cannot have -> words of the refusal.
REFUSED = {(kind, "whole distributions"): "`distillation_mode='full_logits'` is not supported" for kind in SHARDED}


#: Every case of a launch in a row: the ranks of one are through before the next one is started.
RUNS = [(kind, case) for kind in LAUNCHES for case in (CASES if kind in SHARDED else OF_WHOLE_WEIGHTS)]


class Launched(NamedTuple):
    """A launch of two ranks that has run its cases."""

    kind: str
    results: dict[str, dict[str, Any]]
    stderr: str

    def of(self, case: str) -> dict[str, Any]:
        assert case in self.results, f"{case!r} did not end on two ranks of {self.kind}: {self.stderr[-6000:]}"
        return self.results[case]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Launched]:
    @cache
    def launch(kind: str) -> Launched:
        folder = tmp_path_factory.mktemp(kind)
        cases = [case for name, case in RUNS if name == kind]
        # Last, as some end their run.
        actions = ACTIONS if kind in SHARDED else ["a loss that is not finite"]
        done = launch_ranks(kind, SCRIPT, str(folder), *cases, *actions, timeout=400)
        path = folder / "results.pt"
        return Launched(kind, torch.load(path) if path.exists() else {}, done.stderr)

    return launch


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    return cache(lambda case: run_case(case, tmp_path_factory.mktemp("one")))


def weights(folder: str) -> dict[str, torch.Tensor]:
    """As a reader gets them: every weight of the model that the files are of, and none left over."""
    if (Path(folder) / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(tiny_model(0), folder)
        assert load_file(f"{folder}/adapter_model.safetensors").keys() == get_peft_model_state_dict(model).keys()
    else:
        model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(told.values()), told
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(("kind", "case"), RUNS)
def test_logs_and_student_are_those_of_one_process(
    kind: str, case: str, launched: Callable[[str], Launched], one_process: Callable[[str], dict[str, Any]]
) -> None:
    two, one = launched(kind).of(case), one_process(case)
    if (kind, case) in REFUSED:
        assert REFUSED[kind, case] in two["refused"]
        return
    # Of a run that writes nothing itself there is less to log.
    assert len(one["logs"][0]) > (10 if case == "TimeSep" else 20)
    assert [entry.keys() for entry in two["logs"]] == [entry.keys() for entry in one["logs"]]
    if case in HALF:
        check_nearly_equal(two, one)
        return
    for ours, expected in zip(two["logs"], one["logs"], strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in expected.items()}
    ours, expected = weights(two["student"]), weights(one["student"])
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-5, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize(("kind", "case"), RUNS)
def test_ranks_exchange_the_same_in_the_same_order(kind: str, case: str, launched: Callable[[str], Launched]) -> None:
    """Else one of them would wait for ever."""
    first, second = launched(kind).of(case)["collectives"]
    if (kind, case) not in REFUSED:
        assert len(first) > 50
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        assert one == other, f"exchange {place}, after {first[max(0, place - 5) : place]}"
    assert len(first) == len(second)


def check_nearly_equal(two: dict[str, Any], one: dict[str, Any]) -> None:
    """bfloat16 has 8 bits: tokens whose two scores are close change sides, so that shares are not compared."""
    for name in ("loss", "entropy", "grad_norm", "teacher/abs_advantage_mean", "anchor/loss"):
        for ours, expected in zip(two["logs"], one["logs"], strict=True):
            if name in expected:
                assert ours[name] == pytest.approx(expected[name], rel=0.1, abs=0.02), name
    # Of two steps of Adam at 1e-3, which a weight with hardly any gradient may take in the other direction.
    ours, expected = weights(two["student"]), weights(one["student"])
    assert max(float((ours[name] - expected[name]).abs().max()) for name in expected) <= 4.1e-3
    changed = sum(float((ours[name] - expected[name]).abs().sum()) for name in expected)
    assert changed / sum(weight.numel() for weight in expected.values()) < 3e-4


@pytest.mark.parametrize("kind", LAUNCHES)
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_or_ends_both(
    kind: str, launched: Callable[[str], Launched]
) -> None:
    ranks = launched(kind).of("a loss that is not finite")["ranks"]
    assert len(ranks) == 2
    if kind.startswith("zero"):
        # DeepSpeed steps before anybody is asked, and says so at the start.
        assert all("not finite" in rank["raised"] and rank["steps"] == 1 for rank in ranks)
        assert "`max_skipped_steps=3` has no effect with DeepSpeed" in launched(kind).stderr
    else:
        assert ranks == [{"raised": "", "steps": 2, "skipped": 1}] * 2
        assert "has no effect with DeepSpeed" not in launched(kind).stderr


@pytest.mark.parametrize("kind", SHARDED)
def test_a_weight_that_is_not_finite_in_one_shard_is_not_saved(kind: str, launched: Callable[[str], Launched]) -> None:
    ranks = launched(kind).of("a weight that is not finite")["ranks"]
    assert len(ranks) == 2
    assert all("weights are not finite" in rank["raised"] and rank["files"] == [] for rank in ranks)
