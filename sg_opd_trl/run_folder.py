"""The folder of a run: whose it is, what its run is, how far that is, and how the next start goes on.

A folder belongs to one run. Another one that is started there would leave a mixture: a student of the one beside
checkpoints of the other, from which a third goes on. So a start looks first:

| in the folder | `train()` | `train(resume_from_checkpoint=True)` |
|---|---|---|
| nothing that a run would lose | starts | starts |
| checkpoints | refused | goes on from the newest, if it is of the same run |
| a finished student | refused | says so, and leaves it as it is |
| a process that trains | refused | refused |
"""

import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import SaveStrategy

from .checkpoints import check_checkpoint, checkpoints_of, newest_whole_checkpoint
from .errors import SGOPDConfigError, SGOPDError
from .files import write_atomically
from .folder_lock import FolderLock
from .machines import check_same, check_shared
from .run_identity import RUN_FILE, Identity, allowed_problems, compare, read_json, settings_identity, stored_identity
from .scrubbing import WrittenWithoutSecrets
from .setting import setting
from .student_files import has_half_a_student

logger = logging.getLogger(__name__)

# What a command fills in once it loads something: it is compared where the run begins.
_COMPLETED_LATER = {"model_init_kwargs", "teacher_model_name_or_path", "reference_model_name_or_path"}
# Weights of a saved model or adapter, whole or in shards.
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")


@dataclass
class FolderFields(WrittenWithoutSecrets):
    """Settings of every method about the run's folder; a base to stand before TRL's configuration."""

    overwrite_output_dir: bool = setting(
        False,
        group="Restarting",
        help="Whether a new run may take the folder of another one: its checkpoints are deleted, its student is "
        "replaced. Otherwise a used folder is refused (our choice).",
    )
    allow_changed: list[str] | None = setting(
        None,
        help="Names of settings, such as learning_rate, that may differ from those of the checkpoint that the run "
        "goes on from. Otherwise other mathematics is refused; `world_size`, `train_dataset`, `reward_funcs` and "
        "`peft_config` are names too (our choice).",
    )


def folder_problems(config: Any) -> Iterator[str]:
    """What is wrong with the settings of the run's folder."""
    yield from allowed_problems(config)
    if config.overwrite_output_dir and read_resume(config.resume_from_checkpoint) is True:
        yield (
            "`overwrite_output_dir=True` is not supported with resume_from_checkpoint=True: one starts anew, the "
            "other goes on, and every restart would delete what the start before it has done. Leave one of them out."
        )
    if config.save_on_each_node:
        yield (
            "`save_on_each_node=True` is not supported: all machines share `output_dir`, and would write the same "
            "files there at the same time. Leave it out; the first process writes for all."
        )


def read_resume(value: str | bool | Path | None) -> Path | bool:
    """What `resume_from_checkpoint` asks for: a folder; True, go on if there is anything; False, start."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value if isinstance(value, bool) else Path(value) if value else False


class Start(NamedTuple):
    """How a run begins.

    Attributes:
        checkpoint: to go on from; None starts at the first step.
        finished: the run has ended already, and nothing is left to train.
    """

    checkpoint: Path | None = None
    finished: bool = False


# --- what is in a folder ---------------------------------------------------------------------------------------------
def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name; -1 for a folder of another name."""
    name, _, step = checkpoint.name.partition("-")
    return int(step) if name == "checkpoint" and step.isdigit() else -1


def has_student(folder: Path) -> bool:
    """Whether a model or an adapter was saved there, and is whole."""
    return any(any(folder.glob(pattern)) for pattern in _WEIGHTS) and not has_half_a_student(folder)


def refuse_used(folder: Path, *, resuming: bool = False) -> None:
    """Refuse to start where another run left something.

    Args:
        folder: of the run.
        resuming: whether the run would have gone on with it, and cannot.

    Raises:
        SGOPDConfigError: names what is there, and the ways out.
    """
    checkpoints = [path.name for path in checkpoints_of(folder)]
    if not checkpoints and not has_student(folder):
        return
    states = {
        "finished": "a run that has finished",
        "running": "a run that was ended",
        "stopped": "a run that stopped",
    }
    run = states.get(read_json(folder / RUN_FILE).get("state", ""), "another run")
    what = f"checkpoints up to {checkpoints[0]}" if checkpoints else "the student"
    go_on = "" if resuming else " or `resume_from_checkpoint: true` to go on with that run;"
    nothing = " Nothing there can be gone on from." if resuming else ""
    raise SGOPDConfigError(
        f"`output_dir` must be a folder without another run, got {str(folder)!r}, which has {what} of {run}.{nothing} "
        f"A new run would leave a mixture of both. Set another folder;{go_on} or `overwrite_output_dir: true` to "
        "replace it."
    )


# --- the folder of this run ------------------------------------------------------------------------------------------
_OWNED: dict[Path, "RunFolder"] = {}


@contextmanager
def owned(args: Any, **more: Any) -> Iterator["RunFolder"]:
    """The folder of a run, which no other run may use meanwhile; all processes must enter it.

    Inside a command that owns the folder already, it is the command's: what begins and ends there is one run.

    Args:
        args: the configuration of the run, with the `FolderFields`.
        more: what makes the run beside its settings, see `settings_identity`.

    Raises:
        SGOPDConfigError: another process uses it, or a machine has one of its own; on every process.
    """
    path = Path(str(args.output_dir)).absolute()
    if path in _OWNED:
        yield _OWNED[path]
        return
    folder = RunFolder(path, overwrite=args.overwrite_output_dir, allowed=args.allow_changed or (), more=more)
    folder.lock()
    _OWNED[path] = folder
    try:
        if args.save_strategy != SaveStrategy.NO:
            check_shared(path)
        yield folder
        folder.close("finished")
    except BaseException:
        folder.close("stopped")
        raise
    finally:
        del _OWNED[path]
        folder.unlock()


def is_owned(args: Any) -> bool:
    """Whether a command owns the folder of a run, and has looked at its checkpoints already."""
    return Path(str(args.output_dir)).absolute() in _OWNED


class RunFolder:
    """A folder that a run owns, with its `run.json`.

    Args:
        path: absolute.
        overwrite: whether what another run left may be deleted.
        allowed: names of settings that may differ from a checkpoint's.
        more: what makes the run beside its settings.
    """

    def __init__(self, path: Path, *, overwrite: bool, allowed: Collection[str], more: Identity) -> None:
        self.path, self.overwrite, self.allowed, self.more = path, overwrite, allowed, more
        self.identity: Identity = {}
        self._facts: dict[str, Any] = {}
        self._compared: set[str] | None = None
        self._lock = FolderLock(path)
        self._main = PartialState().is_main_process

    def lock(self) -> None:
        """See `owned`."""

        def take() -> None:
            try:
                self._lock.acquire()
            except OSError as error:
                logger.warning("Nothing keeps another run out of %s: %s.", self.path, error)

        self._agreed(take)

    def unlock(self) -> None:
        """Let go of the folder."""
        self._lock.release()

    def decide(self, args: Any, resume: Path | bool, *, again: bool = False) -> Start:
        """How the run starts, from what is there and from the settings alone; nothing is changed.

        Checkpoints that are not whole are passed over with a warning; one that is named is refused.

        Args:
            args: the configuration of the run.
            resume: see `read_resume`.
            again: whether what is in the folder is this run's own, of an earlier call.

        Raises:
            SGOPDConfigError: the folder is used, or its run is another one; on every process.
            CheckpointError: a checkpoint that is named is not whole.
        """
        settings = settings_identity(args, **self.more)
        for name in _COMPLETED_LATER - self.more.keys():
            settings.pop(name, None)
        start = self._start(settings, resume, again)
        self._compared = set(settings)
        return start

    def begin(self, identity: Identity, resume: Path | bool, *, again: bool = False) -> Start:
        """Start the run: compare all that makes it, and say in `run.json` that it runs.

        Args:
            identity: of the run.
            resume: see `read_resume`.
            again: see `decide`.

        Raises:
            SGOPDConfigError: as of `decide`.
        """
        self.identity = identity | self.more
        # Where the settings have decided how to start, what is there is ours; data and models are left to compare.
        left = {name: value for name, value in self.identity.items() if name not in (self._compared or ())}
        start = self._start(left, resume, again or self._compared is not None)
        if not start.finished:
            if self.overwrite and self._main:
                self._clear(start.checkpoint)
            self.record("running")
        return start

    def note(self, **facts: Any) -> None:
        """Remember what `run.json` says next time."""
        self._facts |= facts

    def record(self, state: str, **facts: Any) -> None:
        """Write `run.json`: the state, and what is known of the run besides."""
        self.note(**facts)
        if self._main:
            content = {**self._facts, "state": state, "identity": self.identity}
            write_atomically(self.path / RUN_FILE, json.dumps(content, indent=1) + "\n")

    def close(self, state: str) -> None:
        """The last word about the run, if it has begun. A disk that is full costs no more than that."""
        if not self.identity or read_json(self.path / RUN_FILE).get("state") == "finished":
            return
        try:
            self.record(state)
        except OSError as error:
            logger.warning("%s does not say that its run is %s: %s", self.path / RUN_FILE, state, error)

    # --- how a run starts ----------------------------------------------------------------------------------------
    def _start(self, identity: Identity, resume: Path | bool, again: bool) -> Start:
        check_same(identity)

        def look() -> Start:
            if isinstance(resume, Path):
                return self._from_given(identity, resume, again)
            if resume:
                return self._from_newest(identity)
            if not again and not self.overwrite:
                refuse_used(self.path)
            return Start()

        return self._agreed(look)

    def _from_given(self, identity: Identity, checkpoint: Path, again: bool) -> Start:
        own = checkpoint.absolute().parent == self.path
        if own and self.overwrite:
            raise SGOPDConfigError(
                f"`overwrite_output_dir=True` is not supported with a checkpoint of that folder, got {checkpoint}, "
                "which would be deleted. Leave `overwrite_output_dir` out."
            )
        if not own and not again and not self.overwrite:
            refuse_used(self.path)
        if self._compared is None:
            check_checkpoint(checkpoint)
        self._compare(identity, checkpoint)
        later = [path.name for path in checkpoints_of(self.path) if own and step_of(path) > step_of(checkpoint)]
        if later:
            logger.warning("The run goes on from %s; %s are replaced as it comes to them.", checkpoint, later)
        return Start(checkpoint)

    def _from_newest(self, identity: Identity) -> Start:
        run, newest = read_json(self.path / RUN_FILE), newest_whole_checkpoint(self.path)
        if run.get("state") == "finished" and compare(run.get("identity", {}), identity, str(self.path), self.allowed):
            if newest is not None and step_of(newest) == run.get("steps"):
                return Start(newest, finished=True)
            if has_student(self.path):
                return Start(None, finished=True)
        if newest is None:
            # What a run that was killed before its first checkpoint saved is its own, and replaced by the same.
            if run.get("state") not in ("running", "stopped"):
                refuse_used(self.path, resuming=True)
            return Start()
        self._compare(identity, newest)
        return Start(newest)

    def _compare(self, identity: Identity, checkpoint: Path) -> None:
        stored = stored_identity(checkpoint)
        if stored is None:
            logger.warning("%s does not say which run it is of: its settings are not compared.", checkpoint)
        else:
            compare(stored, identity, str(checkpoint), self.allowed)

    def _clear(self, kept: Path | None) -> None:
        """Delete another run's checkpoints, of which none may be taken for this run's."""
        for path in checkpoints_of(self.path):
            if path != kept:
                logger.warning("%s is deleted: overwrite_output_dir.", path)
                shutil.rmtree(path)

    def _agreed(self, action: Callable[[], Any]) -> Any:
        """What the main process finds, on every process; its refusal is everybody's, so that all of them end."""
        outcome: list[Any] = [None]
        if self._main:
            try:
                outcome[0] = action()
            except SGOPDError as error:
                outcome[0] = error
        broadcast_object_list(outcome)
        if isinstance(outcome[0], SGOPDError):
            raise outcome[0]
        return outcome[0]
