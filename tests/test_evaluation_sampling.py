"""Accuracies are recounted from the samples, completions made again token by token without cache and padding."""

import copy
import itertools
import json
import statistics
import sys
import types

import pytest
import torch
from reward_functions import parity, sleeps
from transformers import GenerationConfig
from word_case import WORDS, even_length, run, word_data, word_model, word_tokenizer

from sg_opd_trl.errors import DataError, SGOPDConfigError, VerifierError
from sg_opd_trl.verifiers.bounded import bounded


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def model():
    return word_model()


@pytest.fixture
def dataset():
    return word_data()


def test_result_is_what_the_samples_say(model, tokenizer, dataset, tmp_path):
    path = tmp_path / "deep" / "samples.jsonl"
    ends = []

    def even_length_noting_ends(completion_ids, **kwargs):
        ends.extend(ids[-1] for ids in completion_ids)
        return even_length(None, completion_ids)

    result = run(model, tokenizer, dataset, k=2, seed=1, samples_path=path, reward_func=even_length_noting_ends)
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((row["problem"], row["sample"]) for row in samples) == [(p, s) for p in range(4) for s in range(3)]
    averages, passes = [], []
    for problem in range(4):
        verdicts = [row["verdict"] for row in samples if row["problem"] == problem]
        averages.append(sum(verdicts) / 3)
        draws = list(itertools.combinations(verdicts, 2))
        passes.append(sum(map(any, draws)) / len(draws))
    assert result.avg_at_k == pytest.approx(statistics.fmean(averages))
    assert result.pass_at_k == pytest.approx(statistics.fmean(passes))
    assert 0 < result.avg_at_k < 1, "the case should not be trivial"
    assert result.avg_interval[0] <= result.avg_at_k <= result.avg_interval[1]
    assert [row["truncated"] for row in samples] == [end != 1 for end in ends]
    assert 0 < result.truncated == sum(end != 1 for end in ends) < 12
    assert result.mean_length == pytest.approx(statistics.fmean(row["num_tokens"] for row in samples))
    for row in samples:
        assert row["prompt"] == dataset[row["problem"]]["prompt"]
        assert row["solution"] == dataset[row["problem"]]["solution"]
        assert row["verdict"] == float(row["num_tokens"] % 2 == 0)


def test_settings_and_names_are_recorded(model, tokenizer, dataset):
    result = run(model, tokenizer, dataset, temperature=0.7, top_p=0.9, seed=5, dataset_name="held-out")
    assert (result.num_problems, result.num_samples, result.k) == (4, 3, 3)
    assert (result.temperature, result.top_p, result.max_new_tokens, result.seed) == (0.7, 0.9, 6, 5)
    assert (result.model, result.dataset) == ("Qwen3ForCausalLM", "held-out")
    assert result.seconds > 0


def test_greedy_completions_are_those_of_a_loop_without_cache_and_padding(model, tokenizer, dataset, tmp_path):
    """Left padding, sorting by length and the KV cache must not change an answer."""
    path = tmp_path / "samples.jsonl"
    model.config.use_cache = False
    run(model, tokenizer, dataset, temperature=0.0, num_samples=1, samples_path=path)
    for row in map(json.loads, path.read_text().splitlines()):
        text = f"user {row['prompt'][0]['content']} assistant"
        ids = [WORDS.index(word) for word in text.split()]
        start = len(ids)
        while len(ids) - start < 6 and (len(ids) == start or ids[-1] != 1):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert row["num_tokens"] == len(ids) - start
        assert row["completion"].split() == [WORDS[token] for token in ids[start:] if token > 2]


def test_cache_is_used(model, tokenizer, dataset, monkeypatch):
    # It runs rows of its own, alone and whole.
    monkeypatch.setattr("sg_opd_trl.evaluation_sampling.Sampler.check", lambda self: None)
    model.config.use_cache = False
    widths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    run(model, tokenizer, dataset, batch_size=12)
    assert widths[0] > 1
    assert set(widths[1:]) == {1}


OWN_DEFAULTS = [
    {"top_k": 1},
    {"min_p": 0.99},
    {"repetition_penalty": 9.0},
    {"no_repeat_ngram_size": 1},
    {"num_beams": 2},
]


@pytest.mark.parametrize("own", OWN_DEFAULTS, ids=str)
def test_the_models_own_sampling_defaults_do_not_apply(model, tokenizer, dataset, tmp_path, own):
    run(model, tokenizer, dataset, samples_path=tmp_path / "plain.jsonl")
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=[1], pad_token_id=0, **own)
    run(model, tokenizer, dataset, samples_path=tmp_path / "own.jsonl")
    assert (tmp_path / "own.jsonl").read_text() == (tmp_path / "plain.jsonl").read_text()


def test_hot_sampling_reaches_all_tokens(model, tokenizer, dataset):
    """At temperature 1000 the 16 tokens are equally likely: 80 draws miss a given one with probability 0.6%."""
    first = set()

    def verifier(completion_ids, **kwargs):
        first.update(ids[0] for ids in completion_ids)
        return [0.0] * len(completion_ids)

    run(model, tokenizer, dataset, temperature=1000.0, num_samples=20, max_new_tokens=1, reward_func=verifier)
    assert len(first) >= 15


def test_ends_at_every_configured_end_and_at_the_tokenizers(model, tokenizer, dataset):
    own = run(model, tokenizer, dataset)
    assert 0 < own.truncated < 12
    model.generation_config.eos_token_id = None  # the tokenizer's is left
    assert run(model, tokenizer, dataset).mean_length == own.mean_length
    model.generation_config.eos_token_id = list(range(16))  # any token ends the completion
    every = run(model, tokenizer, dataset)
    assert (every.mean_length, every.truncated) == (1.0, 0)


def test_state_is_untouched(model, tokenizer, dataset):
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    config, settings = model.generation_config, model.generation_config.to_dict()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    seen = []

    def watch(completions, **kwargs):
        seen.append(model.training or model.model.layers[1].training)
        return [1.0] * len(completions)

    run(model, tokenizer, dataset, reward_func=watch)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.generation_config is config
    assert config.to_dict() == settings
    assert not any(seen), "sampling happens in eval mode"


def test_state_is_untouched_after_an_error(model, tokenizer, dataset):
    model.train()
    config = model.generation_config
    before = torch.get_rng_state()

    def broken(**kwargs):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(model, tokenizer, dataset, reward_func=broken)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.generation_config is config


def test_state_is_untouched_while_a_write_error_is_being_handled(model, tokenizer, dataset, tmp_path, monkeypatch):
    before = torch.get_rng_state()
    config = model.generation_config
    monkeypatch.setattr("sg_opd_trl.evaluation_files.EvaluationFiles.add", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError) as raised:
        run(model, tokenizer, dataset, samples_path=tmp_path / "samples.jsonl")
    assert raised.tb is not None, "the traceback keeps the frames alive"
    assert torch.equal(torch.get_rng_state(), before)
    assert model.generation_config is config


def test_seed_decides(model, tokenizer, dataset, tmp_path):
    texts = []
    for index, seed in enumerate((0, 0, 1)):
        path = tmp_path / f"{index}.jsonl"
        torch.manual_seed(index)  # the caller's state has no say
        run(model, tokenizer, dataset, seed=seed, samples_path=path)
        texts.append(path.read_text())
    assert texts[0] == texts[1] != texts[2]


def test_adapter_on_a_model(model, tokenizer, dataset):
    peft = pytest.importorskip("peft")
    plain = run(model, tokenizer, dataset)
    former = model.generation_config
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    result = run(wrapped, tokenizer, dataset)
    assert result.avg_at_k == plain.avg_at_k  # a fresh adapter adds nothing
    assert model.generation_config is former
    assert wrapped.generation_config is former


def test_model_by_path(model, tokenizer, dataset, tmp_path, monkeypatch):
    folder = tmp_path / "student"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tasks = types.SimpleNamespace(resolve=lambda name: {"builtin/x": str(folder)}[name])
    monkeypatch.setitem(sys.modules, "sg_opd_trl.tasks", tasks)
    by_path = run("builtin/x", None, dataset, temperature=0.0)
    assert by_path.model == "builtin/x"
    assert by_path.mean_length == run(model, tokenizer, dataset, temperature=0.0).mean_length


def test_tokenizer_without_padding(model, tokenizer, dataset):
    with_padding = run(model, tokenizer, dataset)
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert bare.pad_token_id is None
    assert run(model, bare, dataset).to_dict() | {"seconds": 0} == with_padding.to_dict() | {"seconds": 0}


def test_progress_says_what_and_how_far(model, tokenizer, dataset, capfd):
    run(model, tokenizer, dataset, progress=True)
    shown = capfd.readouterr().err
    assert "Evaluating Qwen3ForCausalLM: 100%" in shown
    assert "12/12" in shown
    assert "% right" in shown


# --- verdicts: the verifier is called as TRL calls it, and only verdicts are taken for an answer ---
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
    assert (result.avg_at_k, result.avg_interval, result.avg_bounds) == (0.0, (0.0, 0.0), (0.0, 0.0))


def scripted(verdicts):
    """A verifier with the verdicts of each problem in turn."""
    left = {gold: list(own) for gold, own in enumerate(verdicts)}
    return lambda solution, **kwargs: [left[gold].pop(0) for gold in solution]


def test_abstaining_is_neither_right_nor_wrong_and_is_counted(model, tokenizer, dataset, caplog):
    nan = float("nan")
    verdicts = [[None, nan, None], [1.0, None, 0.0], [0.0, 0.0, None], [1.0, 1.0, 1.0]]
    result = run(model, tokenizer, dataset, k=2, reward_func=scripted(verdicts))
    assert (result.abstained, result.problems_without_verdict) == (5, 1)
    assert result.avg_at_k == pytest.approx((1 / 2 + 0 + 1) / 3)  # over problems 1, 2, 3, of what was judged
    # All wrong: 0, 1/3, 0, 1. All right: 1, 2/3, 1/3, 1.
    assert result.avg_bounds == pytest.approx(((1 / 3 + 1) / 4, (1 + 2 / 3 + 1 / 3 + 1) / 4))
    # Draws of two: of the two judged samples of problem 1 one is right, of those of problem 2 none.
    assert result.pass_at_k == pytest.approx((1 + 0 + 1) / 3)
    # All wrong: 1 - C(2,2)/C(3,2) = 2/3 for problem 1. All right: one wrong sample never fills a draw of two.
    assert result.pass_bounds == pytest.approx(((2 / 3 + 1) / 4, (1 + 1 + 2 / 3 + 1) / 4))
    assert "5 of 12 completions have no verdict and are left out" in caplog.text
    assert "avg@3 33.3% to 75.0%" in caplog.text


def test_pass_at_k_of_fewer_verdicts_than_k(model, tokenizer, dataset):
    verdicts = [[0.0, None, None], [1.0, None, None], [0.0, 0.0, None], [0.0, 1.0, None]]
    result = run(model, tokenizer, dataset, reward_func=scripted(verdicts))
    assert result.pass_at_k == pytest.approx(2 / 4)
    assert result.pass_bounds == pytest.approx((2 / 4, 1.0))


def test_nothing_that_could_be_judged_is_no_accuracy(model, tokenizer, dataset, tmp_path):
    path = tmp_path / "result.json"
    result = run(model, tokenizer, dataset, reward_func=lambda solution, **_: [None] * len(solution), output_path=path)
    assert (result.avg_at_k, result.avg_interval, result.pass_at_k, result.pass_interval) == (None,) * 4
    assert (result.avg_bounds, result.pass_bounds) == ((0.0, 1.0), (0.0, 1.0))
    assert json.loads(path.read_text())["avg_at_k"] is None
    assert type(result).from_dict(json.loads(path.read_text())) == result


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


def test_a_limit_of_the_verifier_changes_no_result_and_no_file(model, tokenizer, dataset, tmp_path, monkeypatch):
    path, bound = tmp_path / "samples.jsonl", bounded(parity, 300.0)[0]
    plain = run(model, tokenizer, dataset, reward_func=parity)
    limited = run(model, tokenizer, dataset, reward_func=parity, verifier_timeout=300.0, samples_path=path)
    assert (limited.avg_at_k, limited.pass_at_k) == (plain.avg_at_k, plain.pass_at_k)
    assert 0 < limited.avg_at_k < 1, "the case should not be trivial"
    # What has been judged is not judged again, be it without a limit or by what a trainer has made of the function.
    monkeypatch.setattr("sg_opd_trl.evaluation_sampling._judge", None)
    assert run(model, tokenizer, dataset, reward_func=parity, samples_path=path).avg_at_k == plain.avg_at_k
    assert run(model, tokenizer, dataset, reward_func=bound, samples_path=path).avg_at_k == plain.avg_at_k


def test_a_verifier_that_never_answers_leaves_no_verdict(model, tokenizer, dataset):
    result = run(model, tokenizer, dataset, reward_func=sleeps, verifier_timeout=0.5)
    assert (result.abstained, result.avg_at_k) == (12, None)
    with pytest.raises(SGOPDConfigError, match=r"`verifier_timeout` must be a number in \(0, inf\), got -1"):
        run(model, tokenizer, dataset, verifier_timeout=-1)


def test_model_object_without_tokenizer(model, dataset):
    with pytest.raises(SGOPDConfigError, match="`processing_class` must be"):
        run(model, None, dataset)
