"""`ServerTeacher` over a stand-in server: what it asks, and whole runs."""

import json
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    ANCHOR,
    GradientRecorder,
    inject_rollouts,
    inject_teacher_rollouts,
    logged,
    relative_difference,
    tiny_model,
    tiny_trainer,
)
from transformers import TrainerCallback

from sg_opd_trl import LocalTeacher, ServerTeacher, SGOPDConfigError, TeacherError
from sg_opd_trl.teachers import Sampling
from teachers.fake_server import SECRET, FakeServer
from teachers.http_cases import wait_until
from teachers.model_server import by_url
from teachers.test_parity import BATCH, PROMPTS, ROWS

SAMPLING = Sampling(max_new_tokens=6, eos_token_ids=(1,), pad_token_id=0)


# --- runs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["sampled_token", "topk_logits", "asymmetric"])
def test_losses_and_gradients_are_those_of_the_teacher_in_this_process(
    tmp_path: Path, server: FakeServer, mode: str
) -> None:
    recorders, losses, counted = [], [], []
    for teacher in (None, LocalTeacher(tiny_model(1))):
        recorders.append(GradientRecorder())
        settings = ANCHOR | {"distillation_mode": mode, "distillation_topk": 4, "max_grad_norm": 1e9}
        given = {"callbacks": [recorders[-1]], "settings": settings}
        if teacher is None:
            trainer = by_url(tmp_path, server.url, **given)
        else:
            trainer = tiny_trainer(tmp_path, teacher_model=teacher, **given)
        inject_rollouts(trainer, lambda prompt, row: [5 + row, 7, 9][: 1 + row % 3])
        inject_teacher_rollouts(trainer, lambda prompt: [6, 8, 1])
        trainer.train()
        losses.append(logged(trainer, "loss"))
        counted.append(logged(trainer, "teacher/scored_tokens"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert counted[0] == counted[1]
    for left, right in zip(recorders[0].steps, recorders[1].steps, strict=True):
        assert relative_difference(left, right) < 1e-3


def test_a_run_with_rollouts_of_its_own(tmp_path: Path, server: FakeServer) -> None:
    trainer = by_url(tmp_path, server.url, settings=ANCHOR)
    trainer.train()
    asked = [request for request in server.completions if "seed" in request]
    assert len({request["seed"] for request in asked}) == len(asked) > 1
    assert trainer.teacher.tokens_generated > 0
    assert all(value == value for value in logged(trainer, "loss"))
    known = {"name": "teacher", "root": "folder/teacher", "revision": None, "dtype": "float32", "fingerprint": None}
    assert trainer.checkpoint_state()["teacher"] == known


class Outage(TrainerCallback):
    """The server is gone when the second step begins, or a moment later, and back soon."""

    def __init__(self, server: FakeServer, ready: Callable[[], bool] = lambda: True) -> None:
        self.server, self.ready = server, ready

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            wait_until(self.ready)
            self.server.stop()
            threading.Timer(0.3, self.server.start).start()


def test_a_server_restarted_during_a_run_loses_nothing(tmp_path: Path, server: FakeServer) -> None:
    losses = []
    for callbacks in ([], [Outage(server)]):
        trainer = by_url(tmp_path, server.url, callbacks=callbacks, settings=ANCHOR)
        inject_rollouts(trainer, lambda prompt, row: [5 + row, 7, 9][: 1 + row % 3])
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_a_server_that_stays_away_ends_the_run(tmp_path: Path, server: FakeServer) -> None:
    limits = {"teacher_request_timeout": 60, "teacher_max_retries": 0, "teacher_sampling_enable": False}
    trainer = by_url(tmp_path, server.url, settings=limits)
    server.stop()
    with pytest.raises(TeacherError, match=r"`teacher_request_timeout`=60.*Nothing was updated"):
        trainer.train()
    server.start()


# --- what is asked ---------------------------------------------------------------------------------------------------
@pytest.fixture
def teacher(tmp_path: Path, server: FakeServer) -> ServerTeacher:
    return by_url(tmp_path, server.url).teacher


def test_rollouts_depend_on_seed_prompt_and_sample_alone(teacher: ServerTeacher) -> None:
    prompts = [[3, 5], [3, 6], [3, 5], [3, 7]]
    first = teacher.generate(prompts, SAMPLING, 11, 100)
    assert first == teacher.generate(prompts, SAMPLING, 11, 100)
    assert first[0] != first[2], "two samples of one prompt"
    assert teacher.generate([[3, 7], [3, 5], [3, 5]], SAMPLING, 11, 100) == [first[3], first[0], first[2]]
    assert first != teacher.generate(prompts, SAMPLING, 12, 100)


def test_a_request_leaves_nothing_to_the_servers_defaults(server: FakeServer, teacher: ServerTeacher) -> None:
    sampling = Sampling(5, (1, 2), 0, top_p=0.9, top_k=7, generation_kwargs={"suppress_tokens": [4, 99], "top_p": 0.8})
    teacher.generate([[3, 5]], sampling, 1, 100)
    asked = {name: value for name, value in server.completions[-1].items() if name not in ("seed", "model", "prompt")}
    assert asked == {
        **{"n": 1, "return_token_ids": True, "max_tokens": 5, "temperature": 1.0, "top_p": 0.8, "top_k": 7},
        **{"min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [1, 2], "ignore_eos": True},
        "logit_bias": {"4": -100.0},
    }


def test_ids_of_the_teacher_alone_end_a_rollout(
    server: FakeServer, teacher: ServerTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    server.complete = lambda ids, request: [5, 6, 30, 7]
    assert teacher.generate([[3, 5]], SAMPLING, 1, 100) == [[5, 6]]
    assert "cut after 2 of 4 tokens: the next is none of the student's" in caplog.text


def test_supports_skip_ids_that_another_model_lacks(server: FakeServer, teacher: ServerTeacher) -> None:
    """Where the likeliest tokens are such ids, more are asked for."""
    found = teacher.score_support(BATCH, ROWS, 20, 3, 20)
    local = LocalTeacher(tiny_model(1))
    assert found.support_ids.max() < 20
    assert {request["prompt_logprobs"] for request in server.completions} == {1, 3, 12}
    model = local.model
    for row in ROWS.nonzero().flatten().tolist():
        prompt, completion = PROMPTS[row], BATCH.completion_ids[row][BATCH.completion_mask[row] == 1].tolist()
        with torch.no_grad():
            logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)[:, :20]
        for position in range(len(completion)):
            best = logps[len(prompt) + position - 1].topk(3)
            assert found.support_ids[row, position].tolist() == best.indices.tolist()
            torch.testing.assert_close(found.support_logps[row, position], best.values, rtol=0, atol=1e-4)
    with pytest.raises(TeacherError, match=r"must know 3 likeliest tokens.*Lower\s+`distillation_topk`"):
        teacher.score_support(BATCH, ROWS, 20, 3, 2)


def test_what_the_server_has_no_room_for_is_not_sent(server: FakeServer, teacher: ServerTeacher) -> None:
    asked = len(server.requests)
    teacher.client.max_length = 10
    with pytest.raises(SGOPDConfigError, match=r"must take 13 tokens.*got 10.*--max-model-len 13"):
        teacher.generate([[3] * 7], SAMPLING, 1, 100)
    with pytest.raises(SGOPDConfigError, match=r"must take 11 tokens"):
        row = BATCH.select(torch.tensor([2]))
        teacher.client.max_length = 10
        row.prompt_mask[:] = 1
        long = torch.full((1, 5), 3)
        teacher.score(type(row)(long, torch.ones_like(long), row.completion_ids, row.completion_mask), ROWS[:1], 100)
    assert len(server.requests) == asked


def test_ids_that_no_model_has(teacher: ServerTeacher) -> None:
    odd = BATCH.select(torch.tensor([0]))
    odd.completion_ids[0, 0] = 99
    with pytest.raises(TeacherError, match="does not exist in the teacher"):
        teacher.score(odd, ROWS[:1], 100)


def test_the_key_comes_from_the_environment(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SG_OPD_TEACHER_API_KEY", SECRET)
    trainer = by_url(tmp_path, server.url)
    assert {headers.get("Authorization") for headers in server.headers} == {f"Bearer {SECRET}"}
    assert SECRET not in json.dumps(trainer.checkpoint_state()) + str(trainer.args.to_dict()) + repr(trainer.args)
    monkeypatch.delenv("SG_OPD_TEACHER_API_KEY")
    server.headers.clear()
    by_url(tmp_path, server.url)
    assert {headers.get("Authorization") for headers in server.headers} == {None}


def test_a_key_with_a_line_end_or_worse_never_reaches_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SG_OPD_TEACHER_API_KEY", f" {SECRET}\r\n")
    with FakeServer() as server:
        ServerTeacher(server.url).client.connect(None)
        monkeypatch.setenv("SG_OPD_TEACHER_API_KEY", " \n")
        ServerTeacher(server.url).client.connect(None)
    assert [headers.get("Authorization") for headers in server.headers] == [f"Bearer {SECRET}", None]
    for odd in (f"{SECRET}\r\nX: {SECRET}", f"{SECRET}\u2026"):
        monkeypatch.setenv("SG_OPD_TEACHER_API_KEY", odd)
        with pytest.raises(
            SGOPDConfigError, match="Correct the environment variable SG_OPD_TEACHER_API_KEY"
        ) as caught:
            ServerTeacher("http://a")
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_revision_and_dtype_that_are_served_are_part_of_who_teaches(tmp_path: Path, server: FakeServer) -> None:
    named = {"teacher_model_name_or_path": "teacher", "teacher_model_revision": "v2"}
    trainer = by_url(tmp_path, server.url, settings=named | {"teacher_model_init_kwargs": {"dtype": "bfloat16"}})
    assert (trainer.teacher.identity["revision"], trainer.teacher.identity["dtype"]) == ("v2", "bfloat16")
