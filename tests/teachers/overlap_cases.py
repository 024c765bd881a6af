"""What the tests of prefetching share: a teacher that never does, recorded runs, and a gate for rollouts."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import (
    ANCHOR,
    GradientRecorder,
    logged,
    parity_verifier,
    tiny_trainer,
)
from transformers import TrainerCallback

from sg_opd_trl import ServerTeacher
from teachers.fake_server import FakeServer

# Two student prompts of four rollouts and two teacher prompts a step.
SETTINGS = ANCHOR | {
    "teacher_sampling_ratio": 0.5,
    "max_completion_length": 8,
    "teacher_sampling_filter_correct": False,
}
ROLLOUTS, ROWS = 2, 8
TOPK = {"distillation_topk": 4}


class Waiting(ServerTeacher):
    """Begins nothing ahead of time, as teachers that cannot."""

    prefetch_rollouts = prefetch_scores = None  # type: ignore[assignment]


class Written:
    """A verifier that keeps the completions of its calls, those of the teacher's rollouts among them."""

    __name__ = "written"

    def __init__(self, on_student_rows: Callable[[], Any] = lambda: None) -> None:
        self.calls: list[list[list[int]]] = []
        self.on_student_rows = on_student_rows

    def __call__(self, completion_ids: list[list[int]], **given: Any) -> list[float]:
        self.calls.append(completion_ids)
        if len(completion_ids) == ROWS:
            self.on_student_rows()
        return parity_verifier([], completion_ids)


def scoring(server: FakeServer) -> list[dict]:
    """Requests for scores, but for those of the checks before the run."""
    return [request for request in server.completions if "prompt_logprobs" in request][1:]


def writing(server: FakeServer) -> list[dict]:
    return [request for request in server.completions if "seed" in request]


class Finished:
    """A run, and all that must not depend on when anything was asked."""

    def __init__(self, folder: Path, server: FakeServer, teacher: type[ServerTeacher], **given: Any) -> None:
        server.requests.clear()
        self.recorder, self.verifier = GradientRecorder(), given.pop("verifier", None) or Written()
        prepare = given.pop("prepare", lambda trainer: None)
        callbacks = [self.recorder, *given.pop("callbacks", [])]
        limits = given.pop("limits", {"timeout": 120.0})
        route = given.pop("route", lambda teacher: teacher)
        given["settings"] = SETTINGS | given.get("settings", {})
        self.trainer = given.pop("build", tiny_trainer)(
            folder,
            teacher_model=route(teacher(server.url, **limits)),
            teacher_processing_class=None,
            reward_funcs=self.verifier,
            callbacks=callbacks,
            **given,
        )
        prepare(self.trainer)

    def train(self) -> "Finished":
        self.trainer.train()
        return self

    def facts(self, server: FakeServer) -> dict:
        names = (
            "loss",
            "grad_norm",
            "anchor/loss",
            "anchor/tokens",
            "teacher/scored_tokens",
            "teacher/generated_tokens",
        )
        return {
            "logs": {name: logged(self.trainer, name) for name in names},
            "completions": self.verifier.calls,
            "requests": sorted(json.dumps(request, sort_keys=True) for request in server.completions),
        }


class Gate:
    """Holds back the teacher's rollouts of the second step until it is opened."""

    def __init__(self, server: FakeServer) -> None:
        self.opened, self.in_time, self.server = threading.Event(), [], server
        server.delay = self.hold

    def hold(self, request: dict) -> float:
        if "seed" in request and len(writing(self.server)) > ROLLOUTS:
            self.in_time.append(self.opened.wait(120))
        return 0.0


class AtTheFirstGradient(TrainerCallback):
    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.action()
