"""A run of two ranks that one or both of them ended goes on by the same command, bit for bit, in shards too."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_trainer

from sg_opd_trl import SGOPDConfigError
from sharded import resume_script as script
from sharded.launches import LAUNCHES, launch_ranks, pytestmark

__all__ = ["pytestmark"]


# Of DDP it is `tests/trainer/test_resume_ranks.py`.
@pytest.mark.parametrize("kind", [kind for kind in LAUNCHES if kind != "ddp"])
def test_a_run_that_failed_goes_on_to_the_same_student(kind: str, tmp_path: Path) -> None:
    done = launch_ranks(kind, script.__file__, str(tmp_path), timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]
    for name, result in torch.load(tmp_path / "results.pt").items():
        whole, resumed = result["whole"], result["resumed"]
        # One of a step that is due, and the last finished step.
        assert result["kept"] == ["checkpoint-2", "checkpoint-3"]
        assert len(whole["logs"]) == script.STEPS
        assert resumed["logs"] == whole["logs"]
        weights = [load_file(path) for path in files(whole["student"])]
        assert [path.name for path in files(resumed["student"])] == [path.name for path in files(whole["student"])]
        for path, expected in zip(files(resumed["student"]), weights, strict=True):
            ours = load_file(path)
            assert ours.keys() == expected.keys()
            assert all(torch.equal(ours[entry], expected[entry]) for entry in expected), name

    # Other ranks would write other rollouts: it is another run, before anything is loaded.
    settings = script.SETTINGS | {"resume_from_checkpoint": str(tmp_path / "LoRA" / "cut" / "checkpoint-2")}
    arguments = {"train_dataset": script.tiny_data(12)} | script.lora(tmp_path)
    trainer = tiny_trainer(tmp_path / "LoRA" / "cut", settings=settings, **arguments)
    with pytest.raises(SGOPDConfigError, match=r"`world_size` 1 in place of 2.*allow_changed: \[world_size\]"):
        trainer.train()


def files(folder: str) -> list[Path]:
    found = sorted(Path(folder).glob("*.safetensors"))
    assert found
    return found
