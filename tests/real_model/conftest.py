"""The model, read once for all tests of a process that leave it as it is."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="session")
def folder() -> str:
    return os.environ["SG_OPD_REAL_MODEL"]


@pytest.fixture(scope="session")
def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def shared_model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture
def model(shared_model: Any) -> Iterator[Any]:
    """The model as it was saved, and still is after the test."""
    weight = shared_model.model.layers[0].self_attn.q_proj.weight
    before = weight.clone()
    yield shared_model
    assert torch.equal(weight, before)
    assert not shared_model.training
