"""An interrupted evaluation goes on where it stopped; files of another one are neither mixed with nor overwritten."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import PATIENCE
from word_case import even_length, run, word_data, word_model, word_tokenizer

from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.evaluation import EvaluationResult, evaluate_model
from sg_opd_trl.evaluation_files import EvaluationFiles
from sg_opd_trl.evaluation_plan import Identity

TOKENIZER, DATA = word_tokenizer(), word_data()


class Interrupted(Exception):
    """Stands in for Ctrl-C: raised by the verifier."""


def interrupted_after(calls):
    """A verifier that judges as `even_length` does, until it is interrupted; its name and module are the same."""
    made = []

    def verifier(completions, completion_ids, **kwargs):
        made.append(len(completion_ids))
        if len(made) > calls[0]:
            raise Interrupted
        return even_length(completions, completion_ids)

    return verifier, made


def numbers(result):
    return result.to_dict() | {"seconds": 0}


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# --- going on --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stops", [[0], [1], [2], [1, 1], [0, 0, 1]], ids=str)
def test_an_interrupted_call_goes_on_and_comes_to_the_same_numbers(tmp_path, stops):
    """12 completions in batches of 4, three calls of the verifier; each run is stopped after so many of them."""
    allowed = [99]
    verifier, made = interrupted_after(allowed)
    whole = run(word_model(), TOKENIZER, DATA, samples_path=tmp_path / "whole.jsonl", reward_func=verifier)
    made.clear()
    path = tmp_path / "part.jsonl"
    for stop in stops:
        allowed[0] = len(made) + stop
        with pytest.raises(Interrupted):
            run(word_model(), TOKENIZER, DATA, samples_path=path, reward_func=verifier)
        made.pop()
        torch.manual_seed(stop)  # what happens in between has no say
    allowed[0] = 99
    resumed = run(word_model(), TOKENIZER, DATA, samples_path=path, reward_func=verifier)
    assert numbers(resumed) == numbers(whole)
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert sum(made) == 12, "nothing is judged twice"
    run(word_model(), TOKENIZER, DATA, samples_path=path, reward_func=verifier)
    assert sum(made) == 12, "what has ended is not made again"


def test_a_process_that_was_killed_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    whole = run(word_model(), TOKENIZER, DATA, samples_path=path)
    text = path.read_text()
    # Seven samples and a piece: the second batch of four is a part, and is made again.
    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[:7]) + lines[7][:20])
    assert numbers(run(word_model(), TOKENIZER, DATA, samples_path=path)) == numbers(whole)
    assert path.read_text() == text


def test_whatever_a_completion_holds_its_line_ends_where_it_was_ended(tmp_path):
    """Unicode has more ends of a line than JSON Lines: U+2028 and U+0085 stand in a line as they are."""
    files, identity = EvaluationFiles(tmp_path / "samples.jsonl", None), Identity("a", "b", "c")
    samples = [{"problem": number, "completion": text} for number, text in enumerate(["1\u20282", "\x853", "4\r5\n6"])]
    files.add(identity, samples)
    assert files.samples(identity) == samples
    files.add(identity, samples)
    path = tmp_path / "samples.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    assert files.samples(identity) == [*samples, *samples[:-1]]


def test_a_batch_does_not_depend_on_what_was_sampled_before(tmp_path):
    path = tmp_path / "samples.jsonl"
    run(word_model(), TOKENIZER, DATA, samples_path=path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[4:]))  # the first batch is lost, not the last
    run(word_model(), TOKENIZER, DATA, samples_path=path)
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_batches_have_different_random_numbers(tmp_path):
    """One problem over and over, in batches of four: were the random numbers the same, the batches would be."""
    path = tmp_path / "samples.jsonl"
    run(word_model(), TOKENIZER, DATA.select([0]), num_samples=32, samples_path=path)
    texts = [row["completion"] for row in rows_of(path)]
    batches = {tuple(texts[start : start + 4]) for start in range(0, 32, 4)}
    assert len(batches) > 4


def test_samples_are_beside_the_result_until_that_is_there(tmp_path):
    output = tmp_path / "deep" / "result.json"
    allowed = [2]
    verifier, made = interrupted_after(allowed)
    with pytest.raises(Interrupted):
        run(word_model(), TOKENIZER, DATA, output_path=output, reward_func=verifier)
    assert [path.name for path in output.parent.iterdir()] == ["result.json.samples.jsonl"]
    assert len(rows_of(output.parent / "result.json.samples.jsonl")) == 8
    allowed[0] = 99
    result = run(word_model(), TOKENIZER, DATA, output_path=output, reward_func=verifier)
    assert [path.name for path in output.parent.iterdir()] == ["result.json"]
    assert EvaluationResult.from_dict(json.loads(output.read_text())) == result
    assert (sum(made[:2]), made[3:]) == (8, [4])
    assert run(word_model(), TOKENIZER, DATA, output_path=output, reward_func=verifier) == result
    assert len(made) == 4, "the result is read and nothing sampled"


def test_samples_are_made_where_only_the_result_is_there(tmp_path):
    output, samples = tmp_path / "result.json", tmp_path / "samples.jsonl"
    result = run(word_model(), TOKENIZER, DATA, output_path=output)
    assert numbers(run(word_model(), TOKENIZER, DATA, output_path=output, samples_path=samples)) == numbers(result)
    assert len(rows_of(samples)) == 12


# --- not mixing ------------------------------------------------------------------------------------------------------
def other_verifier(completions, completion_ids, **kwargs):
    return [1.0] * len(completion_ids)


OTHERS = {
    "seed": ({"seed": 1}, "other settings"),
    "temperature": ({"temperature": 0.5}, "other settings"),
    "top_p": ({"top_p": 0.5}, "other settings"),
    "length": ({"max_new_tokens": 5}, "other settings"),
    "batches": ({"batch_size": 3}, "other settings"),
    "number": ({"num_samples": 2}, "other settings"),
    "k": ({"k": 1}, "other settings"),
    "generation": ({"generation_kwargs": {"top_k": 3}}, "other settings"),
    "template": ({"chat_template_kwargs": {"thinking": False}}, "other settings"),
    "verifier": ({"reward_func": other_verifier}, "other settings"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("setting", ["samples_path", "output_path"])
def test_files_of_other_settings_are_refused_before_a_model_is_loaded(tmp_path, kind, setting):
    changes, said = OTHERS[kind]
    path = tmp_path / "file"
    run(word_model(), TOKENIZER, DATA, **{setting: path})
    before = path.read_bytes()
    with pytest.raises(SGOPDConfigError, match=f"`{setting.removesuffix('_path')}.*{said}.*Set another path"):
        run("no/such/model", None, DATA, **{setting: path}, **changes)
    assert path.read_bytes() == before


def test_files_of_other_problems_are_refused_before_a_model_is_loaded(tmp_path):
    path = tmp_path / "samples.jsonl"
    run(word_model(), TOKENIZER, DATA, samples_path=path)
    for other in (DATA.select([0, 1, 2]), DATA.select([1, 0, 2, 3]), DATA.map(lambda row: {"level": 0})):
        with pytest.raises(SGOPDConfigError, match="other problems"):
            run("no/such/model", None, other, samples_path=path)


def test_files_of_another_model_are_refused_before_anything_is_sampled(tmp_path, monkeypatch):
    path = tmp_path / "samples.jsonl"
    run(word_model(), TOKENIZER, DATA, samples_path=path)
    other = word_model()
    with torch.no_grad():
        other.model.norm.weight[5] += 1e-3
    for file in ({"samples_path": path}, {"output_path": tmp_path / "result.json"}):
        run(word_model(), TOKENIZER, DATA, **file)
        with monkeypatch.context() as patch:
            patch.setattr("sg_opd_trl.evaluation_sampling.generate_completions", lambda *_, **__: 1 / 0)
            with pytest.raises(SGOPDConfigError, match="which has another model"):
                run(other, TOKENIZER, DATA, **file)


@pytest.mark.parametrize("content", ["", "hello", "[1]", '{"problem": 0}\n{"problem": 1}\n', "\xff\xfe"])
def test_what_is_no_file_of_an_evaluation_is_not_overwritten(tmp_path, content):
    for setting in ("samples_path", "output_path"):
        path = tmp_path / setting
        path.write_text(content, encoding="latin-1")
        if setting == "samples_path" and content == "":
            continue  # as a call leaves it that is killed before its first batch
        with pytest.raises(SGOPDConfigError, match="nothing that says whose it is"):
            run("no/such/model", None, DATA, **{setting: path})
        assert path.read_text(encoding="latin-1") == content


def test_paths_that_cannot_be_written_are_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "below"):
        for setting in ("samples_path", "output_path"):
            with pytest.raises(SGOPDConfigError, match=f"`{setting.removesuffix('_path')}.*must be a f"):
                run("no/such/model", None, DATA, **{setting: path})
    with pytest.raises(SGOPDConfigError, match="another file than `output`"):
        run("no/such/model", None, DATA, samples_path=tmp_path / "one", output_path=tmp_path / "one")


# --- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": -1}, "`seed` must be at least 0"),
        ({"seed": 2**63}, "`seed` must be"),
        ({"seed": True}, "`seed` must be"),
        ({"seed": 1.0}, "`seed` must be"),
        ({"temperature": "1"}, "`temperature` must be"),
        ({"max_new_tokens": 2.5}, "`max_new_tokens` must be"),
        ({"num_samples": 2.0}, "`num_samples` must be"),
        ({"generation_kwargs": {"top_p": 0.5}}, "argument of its own"),
        ({"generation_kwargs": {"num_beams": 4}}, "must not set 'num_beams'"),
        ({"generation_kwargs": {"topk": 4}}, "Did you mean 'top_k'"),
    ],
)
def test_settings_are_refused_before_a_model_is_loaded(changes, said):
    with pytest.raises(SGOPDConfigError, match=re.escape(said)):
        evaluate_model("no/such/model", None, DATA, **changes)


def test_generation_kwargs_shape_the_samples_and_are_recorded(tmp_path):
    plain = run(word_model(), TOKENIZER, DATA)
    found = []

    def verifier(completion_ids, **kwargs):
        found.extend(completion_ids)
        return [1.0] * len(completion_ids)

    kwargs = {"suppress_tokens": list(range(6, 16))}
    result = run(word_model(), TOKENIZER, DATA, generation_kwargs=kwargs, reward_func=verifier)
    assert all(token < 6 for ids in found for token in ids)
    assert result.generation_kwargs == kwargs
    assert "suppress_tokens" in result.describe_settings()
    assert plain.generation_kwargs == {}
    found.clear()
    run(word_model(), TOKENIZER, DATA, generation_kwargs={"eos_token_id": [1, 7]}, reward_func=verifier)
    assert any(ids[-1] == 7 for ids in found)
    assert not any(7 in ids[:-1] for ids in found)


# --- adapters --------------------------------------------------------------------------------------------------------
def test_an_adapter_has_its_own_name(tmp_path):
    peft = pytest.importorskip("peft")
    word_model().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    base = type(word_model()).from_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(base, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    TOKENIZER.save_pretrained(tmp_path / "adapter")
    folder, name = str(tmp_path / "adapter"), str(tmp_path / "base")
    by_path = run(folder, None, DATA)
    assert (by_path.model, by_path.base_model) == (folder, name)
    by_object = run(wrapped, TOKENIZER, DATA)
    assert (by_object.model, by_object.base_model) == (f"{name} with adapter default", name)
    assert by_object.mean_length == by_path.mean_length
    named = run(wrapped, TOKENIZER, DATA, name="mine")
    assert (named.model, named.base_model) == ("mine", name)
    with wrapped.disable_adapter():
        off = run(wrapped, TOKENIZER, DATA)
    assert (off.model, off.base_model) == (name, None)
    assert numbers(off) == numbers(run(name, None, DATA))
    wrapped.add_adapter("second", config)
    path = tmp_path / "samples.jsonl"
    run(wrapped, TOKENIZER, DATA, samples_path=path)
    wrapped.set_adapter("second")
    assert run(wrapped, TOKENIZER, DATA).model == f"{name} with adapter second"
    with pytest.raises(SGOPDConfigError, match="another model"):
        run(wrapped, TOKENIZER, DATA, samples_path=path)


def test_reading_and_checking_is_light():
    code = (
        "import sys, sg_opd_trl.evaluation_files as files\n"
        "files.EvaluationFiles(None, None)\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
