"""Servers that end, come back, or have no log-probs, while real components run."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import changed_weights, copied_weights, inject_rollouts, logged
from transformers import TrainerCallback

from real_vllm.serving import NEEDS_VLLM, Server, free_port, recipe_trainer, served_teacher
from sg_opd_trl import TeacherError
from sg_opd_trl.teachers.client import CompletionsClient
from sg_opd_trl.teachers.http import RequestLimits

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def second(teacher_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that tests may end."""
    server = served_teacher(teacher_folder, tmp_path_factory.mktemp("second") / "log.txt")
    try:
        yield server
    finally:
        server.kill()


class AfterFirstStep(TrainerCallback):
    """Does something to a server when the first step has ended."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.action()


def three_steps(folder: Path, teacher_folder: str, urls: Any, action: Any = None, **fields: Any) -> Any:
    """A trainer whose student writes the same whatever happens, and whose anchor is off."""
    given = {"per_device_train_batch_size": 16, "max_steps": 3, "teacher_sampling_enable": False}
    trainer = recipe_trainer(
        folder,
        teacher_model_name_or_path=teacher_folder,
        teacher_model_server_url=urls,
        **(given | fields),
    )
    vocabulary = len(trainer.tokenizer)
    inject_rollouts(trainer, lambda prompt, row: [5 + (row * k + sum(prompt)) % (vocabulary - 5) for k in range(12)])
    if action is not None:
        trainer.add_callback(AfterFirstStep(action))
    return trainer


@pytest.fixture(scope="module")
def undisturbed(server: Server, teacher_folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    trainer = three_steps(tmp_path_factory.mktemp("undisturbed"), teacher_folder, server.url)
    trainer.train()
    return logged(trainer, "loss")


def test_a_server_restarted_while_the_run_waits_loses_nothing(
    tmp_path: Path, second: Server, teacher_folder: str, undisturbed: list[float]
) -> None:
    second.start().wait()

    def restart() -> None:
        second.kill()
        second.start()

    trainer = three_steps(tmp_path, teacher_folder, second.url, restart)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(undisturbed, abs=1e-4)
    assert len(undisturbed) == 3


def test_a_server_that_hangs_ends_the_run_in_time(tmp_path: Path, second: Server, teacher_folder: str) -> None:
    second.start().wait()
    trainer = three_steps(tmp_path, teacher_folder, second.url, teacher_request_timeout=5, teacher_max_retries=1)
    before: dict[str, Any] = {}

    def hang() -> None:
        second.signal(signal.SIGSTOP)
        before.update(weights=copied_weights(trainer.model), time=time.monotonic())

    trainer.add_callback(AfterFirstStep(hang))
    try:
        with pytest.raises(TeacherError, match="`teacher_request_timeout`=5"):
            trainer.train()
        # Once ahead of the step and once by the step, two seconds of grace, and what the student does until it asks.
        assert time.monotonic() - before["time"] < 20
    finally:
        second.signal(signal.SIGCONT)
    assert changed_weights(trainer.model, before["weights"]) == []


def test_a_killed_replica_is_replaced_by_the_other(
    tmp_path: Path, server: Server, second: Server, teacher_folder: str, undisturbed: list[float]
) -> None:
    second.start().wait()
    trainer = three_steps(tmp_path, teacher_folder, f'["{second.url}", "{server.url}"]', second.kill)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(undisturbed, abs=1e-4)


# --- a server without log-probs --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def without_logprobs(teacher_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of transformers, which answers completions and leaves out what was asked about log-probs."""
    folder, port = tmp_path_factory.mktemp("transformers"), free_port()
    (folder / "hub").mkdir()
    words = ["transformers.cli.transformers", "serve", teacher_folder]
    words += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    server = Server(words, folder / "log.txt", port, HF_HOME=str(folder), HF_HUB_OFFLINE="1").start()
    try:
        yield server.wait()
    finally:
        server.kill()


def test_it_is_refused_before_the_run(tmp_path: Path, without_logprobs: Server, teacher_folder: str) -> None:
    with pytest.raises(TeacherError, match="`teacher_model_server_url`"):
        three_steps(tmp_path, teacher_folder, without_logprobs.url, teacher_request_timeout=20)


def test_its_answers_are_refused(without_logprobs: Server, teacher_folder: str) -> None:
    client = CompletionsClient([without_logprobs.url], RequestLimits(timeout=30, max_retries=0))
    client.model, client._names = teacher_folder, frozenset({teacher_folder, f"{teacher_folder}@main"})
    with pytest.raises(TeacherError, match=r"`teacher_model_server_url` must name.*Serve the teacher with vLLM"):
        client.score([[5, 6, 7, 8]], [2])
