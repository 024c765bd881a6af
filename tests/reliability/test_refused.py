"""Faults that a library below refuses, and things that want to run: refused before anything is done."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_trainer

from sg_opd_trl.cli.recipes import load_recipe
from sg_opd_trl.errors import SGOPDConfigError


def test_a_batch_that_groups_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(5\) must be divisible by num_generations \(4\)"):
        tiny_trainer(tmp_path, settings={"per_device_train_batch_size": 5})


def test_a_batch_that_would_shrink_by_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="auto_find_batch_size is not supported"):
        tiny_trainer(tmp_path, settings={"auto_find_batch_size": True})


def test_an_adapter_of_the_output_embedding(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="`lm_head` is not supported"):
        tiny_trainer(tmp_path, peft_config=peft.LoraConfig(target_modules=["lm_head", "q_proj"]))


# --- what wants to run -----------------------------------------------------------------------------------------------
class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_a_recipe_does_not_run_python(tmp_path: Path) -> None:
    file, recipe = tmp_path / "ran", tmp_path / "recipe.yaml"
    recipe.write_text(f"seed: !!python/object/apply:os.mkdir ['{file}']\n", encoding="utf-8")
    with pytest.raises(SGOPDConfigError, match=r"recipe\.yaml"):
        load_recipe(str(recipe))
    assert not file.exists()


@pytest.mark.parametrize("name", ["sg_opd_rollouts_0.pt", "optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_does_not_run_what_it_holds(tmp_path: Path, name: str) -> None:
    """One without a manifest, from elsewhere: its sums cannot be looked at."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "teacher_sampling_enable": False}
    settings |= {"steps_per_generation": 2, "per_device_train_batch_size": 4, "shuffle_dataset": True}
    tiny_trainer(tmp_path / "run", settings=settings).train()
    checkpoint, file = tmp_path / "run" / "checkpoint-1", tmp_path / "ran"
    (checkpoint / "manifest.json").unlink()
    assert (checkpoint / name).is_file()
    torch.save({"step": Payload(file)}, checkpoint / name)
    resumed = tiny_trainer(tmp_path / "again", settings=settings)
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert not file.exists()
