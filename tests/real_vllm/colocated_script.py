"""Train a few steps with the student's rollouts from vLLM in this process; what was seen goes to a JSON file.

A process of its own, as vLLM starts torch's process group and keeps its memory.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl.generation.vllm_generation as generation
from tiny import logged
from vllm import SamplingParams

from real_vllm.serving import TEACHER, recipe_trainer
from sg_opd_trl.tasks.models import build_model, build_tokenizer
from sg_opd_trl.tasks.settings import ModelSettings


def save_student(folder: Path) -> str:
    """A random student with heads of 32."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    shape = ModelSettings(hidden_size=64, num_layers=2, intermediate_size=128, num_heads=2)
    build_model(shape, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def engine_logps(trainer: Any, ids: list[int]) -> torch.Tensor:
    """Log-probs of a sequence's tokens by the engine, without those of the first."""
    trainer.vllm_generation.llm.reset_prefix_cache()
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (answer,) = trainer.vllm_generation.llm.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
    found = zip(ids[1:], answer.prompt_logprobs[1:], strict=True)
    return torch.tensor([entry[token].logprob for token, entry in found])


def student_logps(trainer: Any, ids: list[int]) -> torch.Tensor:
    """The same by the student."""
    trainer.model.eval()
    with torch.no_grad():
        logps = trainer.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return logps[torch.arange(len(ids) - 1), ids[1:]]


def main(folder: Path, use_peft: str) -> None:
    # TRL passes neither on: vLLM would serve float32 weights in bfloat16.
    generation.LLM = functools.partial(generation.LLM, dtype="float32", enforce_eager=True)
    trainer = recipe_trainer(
        folder / "run",
        model_name_or_path=save_student(folder / "student"),
        teacher_model_name_or_path=TEACHER,
        use_peft=use_peft,
        use_vllm="true",
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.1,
        vllm_max_model_length=128,
        per_device_train_batch_size=16,
        max_steps=3,
        learning_rate=5e-3,
        warmup_steps=0,
        lr_scheduler_type="constant",
        teacher_sampling_phase1_end_frac=1.0,
        teacher_sampling_phase2_end_frac=1.0,
    )
    ids = [5 + 7 * place % (len(trainer.tokenizer) - 5) for place in range(40)]
    before = student_logps(trainer, ids)
    seen = {"engine_at_start": float((engine_logps(trainer, ids) - before).abs().max())}
    trainer.train()
    trainer.vllm_generation.sync_weights()
    after, engine = student_logps(trainer, ids), engine_logps(trainer, ids)
    seen |= {
        "moved": float((after - before).abs().max()),
        "engine_at_end": float((engine - after).abs().max()),
        "rollouts_off_policy": logged(trainer, "sampling/sampling_logp_difference/max"),
        "loss": logged(trainer, "loss"),
        "teacher_logps": logged(trainer, "teacher/scored_tokens"),
        "anchor": logged(trainer, "anchor/tokens"),
    }
    (folder / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
