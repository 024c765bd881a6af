"""What vLLM answers is what the teacher in this process says: scores, likeliest tokens, completions."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from real_vllm.serving import NEEDS_VLLM, Server, recipe_trainer
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.teachers import Sampling
from sg_opd_trl.trl_seam import add_head_output

pytestmark = NEEDS_VLLM


class Teachers(NamedTuple):
    """The same weights behind the server and in this process, and the tokenizer."""

    remote: Any
    local: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def teachers(server: Server, teacher_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    folder = tmp_path_factory.mktemp("run")
    remote = recipe_trainer(folder, teacher_model_name_or_path=teacher_folder, teacher_model_server_url=server.url)
    local = recipe_trainer(folder, teacher_model_name_or_path=teacher_folder)
    add_head_output(local.teacher.model)
    return Teachers(remote.teacher, local.teacher, local.tokenizer)


def ragged_batch(vocabulary: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)

    def draw(lengths: list[int]) -> list[list[int]]:
        return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]

    return TokenBatch.from_lists(draw([3, 9, 1, 30]), draw([40, 1, 23, 7]), 0, torch.device("cpu"))


ROWS = torch.tensor([True, True, False, True])


def test_scores(teachers: Teachers) -> None:
    batch = ragged_batch(len(teachers.tokenizer))
    found = teachers.remote.score(batch, ROWS, 200)
    torch.testing.assert_close(found, teachers.local.score(batch, ROWS, 200), rtol=0, atol=1e-4)
    assert found[2].abs().sum() == 0
    assert (found[ROWS][batch.completion_mask[ROWS] == 1] < 0).all()


def test_likeliest_tokens(teachers: Teachers) -> None:
    size = vocabulary = len(teachers.tokenizer)
    batch = ragged_batch(vocabulary)
    found, expected = (one.score_support(batch, ROWS, 200, 8, vocabulary) for one in (teachers.remote, teachers.local))
    torch.testing.assert_close(found.support_logps, expected.support_logps, rtol=0, atol=1e-4)
    near = (expected.support_logps.diff(dim=-1) > -1e-4).any(dim=-1)
    assert torch.equal(found.support_ids[~near], expected.support_ids[~near])
    # The whole vocabulary has probability 1: these are log-probs before any truncation.
    whole = teachers.remote.score_support(batch, ROWS, 200, size, vocabulary).support_logps
    total = whole[ROWS][batch.completion_mask[ROWS] == 1].exp().sum(dim=-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-4)


def prompts_of(tokenizer: Any, questions: list[str]) -> list[list[int]]:
    chats = [[{"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)


def sampling(tokenizer: Any, **changed: Any) -> Sampling:
    return Sampling(
        **({"max_new_tokens": 48, "eos_token_ids": (tokenizer.eos_token_id,), "pad_token_id": 0} | changed)
    )


def test_likeliest_completions(teachers: Teachers) -> None:
    prompts = prompts_of(teachers.tokenizer, ["123+456=", "705+218=", "999+001="])
    greedy = sampling(teachers.tokenizer, top_k=1)
    found = teachers.remote.generate(prompts, greedy, 1, 10_000)
    assert found == teachers.local.generate(prompts, greedy, 1, 10_000)
    assert all(ids[-1] == teachers.tokenizer.eos_token_id for ids in found)


def test_completions_end_where_they_are_told_to(teachers: Teachers) -> None:
    prompts = prompts_of(teachers.tokenizer, ["123+456="])
    whole = teachers.remote.generate(prompts, sampling(teachers.tokenizer, top_k=1), 1, 10_000)[0]
    short = sampling(teachers.tokenizer, top_k=1, max_new_tokens=5)
    assert teachers.remote.generate(prompts, short, 1, 10_000) == [whole[:5]]
    ends = sampling(teachers.tokenizer, top_k=1, eos_token_ids=(whole[7],))
    first = whole.index(whole[7]) + 1
    assert teachers.remote.generate(prompts, ends, 1, 10_000) == [whole[:first]]
    never = {"suppress_tokens": [whole[0]]}
    other = teachers.remote.generate(
        prompts, sampling(teachers.tokenizer, top_k=1, generation_kwargs=never), 1, 10_000
    )
    assert whole[0] not in other[0]


def test_sampled_first_tokens_have_the_models_probabilities(teachers: Teachers) -> None:
    """At temperature 1 without truncation: drawn 400 times, no token is off by five standard deviations."""
    count, prompt = 400, prompts_of(teachers.tokenizer, ["123+456="])[0][:-2]
    drawn = teachers.remote.generate([prompt] * count, sampling(teachers.tokenizer, max_new_tokens=1), 7, 10_000)
    with torch.no_grad():
        expected = teachers.local.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    counts = Counter(ids[0] for ids in drawn)
    assert len(counts) > 1
    for token, probability in enumerate(expected.tolist()):
        spread = (count * probability * (1 - probability)) ** 0.5
        assert abs(counts[token] - count * probability) <= 5 * spread + 1, token


def test_a_seed_gives_the_same_completions_again(teachers: Teachers) -> None:
    """After prompts that make no sense, as hot as vLLM goes: of a problem's answer this teacher is nearly certain."""
    hot = sampling(teachers.tokenizer, temperature=2.0)
    prompts = [[5, 6, 7], [9, 8, 7, 6]] * 4
    found = teachers.remote.generate(prompts, hot, 3, 10_000)
    assert found == teachers.remote.generate(prompts, hot, 3, 10_000)
    assert len({tuple(ids) for ids in found}) > 4
    assert found != teachers.remote.generate(prompts, hot, 4, 10_000)


def test_the_teacher_knows_its_server(teachers: Teachers, teacher_folder: str, server: Server) -> None:
    assert teachers.remote.identity["root"] == teacher_folder
    assert teachers.remote.client.max_length == 256
    assert Path(teacher_folder).is_dir()
