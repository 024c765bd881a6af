"""The card says what is known, and never a thing that is not."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard
from synthetic_run import result

from sg_opd_trl.reporting import build_model_card
from sg_opd_trl.reporting.model_card import is_hub_id

CITATION = "@article{sgopd,\n  title = {{SG-OPD}},\n  year = {2026}\n}"


def build(**changes):
    arguments = {
        "model_name": "me/student", "base_model": "Qwen/Qwen3-1.7B", "teacher_model": "Qwen/Qwen3-4B",
        "reference_model": None, "dataset_name": "zwhe99/DeepMath-103K", "tags": ["trl", "sg-opd", "trl"],
        "config": {"sign_gated_extrapolation": True, "lambda_high": 1.8, "learning_rate": 1e-5, "temperature": 0.9,
                   "max_completion_length": 77, "hub_token": "SECRET", "stability_tau": None},
        "is_adapter": False, "evaluations": None, "citation": CITATION,
    }  # fmt: skip
    return build_model_card(**(arguments | changes))


def front_matter(card):
    return yaml.safe_load(str(card).split("---\n")[1])


def test_front_matter_in_full():
    assert front_matter(build()) == {
        "base_model": "Qwen/Qwen3-1.7B", "base_model_relation": "finetune", "datasets": ["zwhe99/DeepMath-103K"],
        "library_name": "transformers", "model_name": "me/student", "pipeline_tag": "text-generation",
        "tags": ["trl", "sg-opd"], "teacher_model": "Qwen/Qwen3-4B",
    }  # fmt: skip


def test_card_survives_a_file(tmp_path):
    card = build(evaluations={"student after": result(0.6, (0.5, 0.7))})
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == card.data.to_dict()
    assert read.text == card.text


@pytest.mark.parametrize("unknown", ["/models/student-3", "./student-3", None, "", "builtin/arithmetic-student@0"])
def test_unknown_and_local_bases_are_left_out_of_the_front_matter(unknown):
    data = front_matter(build(base_model=unknown))
    assert "base_model" not in data
    assert "base_model_relation" not in data


def test_existing_folders_are_local_even_if_they_look_like_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert not is_hub_id("runs/base")
    assert is_hub_id("runs/other")
    assert not is_hub_id("builtin/arithmetic")
    assert "datasets" not in front_matter(build(dataset_name="runs/base"))


def test_nothing_known_gives_a_card_without_holes():
    card = build(base_model=None, teacher_model=None, dataset_name=None, config={}, tags=[], citation="")
    for hole in ("None", "Undefined", "null", "```bibtex\n\n"):
        assert hole not in str(card)
    assert "A language model, distilled" in card.text
    assert "Results" not in card.text
    assert "model-index" not in front_matter(card)


def test_local_folders_appear_by_their_last_part():
    names = {
        "model_name": "/someone/runs/my-student", "base_model": "/someone/base", "dataset_name": "~/someone/prompts",
        "teacher_model": "/someone/teacher/", "reference_model": "/someone/reference",
    }  # fmt: skip
    card = str(build(**names, evaluations={"after": result(0.5, (0.4, 0.6), dataset="/someone/held-out")}))
    assert "someone" not in card
    for shown in ("# my-student", "before training | base", "Teacher | teacher", "Reference | reference", "held-out"):
        assert shown in card


def test_identities_and_reference_default():
    text = build().text
    assert "| Student, before training | Qwen/Qwen3-1.7B |" in text
    assert "| Teacher | Qwen/Qwen3-4B |" in text
    assert "| Reference | the student's initial weights |" in text
    assert "| Training prompts | zwhe99/DeepMath-103K |" in text


def test_adapter():
    card = build(is_adapter=True)
    assert front_matter(card)["base_model_relation"] == "adapter"
    assert "needs peft" in card.text
    assert "adapter" not in build().text


def test_quick_start_is_python_with_the_run_s_sampling():
    (code,) = re.findall(r"```python\n(.*?)```", build().text, flags=re.DOTALL)
    compile(code, "quick start", "exec")
    assert "max_new_tokens=77" in code
    assert "temperature=0.9" in code
    assert 'model="me/student"' in code
    assert r"\\boxed{}" in code


def test_settings_tables_show_the_method_and_no_secret():
    text = build().text
    assert "| `lambda_high` | 1.8 |" in text
    assert "| `learning_rate` | 1e-05 |" in text
    assert "stability_tau" not in text
    assert "SECRET" not in str(build())


def test_method_says_what_was_off():
    on = build().text
    assert "annealed to zero" in on
    assert "extrapolated with `lambda_high`" in on
    off = build(config={"sign_gated_extrapolation": False, "teacher_sampling_enable": False}).text
    assert "The gate was off" in off
    assert "No teacher answers were used" in off
    assert "either is zero gets" not in off
    assert "or either is zero its advantage is" in build(config={"neutral_mode": "conflict"}).text


@pytest.mark.parametrize(
    ("mode", "factor", "conflict"),
    [
        ("interp", "lambda_high", r"beta\*a2 (paper, Eq. 7);"),
        ("interp_lambda", "lambda_high", "A(beta) (our choice"),
        ("preserve", "lambda_high", "A(lambda_base);"),
        ("grpo", "lambda_high", "the verifier's advantage;"),
        ("cells", "disagree_cell_lambdas", "A(lambda) with one lambda per pair of signs"),
    ],
)
def test_method_says_what_the_mode_of_the_run_does(mode, factor, conflict):
    text = build(config={"disagree_mode": mode}).text
    assert f"is extrapolated with `{factor}`; where they differ its advantage is {conflict}" in text


def test_results_table_and_model_index():
    evaluations = {
        "student before": result(0.195, (0.165, 0.226)).to_dict(),
        "student | after": result(0.604, (0.571, 0.636), dataset="HuggingFaceH4/MATH-500"),
        "teacher": result(0.895, (0.878, 0.912), "teacher"),
    }
    card = build(evaluations=evaluations)
    assert "| student before | 8 | 19.5% | 16.5 to 22.6 | 90.0% | 8 | 85.0 to 95.0 | 200 |" in card.text
    assert r"| student \| after | 8 | 60.4% |" in card.text
    assert "temperature 0.7, top-p 0.95, at most 48 new tokens, seed 1" in card.text
    (entry,) = front_matter(card)["model-index"]
    (measured,) = entry["results"]
    assert entry["name"] == "me/student"
    assert measured["dataset"] == {"name": "HuggingFaceH4/MATH-500", "type": "HuggingFaceH4/MATH-500"}
    assert [(metric["type"], metric["value"]) for metric in measured["metrics"]] == [("avg@8", 0.604), ("pass@8", 0.9)]
    assert measured["metrics"][0]["args"]["interval_95"] == [0.571, 0.636]


NOTHING = {"avg_at_k": None, "pass_at_k": None, "pass_interval": None, "abstained": 1600}
OPEN = {"avg_bounds": (0.0, 1.0), "pass_bounds": (0.0, 1.0)}


def test_what_has_no_verdict_is_neither_right_nor_wrong_in_the_card():
    nothing = result(**{"avg": 0.0, "interval": None} | NOTHING | OPEN)
    card = build(evaluations={"student after": nothing})
    assert "| student after | 8 | no verdict | | no verdict | 8 | | 200 |" in card.text
    assert "1600 of 1600 completions have no verdict" in card.text
    assert "model-index" not in front_matter(card)
    part = result(0.6, (0.5, 0.7), avg_bounds=(0.59, 0.61), pass_bounds=(0.9, 0.9))
    card = build(evaluations={"student after": part})
    assert (
        "3 of 1600 completions have no verdict and are left out: from all wrong to all right, avg@8 59.0% to 61.0%"
        in card.text
    )
    (entry,) = front_matter(card)["model-index"]
    assert entry["results"][0]["metrics"][0]["args"]["no_verdict"] == 3


def test_no_model_index_unless_one_result_is_this_model_s():
    card = build(evaluations={"teacher": result(0.9, (0.8, 1.0)), "rafters": result(0.1, (0.0, 0.2))})
    assert "model-index" not in front_matter(card)
    assert "| teacher |" in card.text


def test_citations():
    text = build().text
    assert CITATION in text
    assert "arXiv:2606.09304" in text
    assert "TRL: Transformers Reinforcement Learning" in text


def test_equation():
    assert "A(lambda) = a2 + (lambda - 1) * (log p_teacher - log p_reference)" in build().text
