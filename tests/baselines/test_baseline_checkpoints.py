"""Baselines keep checkpoints, students and their last finished step as `SGOPDTrainer` does."""

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from any_baseline import METHODS, any_baseline
from baseline_pair import Pair
from killed import killed_before
from safetensors.torch import load_file
from tiny import copied_weights
from transformers import Trainer, TrainerCallback

from sg_opd_trl import CheckpointError, NonFiniteError, SGOPDConfigError, checkpoints
from sg_opd_trl.checkpoints import ASIDE, MANIFEST, checkpoints_of, find_problem, newest_whole_checkpoint
from sg_opd_trl.ending import Stopped
from sg_opd_trl.student_files import STUDENT_ASIDE, check_student

pytestmark = pytest.mark.filterwarnings("ignore:.*trl.experimental.*")


class At(TrainerCallback):
    """Does something at the end of a step, or at the beginning of the one behind it."""

    def __init__(self, step: int, action: Callable[[], Any], *, behind: bool = False) -> None:
        self.step, self.action, self.behind = step, action, behind

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.behind and state.global_step == self.step:
            self.action()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.behind and state.global_step == self.step:
            self.action()


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A method, the folder of an undisturbed run with its student, and its weights."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = any_baseline(request.param, pair, folder)
    trainer.train()
    trainer.save_model()
    return request.param, folder, copied_weights(trainer.model)


def same(trainer: Any, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weights[name], weight) for name, weight in trainer.model.named_parameters())


def again(run: tuple[str, Path, Any], pair: Pair, folder: Path, **changes: Any) -> Any:
    """The same command in another folder, with the teacher's rollouts, if there are any."""
    folder.mkdir(exist_ok=True)
    for path in run[1].glob("*.jsonl"):
        shutil.copyfile(path, folder / path.name)
    return any_baseline(run[0], pair, folder, **changes)


def test_the_manifest_lists_every_file(run: tuple[str, Path, Any]) -> None:
    _, folder, weights = run
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint-4", "checkpoint-2"]
    for checkpoint in checkpoints_of(folder):
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        assert set(listed) == {path.name for path in checkpoint.iterdir()} - {MANIFEST}
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"} < set(listed)
        assert find_problem(checkpoint) is None
    assert not (folder / ASIDE).exists()
    assert not (folder / STUDENT_ASIDE).exists()
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[name], weights[name]) for name in saved)


def test_a_flipped_bit_in_any_file_is_found_and_passed_over(
    run: tuple[str, Path, Any], pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = again(run, pair, tmp_path / "run")
    shutil.copytree(run[1] / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    newest = Path(shutil.copytree(run[1] / "checkpoint-4", tmp_path / "run" / "checkpoint-4"))
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        caplog.clear()
        assert newest_whole_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
        assert path.name in caplog.text
        with pytest.raises(CheckpointError, match=rf"checkpoint-4.*{path.name}"):
            trainer.train(resume_from_checkpoint=str(newest))
        path.write_bytes(content)
    (newest / "model.safetensors").unlink()
    trainer.train(resume_from_checkpoint=True)
    assert same(trainer, run[2])
    assert newest_whole_checkpoint(tmp_path / "run") == newest, "the damaged one is replaced"


def test_with_nothing_to_go_on_from_it_starts(run: tuple[str, Path, Any], pair: Pair, tmp_path: Path) -> None:
    trainer = again(run, pair, tmp_path / "run", max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert same(trainer, run[2])
    # And where it is over, it trains nothing.
    trainer = again(run, pair, tmp_path / "run")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert same(trainer, run[2])


class Killed(BaseException):
    """What no code of the run catches."""


def kill(*_: Any, **__: Any) -> NoReturn:
    raise Killed


POINTS: dict[str, tuple[Any, str]] = {
    "before anything": (Trainer, "save_model"),
    "after the weights": (Trainer, "_save_optimizer_and_scheduler"),
    "after the optimizer": (Trainer, "_save_rng_state"),
    "before the manifest": (checkpoints, "_digests"),
    "before the renaming": (Path, "rename"),
}


@pytest.mark.slow
def test_killed_anywhere_in_a_checkpoint_it_goes_on_to_the_same_student(
    run: tuple[str, Path, Any], pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (owner, name) in enumerate(POINTS.values()):
        folder = tmp_path / str(number)
        trainer = again(run, pair, folder)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            trainer.add_callback(At(4, lambda p=patch, o=owner, n=name: p.setattr(o, n, kill)))
            trainer.train()
        assert [path.name for path in checkpoints_of(folder)] == ["checkpoint-2"]
        trainer = again(run, pair, folder)
        trainer.train(resume_from_checkpoint=True)
        assert same(trainer, run[2])
        assert newest_whole_checkpoint(folder) == folder / "checkpoint-4"
        assert not (folder / ASIDE).exists()


def test_older_ones_go_once_the_new_one_is_whole(
    run: tuple[str, Path, Any], pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    digests = checkpoints._digests

    def watched(files: dict[str, Path]) -> dict[str, str]:
        seen.append([path.name for path in checkpoints_of(tmp_path)])
        return digests(files)

    monkeypatch.setattr(checkpoints, "_digests", watched)
    again(run, pair, tmp_path, save_total_limit=1).train()
    assert seen == [[], ["checkpoint-2"]]
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-4"]


# --- a student killed with SIGKILL -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_killed_student_is_the_old_one_the_new_one_or_refused(
    run: tuple[str, Path, Any], pair: Pair, tmp_path: Path
) -> None:
    trainer = again(run, pair, tmp_path)
    first = copied_weights(trainer.model)
    outcomes = set()
    for operation in range(0, 200, 3):
        trainer.model.load_state_dict(first, strict=False)
        trainer.save_model()
        trainer.model.load_state_dict(run[2], strict=False)
        killed = killed_before(tmp_path, operation, trainer.save_model)
        try:
            check_student(tmp_path)
            saved = load_file(tmp_path / "model.safetensors")
            kind = [all(torch.equal(saved[name], other[name]) for name in saved) for other in (first, run[2])]
            assert kind in ([True, False], [False, True])
            outcomes.add(("old", "new")[kind.index(True)])
        except CheckpointError:
            outcomes.add("refused")
        if not killed:
            break
    assert outcomes == {"old", "refused", "new"}


# --- weights that are too coarse, or not finite ----------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_not_trained_in_float16(method: str, pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(SGOPDConfigError, match="`dtype` must not be float16 where weights are trained"):
        any_baseline(method, pair, tmp_path, model_init_kwargs={"dtype": "float16"})


def test_nothing_with_a_nan_is_written(run: tuple[str, Path, Any], pair: Pair, tmp_path: Path) -> None:
    trainer = again(run, pair, tmp_path)

    def spoil() -> None:
        with torch.no_grad():
            next(trainer.model.parameters()).view(-1)[3] = float("nan")

    trainer.add_callback(At(4, spoil))
    with pytest.raises(NonFiniteError, match="The checkpoint of step 4 is not written"):
        trainer.train()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2"]
    with pytest.raises(NonFiniteError, match=r"The student in .* is not written"):
        trainer.save_model()
    assert not list(tmp_path.glob("*.safetensors"))


# --- whatever ends it ------------------------------------------------------------------------------------------------
def fail() -> NoReturn:
    raise RuntimeError("a loss that nobody expected")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("action", "error"), [(fail, RuntimeError), (terminate, Stopped)], ids=["error", "SIGTERM"])
def test_its_last_finished_step_is_kept(
    run: tuple[str, Path, Any],
    pair: Pair,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    action: Callable[[], None],
    error: type[BaseException],
) -> None:
    trainer = again(run, pair, tmp_path)
    trainer.add_callback(At(3, action, behind=True))
    with pytest.raises(error), caplog.at_level(logging.WARNING):
        trainer.train()
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert "Its 3 finished steps are in" in caplog.text
    trainer = again(run, pair, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert same(trainer, run[2])
