"""A training step of gate-only SG-OPD on the built-in task with nothing but PyTorch and `generate`.

What a reader of the paper would write by hand: no trainer, no metrics, no checks, no other task. It does the work of
the recipe `gate_only`: sample, verify, score with teacher and reference, one policy-gradient update through the gate.
All prompts of the task have one length, so that there is nothing to pad and nothing to order.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


class BareLoop:
    """Steps of the bare loop; `seconds` holds the phases of the last one.

    Args:
        student: folder of the student, which is the reference as well.
        teacher: folder of the teacher.
        rows: problems with `prompt` and `solution`.
        args: training arguments of the recipe, for the numbers in them.
        verify: reward function.
    """

    def __init__(self, student: str, teacher: str, rows: Any, args: Any, verify: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(student)
        self.student, self.reference = (AutoModelForCausalLM.from_pretrained(student) for _ in range(2))
        self.teacher = AutoModelForCausalLM.from_pretrained(teacher)
        self.args, self.verify = args, verify
        self.rows = itertools.cycle(rows)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
        )
        self.eos = self.tokenizer.eos_token_id
        self.generation = GenerationConfig(
            do_sample=True,
            temperature=args.temperature,
            top_k=0,
            max_new_tokens=args.max_completion_length,
            eos_token_id=self.eos,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.seconds: dict[str, float] = {}

    def step(self) -> float:
        """One step; returns its seconds."""
        self.seconds, start = {}, time.perf_counter()
        with self._phase("rollout"):
            rows, prompts, completions, mask = self._sample()
        with self._phase("verify"):
            verifier = self._verifier_advantages(rows, completions)
        ids = torch.cat([prompts, completions], dim=1)
        attention = torch.cat([torch.ones_like(prompts), mask], dim=1)
        width = completions.size(1)
        with self._phase("teacher"), torch.no_grad():
            teacher = log_probs(self.teacher, ids, attention, width)
        with self._phase("reference"), torch.no_grad():
            # Without a verifier's sign no token is a consensus, and only consensus tokens use the reference.
            used = verifier != 0
            reference = teacher.clone()
            if used.any():
                reference[used] = log_probs(self.reference, ids[used], attention[used], width)
        with self._phase("loss"):
            self._update(log_probs(self.student, ids, attention, width), teacher, reference, verifier, mask)
        return time.perf_counter() - start

    def _sample(self) -> tuple[list, Tensor, Tensor, Tensor]:
        group = self.args.num_generations
        chosen = list(itertools.islice(self.rows, self.args.per_device_train_batch_size // group))
        rows = [row for row in chosen for _ in range(group)]
        prompts = self.tokenizer.apply_chat_template(
            [row["prompt"] for row in rows],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
        with torch.no_grad():
            sequences = self.student.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=self.generation
            )
        completions = sequences[:, prompts.size(1) :]
        ended = (completions == self.eos).long().cumsum(dim=1)
        mask = ((ended == 0) | ((ended == 1) & (completions == self.eos))).long()
        return rows, prompts, completions, mask

    def _verifier_advantages(self, rows: list, completions: Tensor) -> Tensor:
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        verdicts = self.verify(completions=chats, solution=[row["solution"] for row in rows])
        # An abstention counts as wrong here: the same work, one line.
        rewards = torch.tensor([value or 0.0 for value in verdicts]).view(-1, self.args.num_generations)
        centred = rewards - rewards.mean(dim=1, keepdim=True)
        return (centred / (rewards.std(dim=1, keepdim=True) + 1e-4)).flatten()

    def _update(self, student: Tensor, teacher: Tensor, reference: Tensor, verifier: Tensor, mask: Tensor) -> None:
        args, behaviour = self.args, student.detach()
        a2 = teacher - behaviour
        consensus = (verifier.unsqueeze(1) * a2 > 0) & (a2.abs() > args.gate_dead_zone)
        routed = torch.where(consensus, a2 + (args.lambda_high - 1) * (teacher - reference), a2)
        phi = (args.stability_tau / a2.abs()).clamp(max=1.0) * mask
        tokens = mask.sum(dim=1, keepdim=True)
        advantages = routed * phi * tokens / phi.sum(dim=1, keepdim=True)
        ratio = (student - behaviour).exp()
        clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        loss = -((gain * mask).sum(dim=1, keepdim=True) / tokens).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def log_probs(model: Any, ids: Tensor, attention: Tensor, width: int) -> Tensor:
    """Log-probs of the last `width` tokens, `(B, width)`."""
    logits = model(input_ids=ids, attention_mask=attention, logits_to_keep=width + 1, use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(dim=-1)
    return logps.gather(dim=-1, index=ids[:, -width:].unsqueeze(-1)).squeeze(-1)
