"""Prefetching from a teacher server changes nothing: the run is the one that waits, and so are its errors."""

import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    changed_weights,
    copied_weights,
    logged,
    tiny_data,
    tiny_model,
)
from trainer.test_several_teachers import data as routed_data
from transformers import TrainerCallback

from sg_opd_trl import ServerTeacher, TeacherError
from sg_opd_trl.teacher_sampling.callback import prompt_stream
from teachers.fake_server import FakeServer
from teachers.http_cases import under_way, wait_until
from teachers.overlap_cases import (
    ROLLOUTS,
    ROWS,
    TOPK,
    Finished,
    Gate,
    Waiting,
    Written,
    scoring,
    writing,
)
from teachers.test_server import Outage


@pytest.fixture(autouse=True)
def nothing_is_under_way_any_more(server: FakeServer) -> Iterator[None]:
    yield
    wait_until(lambda: not under_way() and not server.at_a_time)


def assert_same(folder: Path, server: FakeServer, **given: Any) -> Finished:
    """A run is the one that waits for every answer, and sends the same requests, each once."""
    waiting = Finished(folder / "waiting", server, Waiting, **given).train()
    wanted = waiting.facts(server)
    ahead = Finished(folder / "ahead", server, ServerTeacher, **given).train()
    assert ahead.facts(server) == wanted
    assert changed_weights(ahead.trainer.model, copied_weights(waiting.trainer.model)) == []
    assert len(wanted["logs"]["loss"]) == len(ahead.recorder.steps) == 2
    for left, right in zip(ahead.recorder.steps, waiting.recorder.steps, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in right)
    return ahead


# --- the result ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("order", "settings"),
    [
        (1, {}),
        (2, {}),
        (3, {"seed": 7, "distillation_mode": "topk_logits"} | TOPK),
        (4, {"seed": 8, "distillation_mode": "asymmetric", "teacher_num_generations": 2} | TOPK),
        (5, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "mask_truncated_completions": True}),
        (6, {"special_token_mask": ["<eos>", "1"], "special_token_mask_scope": "all"}),
        (7, {"teacher_sampling_time_separated": True, "teacher_sampling_phase1_end_frac": 0.5}),
    ],
    ids=["one order", "another", "topk", "asymmetric", "truncated", "special tokens", "time separated"],
)
def test_neither_prefetching_nor_the_order_of_arrival_changes_anything(
    tmp_path: Path, server: FakeServer, order: int, settings: dict
) -> None:
    server.delay = lambda request: zlib.crc32(f"{order}{request}".encode()) % 5 * 0.01
    run = assert_same(tmp_path, server, settings=settings)
    assert run.trainer.teacher.tokens_generated > 0
    assert run.trainer.teacher.tokens_scored > 0
    every = order < 5
    assert (len(scoring(server)) == 2 * ROWS) is every, "rows that are not scored do occur in the others"


def test_several_teachers_one_of_them_here_and_prompts_of_their_own(tmp_path: Path, server: FakeServer) -> None:
    run = assert_same(
        tmp_path,
        server,
        route=lambda teacher: {"math": teacher, "code": tiny_model(3)},
        train_dataset=routed_data(private=True),
        settings={"teacher_sampling_ratio": 0.75},
    )
    second = routed_data(private=True).select(prompt_stream(run.trainer).between(6, 12))["teacher_id"]
    assert 0 < second.count("math") < len(writing(server)) < 12, "the server writes for both steps, and not all"
    assert 0 < len(scoring(server)) < 2 * ROWS


def test_rows_that_draw_random_numbers_when_they_are_read(tmp_path: Path, server: FakeServer) -> None:
    def draw(rows: dict) -> dict:
        torch.rand(1)
        return rows

    assert_same(tmp_path, server, train_dataset=tiny_data().with_transform(draw))


def test_a_cache_stores_the_same_and_only_what_it_lacks_is_asked(tmp_path: Path, server: FakeServer) -> None:
    stored = []
    for teacher in (Waiting, ServerTeacher):
        path = tmp_path / teacher.__name__
        for steps in (1, 3, 3):
            given = {"max_steps": steps, "teacher_rollouts_path": str(path)}
            Finished(tmp_path, server, teacher, settings=given).train()
            assert len(writing(server)) == {1: ROLLOUTS, 3: 2 * ROLLOUTS}[steps] * (len(stored) % 3 < 2)
            stored.append(
                sorted(line for file in path.glob("rollouts-*.jsonl") for line in file.read_text().splitlines())
            )
    assert stored[:3] == stored[3:]
    assert len(stored[-1]) == 3 * ROLLOUTS


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, server: FakeServer) -> None:
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = Finished(tmp_path / "run", server, ServerTeacher, settings=saving).train()
    resumed = Finished(tmp_path / "again", server, ServerTeacher, settings=saving)
    resumed.trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert changed_weights(resumed.trainer.model, copied_weights(straight.trainer.model)) == []
    for name in ("anchor/loss", "teacher/scored_tokens", "teacher/generated_tokens"):
        assert logged(resumed.trainer, name) == logged(straight.trainer, name), name
    assert len(writing(server)) == 2 * ROLLOUTS


def test_a_server_restarted_meanwhile_loses_nothing(tmp_path: Path, server: FakeServer) -> None:
    steady = Finished(tmp_path, server, Waiting).train()
    # The rollouts of the second step are under way when the server goes; it answers them once it is back.
    gone = server.released
    server.delay = lambda request: (
        0.0 * gone.wait(120) if len(writing(server)) > ROLLOUTS and "seed" in request else 0.0
    )
    outage = Outage(server, lambda: len(writing(server)) == 2 * ROLLOUTS)
    shaken = Finished(tmp_path, server, ServerTeacher, callbacks=[outage]).train()
    assert logged(shaken.trainer, "loss") == logged(steady.trainer, "loss")
    assert logged(shaken.trainer, "teacher/generated_tokens") == logged(steady.trainer, "teacher/generated_tokens")
    assert len(writing(server)) > 2 * ROLLOUTS, "they were sent again"


# --- failures --------------------------------------------------------------------------------------------------------
def test_an_error_comes_with_the_step_that_needs_the_answer(tmp_path: Path, server: FakeServer) -> None:
    def spoil(path: str, request: dict, answer: dict) -> None:
        if "seed" in request and len(writing(server)) > ROLLOUTS:
            answer["choices"][0].pop("token_ids")

    server.change = spoil
    run = Finished(tmp_path, server, ServerTeacher)
    with pytest.raises(TeacherError, match="a completion without `token_ids`"):
        run.train()
    assert run.trainer.state.global_step == len(run.recorder.steps) == 1
    assert [len(call) for call in run.verifier.calls] == [ROLLOUTS, ROWS]


def test_an_error_of_a_score_updates_nothing(tmp_path: Path, server: FakeServer) -> None:
    def spoil(path: str, request: dict, answer: dict) -> None:
        if "prompt_logprobs" in request and len(scoring(server)) > 0:
            answer["choices"][0]["prompt_logprobs"] = []

    server.change = spoil
    run = Finished(tmp_path, server, ServerTeacher)
    before = copied_weights(run.trainer.model)
    with pytest.raises(TeacherError, match=r"got 0 log-probs for \d+ tokens"):
        run.train()
    assert changed_weights(run.trainer.model, before) == run.recorder.steps == []
    assert len(run.verifier.calls[-1]) == ROWS, "not before the scores are needed"


def stop(control: Any) -> None:
    control.should_training_stop = True


def fail(control: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", [stop, fail])
def test_what_nobody_will_take_is_stopped(tmp_path: Path, server: FakeServer, end: Callable[[Any], None]) -> None:
    gate = Gate(server)

    class End(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wait_until(lambda: len(writing(server)) == 2 * ROLLOUTS)
            assert under_way()
            end(control)

    run = Finished(tmp_path, server, ServerTeacher, callbacks=[End()])
    if end is fail:
        with pytest.raises(KeyboardInterrupt):
            run.train()
    else:
        run.train()
    wait_until(lambda: not under_way())
    assert not gate.opened.is_set()
    gate.opened.set()


def test_scores_that_nobody_will_take_are_stopped(tmp_path: Path, server: FakeServer) -> None:
    """Also where no run ends: an evaluation on its own."""
    held = threading.Event()

    def give_up() -> None:
        wait_until(lambda: len(scoring(server)) == ROWS)
        raise KeyboardInterrupt

    given = {"verifier": Written(give_up), "eval_dataset": tiny_data().select([0, 1])}
    given["settings"] = {"eval_with_teacher": True, "per_device_eval_batch_size": 8, "num_generations_eval": 4}
    run = Finished(tmp_path, server, ServerTeacher, **given)
    server.delay = lambda request: 0.0 * held.wait(120)
    with pytest.raises(KeyboardInterrupt):
        run.trainer.evaluate()
    wait_until(lambda: not under_way())
    held.set()
