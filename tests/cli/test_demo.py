import json

import pytest
from transformers import AutoModelForCausalLM

from sg_opd_trl.cli import main
from sg_opd_trl.cli.demo import _settings
from sg_opd_trl.errors import SGOPDConfigError


def test_the_demo_is_the_builtin_recipe_with_a_seed_for_run_and_student():
    settings = _settings(["--seed", "2", "--lambda_high", "1.5"])
    assert settings.model.model_name_or_path == "builtin/arithmetic-student@2"
    assert settings.training.teacher_model_name_or_path == "builtin/arithmetic-teacher"
    assert (settings.training.seed, settings.training.lambda_high) == (2, 1.5)
    assert settings.output_dir.name == "arithmetic-sg_opd-seed2"
    assert settings.training.overwrite_output_dir, "the command may be given again"
    assert not _settings(["--resume_from_checkpoint", "true"]).training.overwrite_output_dir


def test_a_named_student_and_folder_are_kept(tmp_path):
    settings = _settings(["--model_name_or_path", "builtin/arithmetic-student@7", "--output_dir", str(tmp_path)])
    assert settings.model.model_name_or_path == "builtin/arithmetic-student@7"
    assert settings.output_dir == tmp_path
    assert not settings.training.overwrite_output_dir


def test_several_processes_and_unknown_keys_are_refused():
    with pytest.raises(SGOPDConfigError, match="one process"):
        _settings(["--num_processes", "2"])
    with pytest.raises(SGOPDConfigError, match="`max_steps`"):
        _settings(["--max_stepz", "2"])


def test_the_whole_demo_on_tiny_models(tiny_recipe, tmp_path, capsys):
    words = ["demo", "--recipe", str(tiny_recipe), "--output_dir", str(tmp_path / "out" / "student")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for part in ("student before", "student after", "teacher", "avg@8", "pass@8", "Elapsed"):
        assert part in shown
    folder = tmp_path / "out" / "student"
    AutoModelForCausalLM.from_pretrained(folder)
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "student before" in report
    assert "student after" in report
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "evaluations").iterdir()}
    assert len(stored) == 3
    assert json.loads(next(iter(stored)).read_text(encoding="utf-8"))["num_problems"] == 6

    assert main(words) == 2, "nothing is replaced unasked"
    assert main([*words, "--overwrite_output_dir", "true"]) == 0
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "evaluations").iterdir()}
    assert all(again[path] == stamp for path, stamp in stored.items())
