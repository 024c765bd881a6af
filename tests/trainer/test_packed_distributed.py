"""Two gloo ranks that train without padding give the gradient of one process with padding."""

import sys
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from tiny import relative_difference
from two_ranks import launch
from varlen_attention import count_tokens

from sg_opd_trl import trl_seam
from trainer import distributed_script as script

pytestmark = pytest.mark.slow

DISTRIBUTED = ["verified on one rank only", "two micro-batches, one rank only", "tokens of the whole batch"]


def run_distributed_cases() -> dict[str, dict]:
    """Gradients of an optimizer step, all packed, and the forwards of the policy in it."""
    results: dict[str, dict] = {}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(trl_seam, "should_pack", lambda model, mask: True)
        for case in DISTRIBUTED:
            trainer, recorder = script.build(Path(folder), *script.CASES[case])
            trainer.args.preflight = False  # which runs the student too: the forwards that count are those of the step
            seen = count_tokens(trainer.model)
            trainer.train()
            script.check_same_weights(trainer)
            forwards = trainer.accelerator.gather(torch.tensor([len(seen.packed), len(seen.shapes)]))
            results[case] = {"gradient": recorder.steps[0], "forwards": forwards.view(-1, 2)}
    return results


def test_two_ranks_pack_and_run_the_policy_once_per_micro_batch(tmp_path: Path) -> None:
    output = tmp_path / "results.pt"
    done = launch(__file__, str(output))
    assert done.returncode == 0, done.stderr[-4000:]
    results = torch.load(output, weights_only=True)
    for case in DISTRIBUTED:
        trainer, recorder = script.build(tmp_path, *script.CASES[case])
        trainer.train()
        scoring = 1 if trainer.args.stability_norm == "batch" else 0
        forwards = trainer.args.gradient_accumulation_steps
        counts = results[case]["forwards"].tolist()
        assert len(counts) == 2
        assert all(packed == every >= forwards + scoring for packed, every in counts)
        if not scoring:
            assert counts == [[forwards, forwards]] * 2
        assert relative_difference(results[case]["gradient"], recorder.steps[0]) < 1e-5


if __name__ == "__main__":
    state = PartialState(cpu=True)
    gathered = run_distributed_cases()
    if state.is_main_process:
        torch.save(gathered, sys.argv[1])
    state.wait_for_everyone()
    state.destroy_process_group()
