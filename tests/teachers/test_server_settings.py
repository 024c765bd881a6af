"""`ServerTeacher`: what it refuses before the first step."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tiny import (
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
)

from sg_opd_trl import ServerTeacher, SGOPDConfigError, TeacherError
from teachers.fake_server import SECRET, FakeServer, send
from teachers.model_server import by_url, model_server, refused


# --- refused before the first step -----------------------------------------------------------------------------------
def test_settings_that_a_server_cannot_serve(tmp_path: Path, server: FakeServer) -> None:
    refused(
        *(tmp_path, server.url, SGOPDConfigError, r"`temperature=0\.7` is not supported.*Set temperature=1"),
        settings={"temperature": 0.7},
    )
    with pytest.raises(SGOPDConfigError, match=r"`temperature=0\.7` is not supported with a teacher server"):
        tiny_trainer(tmp_path, settings={"temperature": 0.7}, teacher_model=ServerTeacher(server.url))
    refused(
        *(tmp_path, server.url, SGOPDConfigError, r"`distillation_mode='full_logits'` is not supported.*topk_logits"),
        settings={"distillation_mode": "full_logits"},
    )
    refused(
        *(tmp_path, server.url, SGOPDConfigError, r"`generation_kwargs` must hold .*got \['typical_p'\]"),
        settings={"generation_kwargs": {"typical_p": 0.9}},
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"teacher_max_retries": 3}, "`teacher_max_retries` must go with `teacher_model_server_url`, got 3"),
        ({"teacher_request_timeout": 1.0}, r"`teacher_request_timeout` must go with .*got 1\.0"),
        ({"teacher_model_server_url": "http://a", "teacher_max_retries": -1}, "must be a whole number of at least 0"),
        ({"teacher_model_server_url": "http://a", "teacher_request_timeout": 0}, r"must be a number in \(0, inf\)"),
        ({"teacher_model_server_url": "a:8000"}, "must be made of http or https URLs, got 'a:8000'"),
    ],
)
def test_refused_settings(tmp_path: Path, settings: dict, said: str) -> None:
    with pytest.raises(SGOPDConfigError, match=said):
        tiny_config(tmp_path, **settings)


def test_a_list_of_replicas_on_a_command_line(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, teacher_model_server_url='["http://a", "http://b"]')
    assert config.teacher_model_server_url == ["http://a", "http://b"]


def test_more_log_probs_than_the_server_allows(tmp_path: Path, server: FakeServer) -> None:
    def behave(handler: Any, path: str) -> bool:
        if path != "/v1/completions":
            return False
        said = "Requested prompt logprobs of 32, which is greater than max allowed: 20"
        return send(handler, 400, json.dumps({"error": {"message": said}}).encode())

    server.behave = behave
    refused(
        *(tmp_path, server.url, SGOPDConfigError, r"`distillation_topk` must not exceed.*got 22.*--max-logprobs -1"),
        settings={"distillation_mode": "topk_logits", "distillation_topk": 22},
    )


def test_a_context_that_is_too_short(tmp_path: Path) -> None:
    with model_server(tiny_model(1), max_length=12) as server:
        refused(tmp_path, server.url, SGOPDConfigError, r"must take 18 tokens.*got 12.*--max-model-len 18")


def test_another_tokenizer(tmp_path: Path, server: FakeServer) -> None:
    server.tokenize = lambda text: [7, *tiny_tokenizer()(text)["input_ids"]]
    refused(tmp_path, server.url, TeacherError, r"tokenizer must be the student's.*from token 0 on")
    server.tokenize = lambda text: [SECRET, *tiny_tokenizer()(text)["input_ids"]]  # type: ignore[list-item]
    refused(tmp_path, server.url, TeacherError, rf"(?!.*{SECRET}).*got token ids that are no numbers at /tokenize")


def test_a_server_that_does_not_tell_its_tokenizer(
    tmp_path: Path, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.tokenize = None
    by_url(tmp_path, server.url)
    assert "is taken on trust" in caplog.text
    caplog.clear()
    by_url(tmp_path, server.url, teacher_processing_class=tiny_tokenizer())
    assert "is taken on trust" not in caplog.text
    other = tiny_tokenizer("1023456789+=abcdefgh ")
    refused(tmp_path, server.url, TeacherError, "got 2 differences", teacher_processing_class=other)


def test_logits_instead_of_log_probs(tmp_path: Path, server: FakeServer) -> None:
    server.logps = lambda ids: [[-0.1] * 26 for _ in ids]
    refused(
        *(tmp_path, server.url, TeacherError, r"must send log-probs.*--logprobs-mode processed_logprobs"),
        settings={"distillation_mode": "topk_logits", "distillation_topk": 4},
    )


def test_replicas_with_different_weights(tmp_path: Path, server: FakeServer) -> None:
    with model_server(tiny_model(2)) as other:
        refused(tmp_path, [server.url, other.url], TeacherError, "must serve one model, got log-probs .* that differ")


def test_another_model_than_the_one_named(tmp_path: Path, server: FakeServer) -> None:
    named = {"teacher_model_name_or_path": "another"}
    refused(tmp_path, server.url, TeacherError, "must serve 'another', got another one", settings=named)


def test_advice_on_the_dead_zone(tmp_path: Path, server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        by_url(tmp_path, server.url)
        assert "`gate_dead_zone`=0.0001 is below" in caplog.text
        caplog.clear()
        by_url(tmp_path, server.url, settings={"gate_dead_zone": 0.05})
        by_url(tmp_path, server.url, settings={"sign_gated_extrapolation": False})
    assert "`gate_dead_zone`" not in caplog.text
