"""Steps of SG-OPD on a pretrained model: gradients against plain logits, and what is saved.

Student, teacher and reference are one model; the teacher reads worked examples in a system turn, the student one
example in a turn before. All tests share the rollouts that the first run sampled and `math_reward` judged.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracle import Row
from tiny import ANCHOR, GradientRecorder, inject_rollouts, inject_teacher_rollouts, relative_difference, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_model.plain import step_gradient
from real_model.smollm import NEEDS_MODEL, WORKED_EXAMPLES, RecordedVerifier, in_order, rows, system_turn
from sg_opd_trl import SGOPDTrainer
from sg_opd_trl.evaluation_sampling import encode_prompt
from sg_opd_trl.models.batch import TokenBatch

pytestmark = NEEDS_MODEL
SETTINGS = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 1,
    "temperature": 0.7,
    "learning_rate": 1e-5,
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,  # LoRA's A has no gradient in the first step: it stays as it was made
    "disagree_interp_beta": 0.5,  # so that the three routes differ
    "teacher_sampling_ratio": 0.5,  # as many teacher prompts as student prompts: 2
    "teacher_num_generations": 2,
    "seed": 1,
    **ANCHOR,
}
LIMIT = 1e-4
"""On the norm of the difference over the norm of the gradient, both in float32."""


class Run(NamedTuple):
    """One step, and what came in and went out of it."""

    trainer: Any
    gradient: dict[str, Tensor]
    rollouts: list[Row]
    verdicts: list[float | None]
    scored: TokenBatch
    written: list[Row]
    kept: list[Row]
    log: dict[str, float]


def run_step(where: Path, folder: str, settings: dict | None = None, replay: Any = None, **arguments: Any) -> Run:
    """Train for one step; with `replay` on the rollouts of another run."""
    verifier, recorder, scored = RecordedVerifier(), GradientRecorder(), []
    trainer = SGOPDTrainer(
        folder,
        verifier,
        tiny_config(where, **(SETTINGS | (settings or {}))),
        train_dataset=rows(teacher_system=WORKED_EXAMPLES),
        teacher_model=folder,
        callbacks=[recorder],
        **arguments,
    )
    score = trainer.teacher.score

    def recorded_score(batch: TokenBatch, *arguments: Any) -> Any:
        scored.append(batch)
        return score(batch, *arguments)

    trainer.teacher.score = recorded_score
    if replay is not None:
        inject_rollouts(trainer, in_order([row.completion for row in replay.rollouts]))
        inject_teacher_rollouts(trainer, in_order([row.completion for row in replay.written]))
    trainer.train()
    calls = {len(ids): (prompts, ids, verdicts) for prompts, ids, verdicts in verifier.calls}
    (student, verdicts), (teacher, judged) = (judged_rows(trainer.tokenizer, calls[size]) for size in (8, 4))
    kept = [row for row, verdict in zip(teacher, judged, strict=True) if verdict == 1]
    (batch,), (gradient,) = scored, recorder.steps
    log = next(entry for entry in trainer.state.log_history if "gate/neutral" in entry)
    return Run(trainer, gradient, student, verdicts, batch, teacher, kept, log)


def judged_rows(tokenizer: Any, call: tuple[list, list, list]) -> tuple[list[Row], list]:
    prompts, completions, verdicts = call
    return [Row(encode_prompt(tokenizer, p, {}), ids) for p, ids in zip(prompts, completions, strict=True)], verdicts


@pytest.fixture(scope="module")
def full(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_step(tmp_path_factory.mktemp("full"), folder)


class Expected(NamedTuple):
    """What plain logits say of the step of `full`."""

    gradient: dict[str, Tensor]
    classes: list[str]


@pytest.fixture(scope="module")
def expected(full: Run, shared_model: Any) -> Expected:
    read = [ids[mask == 1].tolist() for ids, mask in zip(full.scored.prompt_ids, full.scored.prompt_mask, strict=True)]
    args = full.trainer.args
    return Expected(*step_gradient(args, shared_model, full.rollouts, full.verdicts, read, full.kept))


def test_the_rollouts_make_a_step_worth_comparing(full: Run, expected: Expected) -> None:
    assert {0.0, 1.0} <= set(full.verdicts)
    assert min(map(expected.classes.count, ("consensus", "conflict", "neutral"))) > 0
    assert len(full.kept) > 0
    assert len({len(row.completion) for row in full.rollouts}) > 1


def test_the_teacher_reads_its_own_prompt_before_the_same_completions(full: Run) -> None:
    tokenizer, data = full.trainer.tokenizer, rows(teacher_system=WORKED_EXAMPLES)
    own = {tuple(encode_prompt(tokenizer, row["prompt"], {})): row["teacher_prompt"] for row in data}
    entries = (
        full.scored.prompt_ids,
        full.scored.prompt_mask,
        full.scored.completion_ids,
        full.scored.completion_mask,
    )
    for row, ids, mask, completion, written in zip(full.rollouts, *entries, strict=True):
        prompt = own[tuple(row.prompt)]
        assert prompt[0] == system_turn(WORKED_EXAMPLES)
        assert ids[mask == 1].tolist() == encode_prompt(tokenizer, prompt, {}) != row.prompt
        assert completion[written == 1].tolist() == row.completion
    assert full.log["teacher/abs_advantage_mean"] > 0.1


def test_a_step_with_the_anchor_has_the_gradient_of_plain_logits(full: Run, expected: Expected) -> None:
    assert relative_difference(full.gradient, expected.gradient) < LIMIT
    for kind in ("consensus", "conflict", "neutral"):
        assert full.log[f"gate/{kind}"] == pytest.approx(expected.classes.count(kind) / len(expected.classes))
    assert full.log["anchor/kept"] == len(full.kept)


def test_a_saved_student_is_the_trained_one(full: Run, folder: str, tmp_path: Path) -> None:
    trainer, text = full.trainer, full.trainer.tokenizer("Ann has 3 pens.", return_tensors="pt")
    trainer.save_model(str(tmp_path))
    model, tokenizer = (auto.from_pretrained(tmp_path) for auto in (AutoModelForCausalLM, AutoTokenizer))
    before = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        trained, saved, untrained = (one.eval()(**text).logits for one in (trainer.model, model, before))
    assert torch.equal(saved, trained)
    assert not torch.equal(saved, untrained)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        assert getattr(model.generation_config, name) == getattr(before.generation_config, name)
    original = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.get_vocab() == original.get_vocab()
    prompt = rows()[0]["prompt"]
    assert encode_prompt(tokenizer, prompt, {}) == encode_prompt(original, prompt, {})


def test_lora_has_the_gradient_of_the_projections_it_is_added_to(
    full: Run, expected: Expected, folder: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = run_step(tmp_path / "run", folder, {"learning_rate": 1e-3}, full, peft_config=config)
    start = peft_state(run)
    assert len(run.gradient) == 2 * 2 * 30  # A and B of two projections in thirty layers
    wanted = {}
    for name in (name for name in run.gradient if "lora_B" in name):
        projection = name.removeprefix("base_model.model.").replace(".lora_B.default", "")
        # W + (alpha / r) B A with B = 0: the gradient of B is that of W, brought down by A; that of A is 0.
        wanted[name] = 8 / 4 * expected.gradient[projection] @ start[name.replace("lora_B", "lora_A")].T
    assert relative_difference({name: run.gradient[name] for name in wanted}, wanted) < LIMIT
    assert all(not gradient.any() for name, gradient in run.gradient.items() if "lora_A" in name)

    # What is saved is the adapter, with the tokenizer; on its base it is the trained student.
    run.trainer.save_model(str(tmp_path / "saved"))
    base = AutoModelForCausalLM.from_pretrained(folder)
    text = run.trainer.tokenizer("Ann has 3 pens.", return_tensors="pt")
    with torch.no_grad():
        untrained = base(**text).logits
        saved = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()(**text).logits
        trained = run.trainer.model.eval()(**text).logits
    torch.testing.assert_close(saved, trained, rtol=0, atol=1e-5)
    assert (saved - untrained).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == run.trainer.tokenizer.chat_template


def peft_state(run: Run) -> dict[str, Tensor]:
    """After the step, in which A stayed as it was made: its gradient is 0, and there is no weight decay."""
    return {name: p.detach() for name, p in run.trainer.model.named_parameters() if "lora_" in name}
