"""A teacher in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..generation import generate_completions
from ..scoring import plan_batches
from ..trl_seam import is_sharded, model_for_generation
from .base import Sampling
from .frozen import FrozenModel


class LocalTeacher(FrozenModel):
    """A teacher whose weights live beside the student's.

    Args:
        model: causal language model that shares the student's token ids.
        name: where it came from; default: the path in its config.

    Attributes:
        tokens_generated: tokens generated so far by this process.
    """

    tokens_generated: int = 0

    def __init__(self, model: PreTrainedModel, *, role: str = "teacher", name: str | None = None) -> None:
        super().__init__(model, role=role, name=name)

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int, max_tokens: int) -> list[list[int]]:
        """One completion per prompt, see `Teacher.generate`; prompts of like length share a batch.

        A sharded teacher generates on every rank the same number of times; ranks with fewer prompts repeat a dummy.
        """
        lengths = [len(prompt) + sampling.max_new_tokens for prompt in prompts]
        groups = list(plan_batches(lengths, max_tokens))
        completions: list[list[int]] = [[] for _ in prompts]
        with self._generation(seed) as model:
            for group in groups:
                for i, ids in zip(
                    group, self._generate_batch(model, [prompts[i] for i in group], sampling), strict=True
                ):
                    completions[i] = ids
            for _ in range(self._agree_on_calls(len(groups)) - len(groups)):
                self._generate_batch(model, [[sampling.pad_token_id]], sampling)
        self.tokens_generated += sum(map(len, completions))
        return completions

    def stop_generating(self) -> None:
        """Return the memory of the key-value caches to the device."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _generation(self, seed: int) -> Iterator[Any]:
        device = self.accelerator.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), model_for_generation(self.model, self.accelerator) as model:
            torch.manual_seed(seed)
            # `generate` fills what a call leaves open from the model's own settings (top-k of 20, say).
            own_config, model.generation_config = model.generation_config, GenerationConfig()
            try:
                yield model
            finally:
                model.generation_config = own_config

    def _generate_batch(self, model: Any, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        settings = {
            "max_new_tokens": sampling.max_new_tokens,
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "eos_token_id": list(sampling.eos_token_ids),
            "pad_token_id": sampling.pad_token_id,
            "disable_compile": True,
        }
        config = GenerationConfig(**(settings | dict(sampling.generation_kwargs)))
        with self.accelerator.autocast():
            return generate_completions(
                model, prompts, config, role=self.role, synced_gpus=is_sharded(self.accelerator)
            )
