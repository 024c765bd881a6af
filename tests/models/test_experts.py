"""Mixtures of experts that are set to return their router logits write, score and train as if they were not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_architecture
from tiny import GradientRecorder, parity_verifier, relative_difference, tiny_trainer
from transformers import GenerationConfig

from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.models.experts import returns_router_logits, without_router_logits
from sg_opd_trl.models.generate import generate_completions
from sg_opd_trl.trl_seam import add_fused_head, fused_forward

ROWS = TokenBatch.from_lists([[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]], 0, torch.device("cpu"))
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=[])


# GraniteMoe and DeepSeek call the number of their experts by names of their own.
@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "deepseek_v3"])
def test_writing_and_scoring_are_those_of_a_model_that_keeps_its_router_logits(name: str) -> None:
    quiet, loud = (tiny_architecture(name, output_router_logits=value) for value in (False, True))
    prompts = [[5, 6, 7], [8]]
    assert generate_completions(loud, prompts, GREEDY) == generate_completions(quiet, prompts, GREEDY)
    for model in (quiet, loud):
        add_fused_head(model, 0.8, False)
    with torch.no_grad():
        expected, found = (fused_forward(model, *ROWS.joined(), 4) for model in (quiet, loud))
    assert torch.equal(found.logps, expected.logps)
    assert found.logps.min() < -0.5
    assert found.auxiliary_loss is None
    assert returns_router_logits(loud), "the model is as it was given"


def test_for_a_block_alone() -> None:
    model = tiny_architecture("qwen3_moe", output_router_logits=True)
    with pytest.raises(ZeroDivisionError), without_router_logits(model):
        assert not returns_router_logits(model)
        raise ZeroDivisionError
    assert returns_router_logits(model)
    dense = tiny_architecture("llama")
    with without_router_logits(dense):
        assert not returns_router_logits(dense)


SMALL = {"vocab_size": 26}


def test_a_run_with_router_logits_in_every_role_is_the_run_without(tmp_path: Path) -> None:
    """The auxiliary loss is the student's alone, and TRL's coefficient decides about it, not that field."""

    def gradients(value: bool) -> tuple[dict[str, torch.Tensor], Any]:
        models = [tiny_architecture("qwen3_moe", seed=seed, output_router_logits=value, **SMALL) for seed in range(3)]
        recorder = GradientRecorder()
        trainer = tiny_trainer(
            tmp_path / str(value),
            model=models[0],
            teacher_model=models[1],
            reference_model=models[2],
            reward_funcs=parity_verifier,
            callbacks=[recorder],
            settings={"max_steps": 1, "lambda_base": 1.5, "seed": 0},
        )
        trainer.train()
        return recorder.steps[0], trainer

    without, _ = gradients(False)
    with_them, trainer = gradients(True)
    assert trainer.aux_loss_enabled
    assert relative_difference(with_them, without) == 0
    logs = [entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry]
    assert logs and logs[0] > 0


def test_a_student_whose_auxiliary_loss_trl_cannot_compute_is_refused(tmp_path: Path) -> None:
    def build(**settings: Any) -> Any:
        student = tiny_architecture("granitemoe", **SMALL)
        return tiny_trainer(tmp_path, model=student, settings={"max_steps": 1} | settings)

    with pytest.raises(SGOPDConfigError, match=r"^`router_aux_loss_coef` must be 0 .*GraniteMoe.*got 0.001"):
        build()
    build(router_aux_loss_coef=0.0).train()
