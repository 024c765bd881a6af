"""Whatever ends a run: what was trained until then is kept, and the run goes on as if nothing had been."""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from teachers.fake_server import FakeServer
from teachers.model_server import by_url, model_server
from tiny import changed_weights, copied_weights, logged, tiny_data, tiny_model, tiny_trainer
from torch.distributed.elastic.multiprocessing.api import _terminate_process_handler
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from sg_opd_trl import NonFiniteError, TeacherError, VerifierError
from sg_opd_trl.checkpoints import check_checkpoint
from sg_opd_trl.ending import Stopped

SETTINGS = {
    **{"max_steps": 4, "save_strategy": "steps", "save_steps": 100, "learning_rate": 1e-2},
    **{"teacher_sampling_phase1_end_frac": 1.0, "teacher_sampling_phase2_end_frac": 1.0},
    **{"teacher_request_timeout": 2.0, "teacher_max_retries": 0},
}


class EndAfter(TrainerCallback):
    """The server is gone once a step has ended."""

    def __init__(self, server: FakeServer, step: int) -> None:
        self.server, self.step = server, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.server.stop()


def run(folder: Path, url: str, callbacks: list | None = None, checkpoint: str | None = None, **settings: Any) -> Any:
    trainer = by_url(folder, url, settings=SETTINGS | settings, callbacks=callbacks or [])
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize("anchor", [True, False], ids=["anchor", "no anchor"])
def test_the_run_goes_on_from_its_last_finished_step(
    tmp_path: Path, anchor: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Losses, weights and counts are those of the run that nothing happened to."""
    settings = {"teacher_sampling_enable": anchor}
    server = model_server(tiny_model(1)).start()
    whole = run(tmp_path / "whole", server.url, **settings)
    assert not list((tmp_path / "whole").glob("checkpoint-2"))
    with pytest.raises(TeacherError), caplog.at_level(logging.WARNING):
        run(tmp_path / "cut", server.url, [EndAfter(server, 2)], **settings)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert f"Its 2 finished steps are in {checkpoint}: continue with resume_from_checkpoint=" in caplog.text
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["num_input_tokens_seen"] == logged(whole, "num_tokens")[1]
    if anchor:
        # What the third step had begun is not counted.
        assert state["stateful_callbacks"]["TeacherAnchorCallback"]["attributes"]["rollouts"] == 2

    server.start()
    resumed = run(tmp_path / "cut", server.url, checkpoint=str(checkpoint), **settings)
    server.stop()
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert logged(resumed, "num_tokens") == logged(whole, "num_tokens")
    assert logged(resumed, "teacher/scored_tokens")[2:] == logged(whole, "teacher/scored_tokens")[2:]
    for left, right in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(left, right)


class BadAfter(EndAfter):
    """The server sends something else than log-probs once a step has ended."""

    def __init__(self, server: FakeServer, step: int, logp: Any) -> None:
        super().__init__(server, step)
        self.logp = logp

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.server.change = self.broken

    def broken(self, path: str, request: dict, answer: Any) -> None:
        if request.get("prompt_logprobs") is not None:
            for entries in answer["choices"][0]["prompt_logprobs"][1:]:
                entries.update({token: {"logprob": self.logp} for token in entries})


@pytest.mark.parametrize(
    "logp",
    [float("nan"), float("inf"), -9999.0, 0.7, 10**400, "-1"],
    ids=["NaN", "inf", "-9999", "0.7", "400 digits", "text"],
)
def test_log_probs_that_are_none_leave_the_last_finished_step(tmp_path: Path, logp: Any) -> None:
    with model_server(tiny_model(1)) as server, pytest.raises(TeacherError, match="othing was updated"):
        run(tmp_path, server.url, [BadAfter(server, 1, logp)], teacher_sampling_enable=False)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_teacher_in_this_process_that_becomes_nan_leaves_the_last_finished_step(tmp_path: Path) -> None:
    teacher = tiny_model(1)

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                teacher.lm_head.weight.fill_(float("nan"))

    settings = SETTINGS | {"teacher_sampling_enable": False}
    for name in ("teacher_request_timeout", "teacher_max_retries"):
        del settings[name]
    trainer = tiny_trainer(tmp_path, settings=settings, teacher_model=teacher, callbacks=[Break()])
    with pytest.raises(NonFiniteError, match="Nothing was updated"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("settings", "step", "kept"),
    [({"save_strategy": "no"}, 2, []), ({}, 0, []), ({"save_steps": 2}, 2, ["checkpoint-2"])],
    ids=["the run keeps none", "no step has finished", "it is there"],
)
def test_nothing_is_written_where_there_is_nothing_to_keep(
    tmp_path: Path, settings: dict, step: int, kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = model_server(tiny_model(1)).start()
    trainer = by_url(tmp_path, server.url, settings=SETTINGS | settings, callbacks=[EndAfter(server, step)])
    if step == 0:
        server.stop()
    written: list[int] = []
    monkeypatch.setattr(trainer, "save_checkpoint", lambda: written.append(trainer.state.global_step))
    with pytest.raises(TeacherError):
        trainer.train()
    assert written == []
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == kept


class Patience(TrainerCallback, ExportableState):
    """Counts evaluations."""

    evaluations = 0

    def state(self) -> dict:
        return {"args": {}, "attributes": {"evaluations": self.evaluations}}

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluations += 1


def test_a_folder_of_another_run_is_not_taken_for_this_runs_checkpoint(tmp_path: Path) -> None:
    """And what an evaluation after the last step has counted is in it."""
    other = tmp_path / "checkpoint-2"

    class Foreign(TrainerCallback):
        # After the run has begun: a folder that has it before is refused.
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            other.mkdir(exist_ok=True)
            (other / "trainer_state.json").write_text("{}", encoding="utf-8")

    server, patience = model_server(tiny_model(1)).start(), Patience()
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "num_generations_eval": 4}
    trainer = by_url(
        *(tmp_path, server.url),
        settings=SETTINGS | evaluated,
        callbacks=[EndAfter(server, 2), patience, Foreign()],
        eval_dataset=tiny_data().select([0]),
    )
    with pytest.raises(TeacherError):
        trainer.train()
    state = json.loads((other / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 2
    assert state["stateful_callbacks"]["Patience"]["attributes"]["evaluations"] == patience.evaluations == 2


def test_a_checkpoint_that_cannot_be_written_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full() -> None:
        raise OSError("No space left on device")

    server = model_server(tiny_model(1)).start()
    trainer = by_url(tmp_path, server.url, settings=SETTINGS, callbacks=[EndAfter(server, 1)])
    monkeypatch.setattr(trainer, "save_checkpoint", full)
    with pytest.raises(TeacherError), caplog.at_level(logging.WARNING):
        trainer.train()
    assert "could not be kept in" in caplog.text
    assert "No space left" in caplog.text
    assert "continue with resume_from_checkpoint" not in caplog.text


@pytest.mark.parametrize("step", [1, 2])
def test_inside_a_generation_batch_too(tmp_path: Path, step: int) -> None:
    """What is left of the batch is in the checkpoint."""
    # Nothing is asked ahead, so that the step after the server's end fails.
    settings = {"steps_per_generation": 2, "teacher_sampling_prompts": "share"}
    server = model_server(tiny_model(1)).start()
    whole = run(tmp_path / "whole", server.url, **settings)
    with pytest.raises(TeacherError):
        run(tmp_path / "cut", server.url, [EndAfter(server, step)], **settings)
    checkpoint = str(tmp_path / "cut" / f"checkpoint-{step}")
    with model_server(tiny_model(1)) as again:
        resumed = run(tmp_path / "again", again.url, checkpoint=checkpoint, **settings)
    assert changed_weights(resumed.model, copied_weights(whole.model)) == []


# --- whatever else ends a run ----------------------------------------------------------------------------------------
class EndingVerifier:
    """Ends the run by `act` when it judges for the third time; the parity of tokens otherwise."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act, self.calls, self.__name__ = act, 0, "ending_verifier"

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> Any:
        self.calls += 1
        answer = self.act() if self.calls == 3 else None
        return [float((len(ids) + ids[0]) % 2 == 0) for ids in completion_ids] if answer is None else answer


def fail(error: BaseException) -> None:
    raise error


ENDS: dict[str, tuple[Callable[[], Any], type[BaseException]]] = {
    "raises": (lambda: fail(ZeroDivisionError("in the verifier")), ZeroDivisionError),
    "another number": (lambda: [1.0], ValueError),
    "text": (lambda: ["right"] * 8, Exception),
    "a half": (lambda: [0.5] * 8, VerifierError),
    "sys.exit": (lambda: sys.exit(3), SystemExit),
    "no memory": (lambda: fail(MemoryError()), MemoryError),
    "Ctrl-C": (lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt),
    "SIGTERM": (lambda: os.kill(os.getpid(), signal.SIGTERM), Stopped),
}
LOCAL = {"max_steps": 4, "save_strategy": "steps", "save_steps": 100, "learning_rate": 1e-2}
LOCAL |= {"teacher_sampling_enable": False}


@pytest.mark.parametrize("end", ENDS)
def test_whatever_a_verifier_does_the_last_finished_step_is_kept(
    tmp_path: Path, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    act, kind = ENDS[end]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    trainer = tiny_trainer(tmp_path / "cut", settings=LOCAL, reward_funcs=EndingVerifier(act))
    with pytest.raises(kind) as caught, caplog.at_level(logging.WARNING):
        trainer.train()
    name = "SIGTERM" if end == "SIGTERM" else type(caught.value).__name__
    assert (
        f"The run was ended by {name}. Its 2 finished steps are in {tmp_path / 'cut' / 'checkpoint-2'}" in caplog.text
    )
    assert {number: signal.getsignal(number) for number in before} == before
    if end == "SIGTERM":
        assert caught.value.code == 128 + signal.SIGTERM
        whole = tiny_trainer(tmp_path / "whole", settings=LOCAL, reward_funcs=EndingVerifier(lambda: None))
        whole.train()
        resumed = tiny_trainer(tmp_path / "again", settings=LOCAL, reward_funcs=EndingVerifier(lambda: None))
        resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
        assert changed_weights(resumed.model, copied_weights(whole.model)) == []


@pytest.fixture
def launchers_handlers() -> Iterator[None]:
    """As after accelerate's `notebook_launcher` in the same process: torch's launcher leaves its handlers there."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, _terminate_process_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)])
def test_handlers_that_a_launcher_has_left_behind_are_nobodys(
    tmp_path: Path, launchers_handlers: None, number: int, kind: type[BaseException]
) -> None:
    verifier = EndingVerifier(lambda: os.kill(os.getpid(), number))
    trainer = tiny_trainer(tmp_path, settings=LOCAL, reward_funcs=verifier)
    with pytest.raises(kind):
        trainer.train()
    check_checkpoint(tmp_path / "checkpoint-2")
    assert signal.getsignal(number) is _terminate_process_handler


def test_a_handler_of_the_callers_is_left_alone_whatever_it_is(tmp_path: Path) -> None:
    """A bound method of a list belongs to no module."""
    before, handler = signal.getsignal(signal.SIGTERM), [].append
    signal.signal(signal.SIGTERM, handler)
    try:
        tiny_trainer(tmp_path, settings=LOCAL | {"max_steps": 1}).train()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


class SignalIn(TrainerCallback):
    """Sends SIGTERM in the middle of an update."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.send)

    def send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("event", ["on_optimizer_step"])
def test_a_signal_waits_for_the_update_that_is_under_way(tmp_path: Path, event: str) -> None:
    trainer = tiny_trainer(tmp_path / "cut", settings=LOCAL, callbacks=[SignalIn(event)])
    with pytest.raises(Stopped):
        trainer.train()
    whole = tiny_trainer(tmp_path / "whole", settings=LOCAL | {"max_steps": 1, "save_steps": 1})
    whole.train()
    kept = load_file(tmp_path / "cut" / "checkpoint-1" / "model.safetensors")
    expected = load_file(tmp_path / "whole" / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in expected.items())


def signal_while_saving(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes when the weights are written and the checkpoint is not whole yet."""
    state = trainer.checkpoint_state

    def sent() -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        return state()

    monkeypatch.setattr(trainer, "checkpoint_state", sent)


def test_a_signal_waits_for_the_checkpoint_that_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path, settings=LOCAL | {"save_steps": 1})
    signal_while_saving(trainer, monkeypatch)
    with pytest.raises(Stopped):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    check_checkpoint(tmp_path / "checkpoint-1")


def test_an_evaluation_that_fails_before_a_checkpoint_leaves_its_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = LOCAL | {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    verifier = EndingVerifier(lambda: fail(ZeroDivisionError("in the evaluation")))
    trainer = tiny_trainer(tmp_path, settings=settings, reward_funcs=verifier, eval_dataset=tiny_data(4))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "Its 2 finished steps are in" in caplog.text
    check_checkpoint(tmp_path / "checkpoint-2")


def test_a_signal_does_not_end_the_keeping_of_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = EndingVerifier(lambda: fail(ZeroDivisionError("in the verifier")))
    trainer = tiny_trainer(tmp_path, settings=LOCAL, reward_funcs=verifier)
    signal_while_saving(trainer, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    check_checkpoint(tmp_path / "checkpoint-2")


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny_trainer(tmp_path, settings=LOCAL)

    def broken() -> None:
        with torch.no_grad():
            trainer.model.lm_head.weight[3, 0] = torch.nan
        raise ZeroDivisionError

    trainer.reward_funcs = [EndingVerifier(broken)]
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "could not be kept" in caplog.text
    assert "the weights are not finite" in caplog.text
    assert list(tmp_path.glob("checkpoint-*")) == []
