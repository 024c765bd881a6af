"""A stand-in for vLLM that answers from a tiny model in this process, and trainers that are taught by it."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer, tiny_trainer

from teachers.fake_server import FakeServer


def model_server(model: Any, /, **arguments: Any) -> FakeServer:
    """A server with the weights of a model, in float32, and the tiny tokenizer."""
    lock = threading.Lock()
    model.eval()

    def logps(ids: list[int]) -> list[list[float]]:
        """Row p is of the token at position p, given those before it; the first has none."""
        with torch.no_grad(), lock:
            rows = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return [rows[0].tolist(), *rows[:-1].tolist()]

    def complete(ids: list[int], request: dict) -> list[int]:
        generator = torch.Generator().manual_seed(request["seed"])
        written: list[int] = []
        while len(written) < request["max_tokens"]:
            with torch.no_grad(), lock:
                logits = model(torch.tensor([ids + written])).logits[0, -1].float()
            for token, bias in request.get("logit_bias", {}).items():
                logits[int(token)] += bias
            greedy = request["top_k"] == 1
            token = logits.argmax() if greedy else torch.multinomial(logits.softmax(-1), 1, generator=generator)
            written.append(int(token))
            if written[-1] in request["stop_token_ids"]:
                break
        return written

    def tokenize(text: str) -> list[int]:
        return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]

    return FakeServer(**({"logps": logps, "complete": complete, "tokenize": tokenize} | arguments))


def by_url(folder: Path, url: Any, *, settings: dict | None = None, **arguments: Any) -> Any:
    """A trainer whose teacher is named in the configuration."""
    given = {"teacher_model": None, "teacher_processing_class": None} | arguments
    own = {"teacher_model_server_url": url, "teacher_request_timeout": 20.0}
    return tiny_trainer(folder, settings=own | (settings or {}), **given)


def refused(folder: Path, url: Any, kind: type[Exception], said: str, **arguments: Any) -> None:
    with pytest.raises(kind, match=said):
        by_url(folder, url, **arguments)
