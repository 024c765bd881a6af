import json

import pytest

from sg_opd_trl.cli import main
from sg_opd_trl.cli.evaluate import cached_evaluation, results_table
from sg_opd_trl.evaluation import EvaluationResult


def evaluate(tiny, *flags):
    words = ["--model", tiny.student, "--dataset_name", tiny.data, "--max_new_tokens", "8", "--num_samples", "2"]
    return main(["evaluate", *words, *flags])


def test_a_model_is_evaluated_and_the_result_written(tiny, tmp_path, capsys):
    output = tmp_path / "sub" / "result.json"
    samples = tmp_path / "samples.jsonl"
    assert evaluate(tiny, "--limit", "3", "--output", str(output), "--samples-path", str(samples)) == 0
    result = EvaluationResult.from_dict(json.loads(output.read_text(encoding="utf-8")))
    assert (result.num_problems, result.num_samples, result.max_new_tokens) == (3, 2, 8)
    assert len(samples.read_text(encoding="utf-8").splitlines()) == 6
    assert "avg@2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temprature", "1"], "Did you mean `temperature`?"),
        (["--limit", "0"], "`limit` must be at least 1, got 0"),
        (["--num_samples", "many"], "invalid int value"),
        (["--dataset_split", "tset"], "Did you mean `test`?"),
        (["--reward_func", "exact_reward"], "Did you mean `exact_match_reward`?"),
        (["--chat_template_kwargs", "[1]"], "must be a JSON object"),
        (["--generation_kwargs", '{"topk": 3}'], "Did you mean 'top_k'"),
        (["--seed", str(2**63)], "`seed` must be at least 0"),
        (["--verifier_timeout", "0"], "`verifier_timeout` must be a number in (0, inf), got 0.0"),
    ],
)
def test_wrong_flags_are_told_in_one_message(tiny, capsys, flags, said):
    assert evaluate(tiny, *flags) == 2
    error = capsys.readouterr().err
    assert said in error.replace("\n", " ")
    assert "Traceback" not in error


def test_required_flags_are_told(capsys):
    assert main(["evaluate", "--model", "x"]) == 2
    assert "--dataset_name" in capsys.readouterr().err


def result(**changes):
    values = {
        **{"model": "m", "num_problems": 4, "num_samples": 8, "k": 8, "avg_at_k": 0.25, "avg_interval": (0.2, 0.3)},
        **{"pass_at_k": 0.75, "pass_interval": (0.5, 1.0), "abstained": 0, "truncated": 0, "mean_length": 5.0},
        **{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "seed": 0, "seconds": 1.0},
    }
    return EvaluationResult(**{**values, **changes})


def test_a_stored_evaluation_is_used_until_anything_it_depends_on_changes(tmp_path, monkeypatch):
    calls = []

    def evaluate_model(model, processing_class, rows, **settings):
        calls.append(settings)
        return result()

    monkeypatch.setattr("sg_opd_trl.evaluation.evaluate_model", evaluate_model)
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"1")
    rows = [{"prompt": "a", "solution": "1"}]

    def measure(rows=rows, **settings):
        return cached_evaluation(str(model), rows, tmp_path / "cache", "problems", **{"seed": 0, **settings})

    assert measure() == measure() == result()
    assert len(calls) == 1
    measure(seed=1)
    measure(rows=[{"prompt": "a", "solution": "2"}])
    assert len(calls) == 3
    (model / "weights").write_bytes(b"2")
    measure()
    assert len(calls) == 4
    for stored in (tmp_path / "cache").iterdir():
        stored.write_text("{broken", encoding="utf-8")
    measure()
    assert len(calls) == 5


NOTHING = {"avg_at_k": None, "avg_interval": None, "pass_at_k": None, "pass_interval": None}


def test_what_has_no_verdict_is_told_and_is_no_accuracy(capsys):
    from rich.console import Console

    results = {
        "some": result(abstained=2, avg_bounds=(0.2, 0.4), pass_bounds=(0.7, 0.8)),
        "all": result(**NOTHING, abstained=32, avg_bounds=(0.0, 1.0), pass_bounds=(0.0, 1.0)),
    }
    Console(width=140).print(results_table(results, "title"))
    shown = capsys.readouterr().out
    for part in ("2 of 32", "25.0 (20.0 to 40.0)", "75.0 (70.0 to 80.0)", "32 of 32", "no verdict (0.0 to 100.0)"):
        assert part in shown
    assert "with all of them wrong to all of them right" in " ".join(shown.split())


def test_six_golds_that_cannot_be_read(tiny, tmp_path, capsys):
    """`math_reward` cannot tell what a `proof` is: no verdict, and not 0% right."""
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1="}], "solution": "proof"} for n in range(6)]
    data, output = tmp_path / "proofs.jsonl", tmp_path / "result.json"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    words = ["evaluate", "--model", tiny.student, "--dataset_name", data, "--dataset_split", "train"]
    words += ["--max_new_tokens", "8", "--num_samples", "1", "--output", output]
    assert main([str(word) for word in words]) == 0
    shown = capsys.readouterr()
    assert "no verdict" in shown.out
    assert "6 of 6" in shown.out
    assert "0.0 to 0.0" not in shown.out
    values = json.loads(output.read_text(encoding="utf-8"))
    assert (values["avg_at_k"], values["abstained"], values["avg_bounds"]) == (None, 6, [0.0, 1.0])


def test_a_result_is_not_made_twice_nor_overwritten(tiny, tmp_path, capsys, monkeypatch):
    output = tmp_path / "result.json"
    assert evaluate(tiny, "--limit", "3", "--output", str(output)) == 0
    before, shown = output.read_bytes(), capsys.readouterr().out

    def never(*args, **kwargs):
        raise AssertionError("sampled")

    monkeypatch.setattr("sg_opd_trl.evaluation_sampling.generate_completions", never)
    assert evaluate(tiny, "--limit", "3", "--output", str(output)) == 0
    assert capsys.readouterr().out == shown
    # Refused before the model is loaded, of which there is none.
    for flags in (["--seed", "1"], ["--limit", "2"], ["--temperature", "0.5"]):
        words = ["--model", "./nowhere", "--dataset_name", tiny.data, "--max_new_tokens", "8", "--num_samples", "2"]
        assert main(["evaluate", *words, "--limit", "3", "--output", str(output), *flags]) == 2
        assert "`output` must be a new file" in " ".join(capsys.readouterr().err.split())
    assert output.read_bytes() == before


def test_an_adapter_is_recorded_under_its_own_name(tiny, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, output = str(tmp_path / "adapter"), tmp_path / "result.json"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.student), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.student).save_pretrained(folder)
    words = ["evaluate", "--model", folder, "--dataset_name", tiny.data, "--max_new_tokens", "8", "--limit", "2"]
    assert main([*words, "--num_samples", "1", "--output", str(output)]) == 0
    values = json.loads(output.read_text(encoding="utf-8"))
    assert (values["model"], values["base_model"]) == (folder, tiny.student)
    assert "adapter on" in " ".join(capsys.readouterr().out.split())


def test_the_table_shows_percent_with_intervals(capsys):
    from rich.console import Console

    Console(width=100).print(results_table({"student before": result()}, "title"))
    shown = capsys.readouterr().out
    for part in ("avg@8", "pass@8", "student before", "25.0", "20.0 to 30.0", "75.0", "50.0 to 100.0"):
        assert part in shown
