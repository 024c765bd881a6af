"""Every kind of teacher that has the same weights gives the same scores and rollouts, on ragged batches."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_data, tiny_model, tiny_tokenizer, tiny_trainer

from sg_opd_trl import AdapterTeacher, LocalTeacher, ServerTeacher, SGOPDConfigError
from sg_opd_trl.models.batch import TokenBatch
from sg_opd_trl.teachers import Sampling
from sg_opd_trl.teachers.routed import teacher_of
from sg_opd_trl.trl_seam import add_head_output
from teachers.fake_server import FakeServer
from teachers.model_server import model_server

peft = pytest.importorskip("peft")

TOLERANCE = 1e-4
PROMPTS = [[3, 5, 6, 4], [3, 7, 4], [3, 9, 10, 11, 12, 13, 14, 4], [4], [3, 5, 6, 4]]
COMPLETIONS = [[8, 9, 1], [10], [11, 12, 13, 14, 1], [5, 6, 7, 8, 9, 10, 11], [12, 1]]
BATCH = TokenBatch.from_lists(PROMPTS, COMPLETIONS, 0, torch.device("cpu"))
ROWS = torch.tensor([True, True, True, False, True])
GREEDY = Sampling(max_new_tokens=6, eos_token_ids=(1,), pad_token_id=0, top_k=1)
EXAMPLES = [{"teacher_id": name} for name in ("one", "other", "one", "one", "other")]


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**({"target_modules": ["q_proj", "v_proj"], "r": 4, "task_type": "CAUSAL_LM"} | settings))


def save_adapter(folder: Path, seed: int = 5, base: str | None = None, **settings: Any) -> str:
    """An adapter on the weights of `tiny_model(0)` that does something."""
    model = peft.get_peft_model(tiny_model(0), lora(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return str(folder)


def merged(folder: str) -> Any:
    """The same teacher as one plain model."""
    return peft.PeftModel.from_pretrained(tiny_model(0), folder).merge_and_unload()


def oracle(model: Any) -> torch.Tensor:
    """Row by row without padding, log-softmax in float64."""
    scores = torch.zeros(BATCH.completion_ids.shape, dtype=torch.float64)
    for row in ROWS.nonzero().flatten().tolist():
        ids = torch.tensor([PROMPTS[row] + COMPLETIONS[row]])
        with torch.no_grad():
            logps = model.double()(ids).logits[0].log_softmax(-1)
        for position, token in enumerate(COMPLETIONS[row]):
            scores[row, position] = logps[len(PROMPTS[row]) + position - 1, token]
    return scores


def local(folder: str) -> dict:
    return {"teacher_model": merged(folder)}


def local_as_object(folder: str) -> dict:
    return {"teacher_model": LocalTeacher(merged(folder))}


def adapter(folder: str) -> dict:
    return {"teacher_model": AdapterTeacher(folder), "peft_config": lora(r=2)}


def routed(folder: str) -> dict:
    return {"teacher_model": {"one": merged(folder), "other": merged(folder)}}


def routed_mixed(folder: str) -> dict:
    return {"teacher_model": {"one": merged(folder), "other": AdapterTeacher(folder)}, "peft_config": lora(r=2)}


SERVERS: list[FakeServer] = []


def served(folder: str, replicas: int = 1) -> ServerTeacher:
    started = [model_server(merged(folder)).start() for _ in range(replicas)]
    SERVERS.extend(started)
    return ServerTeacher([one.url for one in started], timeout=60)


def server(folder: str) -> dict:
    return {"teacher_model": served(folder)}


def server_replicas(folder: str) -> dict:
    return {"teacher_model": served(folder, replicas=2)}


def routed_server(folder: str) -> dict:
    return {"teacher_model": {"one": merged(folder), "other": served(folder)}}


KINDS: list[Callable[[str], dict]] = [
    local,
    local_as_object,
    adapter,
    routed,
    routed_mixed,
    server,
    server_replicas,
    routed_server,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def trainer(request: pytest.FixtureRequest, folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    data = tiny_data().add_column("teacher_id", ["one", "other"] * 8)
    arguments = request.param(folder) | {"train_dataset": data, "teacher_processing_class": tiny_tokenizer()}
    trainer = tiny_trainer(tmp_path_factory.mktemp("run"), **arguments)
    add_head_output(trainer.model)  # as the modes that need it do
    yield trainer
    while SERVERS:
        SERVERS.pop().stop()


@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_scores(trainer: Any, folder: str, budget: int) -> None:
    before = trainer.teacher.tokens_scored
    scores = teacher_of(trainer.teacher, EXAMPLES).score(BATCH, ROWS, budget)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), oracle(merged(folder)), rtol=0, atol=TOLERANCE)
    assert (scores.double() - oracle(tiny_model(0))).abs().max() > 0.1, "the adapter does nothing"
    assert trainer.teacher.tokens_scored - before == 3 + 1 + 5 + 2


def test_supports(trainer: Any, folder: str) -> None:
    found = teacher_of(trainer.teacher, EXAMPLES).score_support(BATCH, ROWS, 20, 3, 26)
    model = merged(folder).double()
    for row in ROWS.nonzero().flatten().tolist():
        with torch.no_grad():
            logps = model(torch.tensor([PROMPTS[row] + COMPLETIONS[row]])).logits[0].log_softmax(-1)
        for position in range(len(COMPLETIONS[row])):
            best = logps[len(PROMPTS[row]) + position - 1].topk(3)
            assert found.support_ids[row, position].tolist() == best.indices.tolist()
            torch.testing.assert_close(
                found.support_logps[row, position].double(), best.values, rtol=0, atol=TOLERANCE
            )


def test_hidden_states_and_heads(trainer: Any, folder: str) -> None:
    if "full_logits" not in trainer.teacher.distillation_modes:
        with pytest.raises(SGOPDConfigError, match="it sends no hidden states"):
            teacher_of(trainer.teacher, EXAMPLES).score_hidden(BATCH, ROWS, 20)
        return
    found = teacher_of(trainer.teacher, EXAMPLES).score_hidden(BATCH, ROWS, 20)
    heads = trainer.teacher.output_heads()
    for row in ROWS.nonzero().flatten().tolist():
        weight = heads[int(found.heads[row])].weight.double()
        for position, token in enumerate(COMPLETIONS[row]):
            logits = found.hidden_states[row, position].double() @ weight.T
            difference = logits.log_softmax(-1)[token] - float(found.logps[row, position])
            assert abs(float(difference)) < TOLERANCE
    expected = oracle(merged(folder))
    torch.testing.assert_close(found.logps.double(), expected, rtol=0, atol=TOLERANCE)


def test_rollouts(trainer: Any, folder: str) -> None:
    """With the most likely token always taken, whoever holds the weights writes the same."""
    before = trainer.teacher.tokens_generated
    written = teacher_of(trainer.teacher, EXAMPLES).generate(PROMPTS, GREEDY, 3, 10_000)
    plain = LocalTeacher(merged(folder))
    plain.prepare(trainer.accelerator, temperature=1.0, cast_lm_head_to_fp32=False)
    expected = plain.generate(PROMPTS, GREEDY, 5, 10_000)
    assert written == expected
    assert len({tuple(ids) for ids in written}) > 1
    assert trainer.teacher.tokens_generated - before == sum(map(len, written))


def test_the_batch_of_one_rank_may_be_empty(trainer: Any) -> None:
    nobody = torch.zeros_like(ROWS)
    assert not teacher_of(trainer.teacher, EXAMPLES).score(BATCH, nobody, 100).any()
    assert teacher_of(trainer.teacher, []).generate([], GREEDY, 3, 100) == []
