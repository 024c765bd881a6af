"""Weights and controls of a run: what they need at construction, and what they hand on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_tokenizer, tiny_trainer

from sg_opd_trl import SGOPDConfigError, VerifierError
from sg_opd_trl.token_weights import TokenFactors, TokenWeights

NEWLINE = "0123456789+=abcdefg\n "


def weights(characters: str = NEWLINE, **settings: Any) -> TokenWeights:
    return TokenWeights(tiny_config(Path("unused"), **settings), tiny_tokenizer(characters))


def prepared(ids: list[list[int]], *, step: int = 0, rank: int = 0, **settings: Any) -> torch.Tensor:
    trainer: Any = SimpleNamespace(
        accelerator=SimpleNamespace(process_index=rank), state=SimpleNamespace(global_step=step)
    )
    rollouts = {"completion_ids": torch.tensor(ids)}
    return weights(gate_signal="random", **settings).prepare(rollouts, trainer)["gate_numbers"]


# --- construction ----------------------------------------------------------------------------------------------------
def test_what_the_tokenizer_lacks_is_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(SGOPDConfigError, match=r"`special_token_mask` must hold strings .* got '<think>'"):
        tiny_trainer(tmp_path, settings={"special_token_mask": ["<think>"]})
    with pytest.raises(SGOPDConfigError, match=r"`drift_gate_block='newline'` is not supported with this tokenizer"):
        tiny_trainer(tmp_path, settings={"drift_gate_tau": 1.0, "drift_gate_block": "newline"})
    weights("0123456789+=abcdefgh ", drift_gate_block="newline")  # nothing reads it without tau


def test_a_fixed_advantage_needs_verdicts(tmp_path: Path) -> None:
    settings = {"teacher_sampling_enable": False, "sign_gated_extrapolation": False, "max_steps": 1}
    scores = {"reward_funcs": lambda completions, **_: [0.5] * len(completions)}
    tiny_trainer(tmp_path, settings=settings, **scores).train()
    with pytest.raises(VerifierError, match=r"must answer 1 \(right\), 0 \(wrong\) or None"):
        tiny_trainer(tmp_path, settings=settings | {"wrong_rollout_advantage": -1.0}, **scores).train()


# --- random numbers --------------------------------------------------------------------------------------------------
def test_numbers_follow_seed_step_rank_and_rollouts() -> None:
    ids = [[5, 6, 7], [8, 9, 1]]
    numbers = prepared(ids)
    assert numbers.shape == (2, 3) and numbers.dtype == torch.float32 and numbers.unique().numel() == 6
    assert torch.equal(prepared(ids), numbers)
    others = [
        prepared(ids, step=1), prepared(ids, rank=1), prepared(ids, seed=1), prepared([[5, 6, 7], [8, 9, 2]])
    ]  # fmt: skip
    for other in others:
        assert not torch.equal(other, numbers)


def test_numbers_leave_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    prepared([[5, 6]])
    assert torch.equal(torch.rand(1), expected)


# --- what is off leaves no trace -------------------------------------------------------------------------------------
def test_everything_off_hands_on_what_it_is_given() -> None:
    off, logps = weights(), torch.rand(2, 3)
    inputs = {"verdicts": torch.tensor([0.0, float("nan")]), "completion_ids": torch.zeros(2, 3, dtype=torch.long)}
    mask = torch.ones(2, 3)
    assert off.prepare(inputs, SimpleNamespace(accelerator=None)) is inputs
    assert off.random_gate(None, inputs, mask) is None
    assert off.without_teacher(logps, inputs, 0.5) is logps
    factors = off.factors(logps, logps, (logps, logps), mask, inputs)
    assert factors == TokenFactors(logps, None, None, None) and factors.applied == [logps]
    assert off.taught(inputs["verdicts"]).tolist() == [True, True]


def test_abstained_rollouts_stay_with_the_teacher() -> None:
    verdicts = torch.tensor([1.0, 0.0, float("nan")])
    assert weights(wrong_rollout_advantage=-1.0).taught(verdicts).tolist() == [True, False, True]
    fixed = weights(wrong_rollout_advantage=0.0).without_teacher(torch.ones(3, 2), {"verdicts": verdicts}, 0.0)
    assert fixed.tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
