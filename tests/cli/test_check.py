"""`sg-opd check`: one table, an exit code, and nothing left behind."""

import json

import pytest

from sg_opd_trl.cli import main
from sg_opd_trl.cli.check import check


def checked(recipe, *flags):
    return check(["--config", str(recipe), *flags], 2)


def test_a_good_recipe_is_told_row_by_row_and_leaves_nothing_behind(tiny_recipe, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    file = tmp_path / "rows.json"
    # Offline a push would fail.
    assert main(["check", "--config", str(tiny_recipe), "--json", str(file), "--push_to_hub", "true"]) == 0
    shown = capsys.readouterr().out
    told = json.loads(file.read_text(encoding="utf-8"))
    names = [row["name"] for row in told["rows"]]
    assert names[:7] == ["versions", "tokenizer", "chat template", "thinking", "end token", "context", "log-probs"]
    assert {"verifier", "golds", "memory", "rollouts", "verdicts", "teacher", "gate", "anchor", "time"} <= set(names)
    assert all(name in shown for name in names)
    file.unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_rollouts_that_a_run_would_store_are_not(tiny_recipe, tmp_path):
    folder = tmp_path / "stored"
    assert checked(tiny_recipe, "--teacher_rollouts_path", str(folder)).of("anchor")
    assert not folder.exists()


def test_a_launcher_is_refused(tiny_recipe, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["check", "--config", str(tiny_recipe)]) == 2
    assert "must run as one process, got 2" in capsys.readouterr().err


def test_help_is_its_own(capsys):
    with pytest.raises(SystemExit) as end:
        main(["check", "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: sg-opd check --config RECIPE")


def test_a_red_row_is_exit_code_two(tiny, tiny_recipe, capsys):
    assert main(["check", "--config", str(tiny_recipe), "--teacher_model_name_or_path", tiny.student]) == 2
    assert "the teacher says what the student says" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("flags", "name", "said"),
    [
        (["--learning_rat", "1"], "settings", "learning_rate"),
        (["--lambda_high", "-1"], "settings", "`lambda_high`"),
        (["--dataset_name", "absent/folder/here"], "data", "`dataset_name` must be"),
        (["--answer_column", "absent"], "data", "`answer_column`"),
        (["--reward_funcs", "maths_reward"], "verifier", "`math_reward`"),
        (["--teacher_model_name_or_path", "absent/folder/here"], "settings", "`teacher_model_name_or_path`"),
    ],
)
def test_what_is_refused_is_a_row_and_the_rest_is_told(tiny_recipe, flags, name, said):
    report = checked(tiny_recipe, *flags)
    assert report.state == "red"
    assert said in str(report.of(name))
    assert report.of("versions").state == "green"


def test_a_broken_data_set_does_not_hide_the_tokenizers(tiny_recipe):
    report = checked(tiny_recipe, "--answer_column", "absent")
    assert report.of("tokenizer").state == "green"


def test_a_trainer_that_cannot_be_built_does_not_hide_the_verifier(tiny_recipe):
    report = checked(tiny_recipe, "--generation_kwargs", '{"no_such_key": 1}')
    assert "no_such_key" in str(report)
    assert {report.of(name).state for name in ("tokenizer", "verifier", "golds")} == {"green"}


def test_without_prompts_nothing_is_sampled(tiny_recipe):
    report = check(["--config", str(tiny_recipe)], 0)
    assert report.of("rollouts").state == "yellow"
    with pytest.raises(KeyError):
        report.of("teacher")


def test_several_processes_are_looked_at_in_one(tiny_recipe):
    report = checked(tiny_recipe, "--num_processes", "2")
    assert report.of("processes").state == "green"


def test_trls_own_methods_are_looked_at_without_a_trainer(tiny_recipe):
    text = [line for line in tiny_recipe.read_text(encoding="utf-8").splitlines() if "teacher_model" not in line]
    tiny_recipe.write_text("\n".join(["method: grpo", *text]), encoding="utf-8")
    report = checked(tiny_recipe)
    assert report.state == "green", str(report)
    assert {"method", "verifier", "golds", "tokenizer"} <= {row.name for row in report.rows}
