import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest

from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.study import plan

from .fakes import RECIPE, jobs, recipes, study

TUNE = {"field": "learning_rate", "values": [1e-4, 1e-3], "seeds": [8, 9], "split": "tune"}


def test_runs_of_a_seed_come_together_and_differ_in_seed_and_folder_only(tmp_path):
    found = jobs(study(tmp_path, seeds=[3, 5]))
    assert [(job.name, job.seed) for job in found] == [("opd", 3), ("gated", 3), ("opd", 5), ("gated", 5)]
    first, second = found[0].recipe, found[2].recipe
    assert {key for key in first if first[key] != second[key]} == {"seed", "output_dir"}
    assert (first["seed"], first["report"], first["push_to_hub"]) == (3, False, False)
    assert first["output_dir"] == found[0].model == str(tmp_path / "runs" / "opd" / "seed3" / "student")
    assert found[1].recipe["lambda_high"] == 1.8


def test_layers_win_from_recipe_to_run():
    shared = study("/out", settings={"lambda_high": 1.0, "max_steps": 3})
    opd, gated = jobs(shared, max_steps=100, lambda_high=9.0)[:2]
    assert (opd.recipe["max_steps"], opd.recipe["lambda_high"]) == (3, 1.0)
    assert gated.recipe["lambda_high"] == 1.8


def test_the_seed_can_name_the_student_also_in_nested_values():
    found = jobs(study("/out", settings={"model_name_or_path": "s@{seed}", "a": {"b": ["{seed}", 1]}}))
    assert [job.recipe["model_name_or_path"] for job in found] == ["s@0", "s@0", "s@1", "s@1", "s@2", "s@2"]
    assert found[2].recipe["a"] == {"b": ["1", 1]}


def test_runs_that_start_from_different_students_are_refused():
    changed = study(
        "/out", runs={"opd": {"recipe": "a"}, "b": {"recipe": "a", "settings": {"model_name_or_path": "x"}}}
    )
    with pytest.raises(
        SGOPDConfigError, match=r"`model_name_or_path` must be the same.*'x' in `b`.*'student' in `opd`"
    ):
        jobs(changed)


OTHER = {
    **{"model_name_or_path": "x", "model_revision": "v2", "dataset_name": "x", "dataset_config": "x"},
    **{"dataset_train_split": "x", "dataset_streaming": True, "datasets": [{"path": "x"}], "streaming": True},
    **{"test_split_size": 0.1, "question_column": "x", "answer_column": "x", "instruction": "x", "system_prompt": "x"},
    **{"min_difficulty": 6, "difficulty_column": "x", "max_prompt_tokens": 9, "shuffle_dataset": False},
}


@pytest.mark.parametrize("name", OTHER)
def test_runs_that_see_other_problems_are_refused_also_while_tuning(name):
    runs = {"opd": {"recipe": "a"}, "b": {"recipe": "a", "settings": {name: OTHER[name]}}}
    with pytest.raises(SGOPDConfigError, match=f"`{name}` must be the same in all runs"):
        jobs(study("/out", runs=runs))
    spec = study("/out", runs=runs, tune=TUNE)
    with pytest.raises(SGOPDConfigError, match=f"`{name}` must be the same in all runs"):
        plan.tuning_jobs_of(spec, recipes(spec))
    assert set(plan.PAIRED) == set(OTHER)


def test_a_default_that_is_written_out_is_no_difference():
    from sg_opd_trl.cli.parsing import run_dataclasses

    known = {field.name: field for kind in run_dataclasses("sg_opd") for field in dataclasses.fields(kind)}
    assert set(plan.PAIRED) <= set(known)
    written = {
        name: known[name].default
        for name in plan.PAIRED
        if name not in ("model_name_or_path", "dataset_name", "datasets")
    }
    assert len(written) > 10
    runs = {"opd": {"recipe": "a"}, "b": {"recipe": "a", "settings": {**written, "max_steps": 9}}}
    assert len(jobs(study("/out", runs=runs, seeds=[0]))) == 2


def test_the_guide_lists_what_is_compared():
    text = (Path(__file__).resolve().parents[2] / "docs" / "study_guide.md").read_text(encoding="utf-8")
    table = text.partition("**Pairing.**")[2].partition("Nothing else is compared")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(plan.PAIRED)


def test_pairs_replace_student_and_teacher_and_leave_runs_without_a_teacher_alone():
    pairs = [{"name": "p", "student": "s1", "teacher": "t1"}, {"student": "s2", "teacher": "t2"}]
    spec = study("/out", pairs=pairs, seeds=[0])
    given = recipes(spec)
    given[spec.runs["gated"].recipe] = {key: value for key, value in RECIPE.items() if "teacher" not in key}
    found = plan.run_jobs_of(spec, given, {}, None)
    named = [(job.pair, job.name, job.recipe["model_name_or_path"]) for job in found]
    assert named == [("p", "opd", "s1"), ("p", "gated", "s1"), ("pair2", "opd", "s2"), ("pair2", "gated", "s2")]
    assert [job.recipe.get("teacher_model_name_or_path") for job in found] == ["t1", None, "t2", None]
    assert len({job.folder for job in found}) == 4
    assert {job.name for job in plan.model_jobs_of(spec, found)} == {"s1", "s2", "t1", "t2"}


def test_models_are_measured_once_each_and_only_where_asked_for():
    found = jobs(study("/out", settings={"model_name_or_path": "a/s@{seed}"}))
    models = plan.model_jobs_of(study("/out"), found)
    assert sorted(job.model for job in models) == ["a/s@0", "a/s@1", "a/s@2", "teacher"]
    assert all(job.recipe is None and job.commands[0][0] == "evaluate" for job in models)
    assert len({job.folder for job in models}) == 4
    assert plan.model_jobs_of(study("/out", measure_models=False), found) == []


def test_names_that_a_folder_cannot_tell_apart_have_folders_of_their_own():
    found = jobs(study("/out", seeds=[1], settings={"model_name_or_path": "a/s@1"}))
    found += jobs(study("/out", seeds=[1], settings={"model_name_or_path": "a/s_1"}))
    folders = {job.model: job.folder.name for job in plan.model_jobs_of(study("/out"), found)}
    assert len(set(folders.values())) == 3
    assert folders["teacher"] == "teacher"
    alone = plan.model_jobs_of(study("/out"), found[:1])
    assert {job.model: job.folder.name for job in alone}["a/s@1"] == "a_s_1"


def test_tuning_tries_every_value_and_seed_on_its_own_split():
    runs = {"opd": {"recipe": "a"}, "b": {"recipe": "a", "tune": "opd"}, "c": {"recipe": "a", "tune": False}}
    spec = study("/out", runs=runs, tune=TUNE)
    found = plan.tuning_jobs_of(spec, recipes(spec, learning_rate=7.0))
    assert [(job.name, job.value, job.seed) for job in found] == [
        *(("opd", 1e-4, 8), ("opd", 1e-4, 9), ("opd", 1e-3, 8), ("opd", 1e-3, 9)),
    ]
    assert found[2].recipe["learning_rate"] == 1e-3
    assert {job.evaluate["dataset_split"] for job in found} == {"tune"}
    assert "trying 0.001" in found[2].label
    chosen = plan.run_jobs_of(spec, recipes(spec, learning_rate=7.0), {"opd": 1e-3}, "learning_rate")
    rates = {job.name: job.recipe["learning_rate"] for job in chosen}
    assert rates == {"opd": 1e-3, "b": 1e-3, "c": 7.0}
    assert {job.evaluate["dataset_split"] for job in chosen} == {"test"}


def test_runs_without_a_choice_are_left_out():
    runs = {"opd": {"recipe": "a"}, "b": {"recipe": "a"}, "c": {"recipe": "a", "tune": "b"}}
    spec = study("/out", runs=runs, tune=TUNE, seeds=[0])
    found = plan.run_jobs_of(spec, recipes(spec), {"opd": 1e-3}, "learning_rate")
    assert [job.name for job in found] == ["opd"]


def test_the_key_changes_with_everything_but_the_folder(monkeypatch):
    key = jobs(study("/out"))[0].key
    assert jobs(study("/elsewhere"))[0].key == key
    assert jobs(study("/out"), max_steps=1)[0].key != key
    assert jobs(study("/out"))[2].key != key
    assert jobs(study("/out", evaluate={"dataset_name": "problems", "max_new_tokens": 9}))[0].key != key
    monkeypatch.setattr(plan, "__version__", "99")
    assert jobs(study("/out"))[0].key != key


def test_the_key_changes_with_the_content_of_local_files(tmp_path):
    data = tmp_path / "problems.jsonl"
    spec = study("/out", settings={"dataset_name": str(data)})
    key = jobs(spec)[0].key
    data.write_text("one\n")
    first = jobs(spec)[0].key
    data.write_text("two\n\n")
    assert len({key, first, jobs(spec)[0].key}) == 3
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    before = [
        job.key
        for job in plan.model_jobs_of(study("/out"), jobs(study("/out"), teacher_model_name_or_path=str(teacher)))
    ]
    (teacher / "model.safetensors").write_bytes(b"1")
    after = [
        job.key
        for job in plan.model_jobs_of(study("/out"), jobs(study("/out"), teacher_model_name_or_path=str(teacher)))
    ]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False]


def test_names_alone_have_the_keys_that_they_always_had(monkeypatch):
    """Results that exist are found again: the key of version 0.1.0, hashed by hand."""
    monkeypatch.setattr(plan, "__version__", "0.1.0")
    job = jobs(study("/out", settings={"model_name_or_path": "builtin/arithmetic-student@{seed}"}))[0]
    recipe = {**{key: value for key, value in job.recipe.items() if key != "output_dir"}}
    text = json.dumps([recipe, None, job.evaluate, "0.1.0"], sort_keys=True)
    assert job.key == hashlib.sha256(text.encode()).hexdigest()[:24]


def test_commands_train_and_then_evaluate_the_student():
    job = jobs(study("/out", evaluate={"dataset_name": "p", "max_new_tokens": 8, "chat_template_kwargs": {"a": 1}}))[0]
    train, evaluate = job.commands
    folder = Path("/out/runs/opd/seed0")
    assert train == ["train", "--config", str(folder / "recipe.yaml")]
    options = dict(zip(evaluate[1::2], evaluate[2::2], strict=True))
    assert options["--model"] == str(folder / "student")
    assert options["--output"] == str(folder / "evaluation.json")
    assert options["--chat_template_kwargs"] == '{"a": 1}'
    assert (options["--seed"], options["--num_samples"], options["--dataset_split"]) == ("0", "8", "test")
