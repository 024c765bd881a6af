"""The verifier is called as TRL calls it, and only verdicts are taken for an answer."""

import pytest
from word_case import run, word_data, word_model, word_tokenizer

from sg_opd_trl.errors import DataError, SGOPDConfigError, VerifierError


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def model():
    return word_model()


@pytest.fixture
def dataset():
    return word_data()


def test_verifier_gets_what_trl_gives(model, tokenizer, dataset):
    calls = []

    def verifier(prompts, completions, completion_ids, solution, level, trainer_state, log_extra, log_metric):
        log_extra("column", completions)
        log_metric("metric", 1.0)
        calls.append((prompts, completions, solution, level))
        return [True] * len(completions)

    assert run(model, tokenizer, dataset, reward_func=verifier).avg_at_k == 1.0
    for prompts, completions, solution, level in calls:
        assert [dataset[gold]["prompt"] for gold in solution] == prompts
        assert [gold + 5 for gold in solution] == level
        assert all(completion[0]["role"] == "assistant" for completion in completions)
    assert sum(len(call[0]) for call in calls) == 12


def test_plain_prompts_give_plain_completions(model, tokenizer):
    kinds = set()

    def verifier(prompts, completions, **kwargs):
        kinds.update((type(prompt), type(completion)) for prompt, completion in zip(prompts, completions, strict=True))
        return [0] * len(completions)

    result = run(model, tokenizer, [{"prompt": "w1 w2"}, {"prompt": "w3"}], reward_func=verifier)
    assert kinds == {(str, str)}
    assert (result.avg_at_k, result.avg_interval) == (0.0, (0.0, 0.0))


def test_abstaining_is_not_right_and_is_counted(model, tokenizer, dataset):
    def verifier(solution, **kwargs):
        return [None if gold == 0 else float("nan") if gold == 1 else 1.0 for gold in solution]

    result = run(model, tokenizer, dataset, reward_func=verifier)
    assert result.abstained == 6
    assert result.avg_at_k == 0.5  # problems 2 and 3 of 4
    assert result.pass_at_k == 0.5


def test_chats_without_a_template(model, tokenizer, dataset, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="chat template"):
        run(model, tokenizer, dataset)


async def asynchronous(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize(
    ("verifier", "message"),
    [(lambda completions, **_: [0.5] * len(completions), "got 0.5"), (lambda **_: [1.0], "got 1 answers"),
     (asynchronous, "got coroutine")],
)  # fmt: skip
def test_answers_that_are_no_verdicts(model, tokenizer, dataset, verifier, message):
    with pytest.raises(VerifierError, match=message):
        run(model, tokenizer, dataset, reward_func=verifier)


def test_model_object_without_tokenizer(model, dataset):
    with pytest.raises(SGOPDConfigError, match="`processing_class` must be"):
        run(model, None, dataset)
