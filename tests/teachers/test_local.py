"""The local teacher: scores against a float64 oracle, rollouts that depend on seed and prompt alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import save_pair, tiny_model
from torch import Tensor

from sg_opd_trl import LocalTeacher, NonFiniteError, TeacherError
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.models.forward import ForwardOutput, Layouts, restrict_layouts
from sg_opd_trl.teachers import Sampling, local
from sg_opd_trl.teachers.local import check_ids, check_scores, fingerprint
from sg_opd_trl.trl_seam import fused_forward

CPU = torch.device("cpu")
PROMPTS = [[3, 5, 6, 4], [3, 7, 4], [3, 9, 10, 11, 12, 4], [4]]
COMPLETIONS = [[8, 9, 1], [10], [11, 12, 13, 14, 1], [5, 6]]
BATCH = TokenBatch.from_lists(PROMPTS, COMPLETIONS, 0, CPU)
EVERY = torch.ones(4, dtype=torch.bool)
SAMPLING = Sampling(max_new_tokens=6, eos_token_ids=(1,), pad_token_id=0)


def prepared(model: Any = None, temperature: float = 1.0) -> LocalTeacher:
    teacher = LocalTeacher(tiny_model(1) if model is None else model)
    teacher.prepare(Accelerator(cpu=True), temperature=temperature, cast_lm_head_to_fp32=False)
    return teacher


def oracle(model: Any, temperature: float = 1.0) -> Tensor:
    """Row by row without padding, log-softmax in float64, `(B, T)`."""
    scores = torch.zeros(BATCH.completion_ids.shape, dtype=torch.float64)
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        with torch.no_grad():
            logits = model.double()(torch.tensor([prompt + completion])).logits[0]
        logps = (logits / temperature).log_softmax(-1)
        for position, token in enumerate(completion):
            scores[row, position] = logps[len(prompt) + position - 1, token]
    return scores


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [1, 12, 10_000])
def test_scores_equal_a_float64_oracle_in_any_batch_layout(temperature: float, budget: int) -> None:
    scores = prepared(temperature=temperature).score(BATCH, EVERY, budget)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), oracle(tiny_model(1), temperature), rtol=0, atol=5e-6)


def test_only_chosen_rows_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = prepared()
    shapes: list[tuple[int, ...]] = []

    def recording(model: Any, ids: Tensor, mask: Tensor, completion_length: int, *others: Any) -> ForwardOutput:
        shapes.append((*ids.shape, completion_length))
        return fused_forward(model, ids, mask, completion_length, *others)

    monkeypatch.setattr(local, "fused_forward", recording)
    scores = teacher.score(BATCH, torch.tensor([False, True, False, True]), 100)
    # Rows 1 and 3: prompts of 3 and 1 tokens, completions of 1 and 2.
    assert shapes == [(2, 5, 2)]
    assert torch.equal(scores[[0, 2]], torch.zeros(2, 5))
    assert (scores[[1, 3], 0] < 0).all()
    teacher.score(BATCH, ~EVERY, 100)
    assert len(shapes) == 1


def test_a_teacher_is_frozen_and_evaluates() -> None:
    model = tiny_model(1, attention_dropout=0.5).train()
    teacher = prepared(model)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(teacher.score(BATCH, EVERY, 100), teacher.score(BATCH, EVERY, 100))
    assert not teacher.score(BATCH, EVERY, 100).requires_grad


def test_ids_beyond_the_vocabulary() -> None:
    batch = TokenBatch.from_lists([[3], [3, 26]], [[5], [30, 31]], 0, CPU)
    with pytest.raises(TeacherError, match="Token id 26 at position 1 of the prompt in row 1"):
        check_ids(batch, torch.tensor([True, True]), 26, "teacher")
    with pytest.raises(
        TeacherError, match=r"Token id 30 at position 0 of the completion in row 1.*reference.* 28 entries"
    ):
        check_ids(batch, torch.tensor([True, True]), 28, "reference")
    check_ids(batch, torch.tensor([True, False]), 26, "teacher")
    check_ids(batch, torch.tensor([True, True]), 32, "teacher")


def test_padding_ids_are_not_looked_at() -> None:
    check_ids(TokenBatch.from_lists([[3], [3, 4]], [[5], [6, 7]], 99, CPU), torch.tensor([True, True]), 26, "teacher")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.5])
def test_scores_that_are_no_log_probs(bad: float) -> None:
    scores = torch.tensor([[-1.0, -2.0], [-0.5, bad]])
    with pytest.raises(NonFiniteError, match=rf"The teacher gave 1 .*the first {bad} in row 1 at completion token 1"):
        check_scores(scores, "teacher")
    check_scores(torch.tensor([[0.0, 1e-4, -50.0]]), "teacher")


# --- generation ------------------------------------------------------------------------------------------------------
def test_rollouts_end_at_the_end_token_or_the_limit() -> None:
    rollouts = prepared().generate(PROMPTS * 4, SAMPLING, 3, 10_000)
    assert len(rollouts) == 16
    assert all(1 <= len(ids) <= 6 for ids in rollouts)
    assert all((1 in ids) == (len(ids) < 6 or ids[-1] == 1) for ids in rollouts)
    assert all(1 not in ids[:-1] for ids in rollouts)
    assert len({len(ids) for ids in rollouts}) > 1


def test_rollouts_belong_to_their_prompts_whatever_the_batch_layout() -> None:
    """With the most likely token always taken, layout and seed change nothing."""
    greedy = Sampling(max_new_tokens=6, eos_token_ids=(1,), pad_token_id=0, top_k=1)
    teacher = prepared()
    alone = [teacher.generate([prompt], greedy, 0, 10_000)[0] for prompt in PROMPTS]
    assert teacher.generate(PROMPTS, greedy, 1, 10_000) == alone
    assert teacher.generate(PROMPTS, greedy, 2, 14) == alone
    assert len({tuple(ids) for ids in alone}) > 1


def test_the_seed_decides_and_the_callers_random_state_does_not() -> None:
    teacher = prepared()
    torch.manual_seed(0)
    first = teacher.generate(PROMPTS, SAMPLING, 3, 10_000)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn), "generation must leave the random state as it was"
    assert teacher.generate(PROMPTS, SAMPLING, 3, 10_000) == first
    assert teacher.generate(PROMPTS, SAMPLING, 4, 10_000) != first


def test_the_models_own_generation_settings_do_not_leak_in() -> None:
    """A model saved with greedy decoding still samples as it is told, and keeps its settings."""
    plain = prepared().generate(PROMPTS, SAMPLING, 3, 10_000)
    model = tiny_model(1)
    model.generation_config.update(top_k=1, temperature=0.01, max_new_tokens=1, eos_token_id=[5, 6, 7])
    model.generation_config.update(min_p=0.9, repetition_penalty=9.0, suppress_tokens=[8, 9, 10])
    teacher = prepared(model)
    assert teacher.generate(PROMPTS, SAMPLING, 3, 10_000) == plain
    assert (model.generation_config.top_k, model.generation_config.max_new_tokens) == (1, 1)


def test_temperature_and_top_k_are_honoured() -> None:
    teacher = prepared()
    cold = Sampling(max_new_tokens=6, eos_token_ids=(1,), pad_token_id=0, temperature=1e-4)
    assert teacher.generate(PROMPTS, cold, 3, 10_000) == teacher.generate(PROMPTS, cold, 4, 10_000)


def test_ranks_agree_on_their_batches_before_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is still asked would answer the forward of another with this collective."""
    teacher, events = prepared(), list[str]()
    write = teacher._generate_batch
    monkeypatch.setattr(teacher, "_agree_on_calls", lambda calls: events.append("agree") or calls + 1)
    monkeypatch.setattr(teacher, "_generate_batch", lambda *args: events.append("write") or write(*args))
    teacher.generate(PROMPTS, SAMPLING, 3, 14)
    assert events[0] == "agree"
    assert events.count("agree") == 1
    assert events.count("write") > 2


def test_prompts_of_each_length_count_as_calls_where_they_are_written_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks have prompts of different lengths: those that were not agreed on would be collectives of one rank."""
    teacher, agreed, written = prepared(), list[int](), list[int]()
    restrict_layouts(teacher.model, Layouts(written_together=False))
    generate = teacher.model.generate
    monkeypatch.setattr(teacher, "_agree_on_calls", lambda calls: agreed.append(calls) or calls)
    monkeypatch.setattr(
        teacher.model, "generate", lambda **inputs: written.append(inputs["input_ids"].size(1)) or generate(**inputs)
    )
    teacher.generate(PROMPTS, SAMPLING, 3, 10_000)
    assert sorted(written) == sorted({len(prompt) for prompt in PROMPTS})
    assert agreed == [len(written)]
    assert len(written) > 1


def test_nothing_to_write() -> None:
    assert prepared().generate([], SAMPLING, 3, 100) == []


def test_a_teacher_that_is_not_finite_says_so() -> None:
    model = tiny_model(1)
    with torch.no_grad():
        model.lm_head.weight[7, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"teacher.*not finite.*Check the teacher's weights"):
        prepared(model).generate(PROMPTS, SAMPLING, 3, 100)


# --- loading ---------------------------------------------------------------------------------------------------------
def test_a_folder_is_loaded_as_the_student_is(tmp_path: Path) -> None:
    folder = save_pair(tmp_path, 1)
    like = tiny_model(0).to(torch.bfloat16)
    like.config._attn_implementation = "eager"
    teacher = LocalTeacher.from_pretrained(folder, role="teacher", like=like, revision=None, init_kwargs=None)
    assert teacher.model.dtype == torch.bfloat16
    assert teacher.model.config._attn_implementation == "eager"
    assert teacher.identity["name"] == folder
    assert teacher.vocab_size == 26
    own = LocalTeacher.from_pretrained(
        folder,
        role="teacher",
        like=like,
        revision=None,
        init_kwargs={"dtype": torch.float32, "attn_implementation": "sdpa"},
    )
    assert own.model.dtype == torch.float32
    assert own.model.config._attn_implementation == "sdpa"


def test_a_fingerprint_tells_weights_apart() -> None:
    model = tiny_model(1)
    first = fingerprint(model)
    assert first == fingerprint(tiny_model(1)) == fingerprint(model.train())
    assert first != fingerprint(tiny_model(2))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    assert first != fingerprint(model)


def test_generation_settings_of_the_run_reach_the_teacher() -> None:
    """Every id but 7 suppressed: the teacher can write nothing else; the run's own settings win."""
    teacher = prepared()
    suppressed = [token for token in range(26) if token != 7]
    sampling = Sampling(3, (1,), 0, generation_kwargs={"suppress_tokens": suppressed, "max_new_tokens": 2})
    assert teacher.generate([[5, 6]], sampling, 0, 100) == [[7, 7]]
