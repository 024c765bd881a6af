"""A stand-in of a vLLM server that holds the student, with a small model in place of the engine.

TRL's own client speaks to it over HTTP. Of the weights' way only NCCL is left out: they go through a queue, at the
moment and under the names that the client announces.
"""

import json
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
import trl.generation.vllm_client as client
import trl.generation.vllm_generation as generation
from loopback import answering
from transformers import GenerationConfig

from sg_opd_trl import config
from sg_opd_trl.models.generate import generate_completions

WAIT = 30.0  # seconds for weights that were announced


class Engine(ThreadingHTTPServer):
    """Holds a model, whose weights are what was sent last.

    Attributes:
        model: what writes.
        sent: weights on their way, each a list of names and tensors.
        called: paths of the requests, in order.
        written: prompt, completion and log-probs of every completion.
    """

    daemon_threads = True

    def __init__(self, model: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.sent = model, queue.Queue()
        self.called: list[str] = []
        self.written: list[tuple[list[int], list[int], list[float]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def load(self, announced: dict) -> None:
        """Take the weights that follow an announcement; every weight of the model, as announced."""
        tensors = self.sent.get(timeout=WAIT)
        assert [name for name, _ in tensors] == announced["names"]
        assert [list(tensor.shape) for _, tensor in tensors] == announced["shapes"]
        assert [str(tensor.dtype) for _, tensor in tensors] == [f"torch.{name}" for name in announced["dtype_names"]]
        self.model.load_state_dict(dict(tensors))

    @torch.no_grad()
    def complete(self, asked: dict) -> list[dict]:
        """`n` completions of each prompt, one prompt behind another."""
        assert asked["top_k"] in (0, -1)
        prompts = [prompt for prompt in asked["prompt"] for _ in range(asked["n"])]
        own = self.model.generation_config
        settings = GenerationConfig(
            max_new_tokens=asked["max_tokens"],
            do_sample=True,
            temperature=asked["temperature"],
            top_k=0,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
        )
        choices = []
        for prompt, ids in zip(prompts, generate_completions(self.model, prompts, settings), strict=True):
            logits = self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
            logps = (logits / asked["temperature"]).log_softmax(-1)[torch.arange(len(ids)), ids].tolist()
            self.written.append((prompt, ids, logps))
            named = [f"token_id:{token}" for token in ids]
            top = [{name: logp} for name, logp in zip(named, logps, strict=True)]
            told = {"tokens": named, "token_logprobs": logps, "top_logprobs": top}
            choices.append({"prompt_token_ids": prompt, "token_ids": ids, "logprobs": told})
        return choices


class _Handler(BaseHTTPRequestHandler):
    server: Engine

    def do_GET(self) -> None:
        modes = {
            "weight_transfer_config": {"backend": "nccl"},
            "model_config": {"logprobs_mode": "processed_logprobs"},
        }
        answers = {
            "/health": {},
            "/v1/models": {"data": [{"id": "student"}]},
            "/server_info": {"vllm_config": modes},
        }
        self._answer(answers[self.path.partition("?")[0]])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        self.server.called.append(self.path)
        if self.path == "/update_weights":
            self.server.load(body["update_info"])
        self._answer({"choices": self.server.complete(body)} if self.path == "/v1/completions" else {"success": True})

    def _answer(self, body: dict) -> None:
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words: Any) -> None:
        """Not on the screen."""


@contextmanager
def serving(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A server for the block, and TRL as it is where vLLM and NCCL are there."""
    engine = Engine(model)

    def send(iterator: Iterator, group: queue.Queue, src: int, post_iter_func: Any) -> None:
        group.put([(name, weight.detach().clone()) for name, weight in iterator])

    def init_communicator(self: Any, device: Any = 0) -> None:
        self.communicator = engine.sent

    for module in (client, generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda *version: True)
    monkeypatch.setattr(generation, "VLLMClient", client.VLLMClient, raising=False)
    monkeypatch.setattr(client.VLLMClient, "init_communicator", init_communicator)
    monkeypatch.setattr(client, "_HAS_STATEFUL_TRAINER_ENGINE", True)
    monkeypatch.setattr(client, "packed_nccl_broadcast_producer", send, raising=False)
    monkeypatch.setattr(config, "can_send_weights", lambda config: True)
    with answering(engine):
        yield engine
