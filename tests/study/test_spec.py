import ast
import inspect
import re
from pathlib import Path

import pytest
import yaml

from sg_opd_trl.cli.evaluate import _parser
from sg_opd_trl.errors import SGOPDConfigError
from sg_opd_trl.study.spec import EVALUATE_KEYS, STUDY_KEYS, read_study

from .fakes import jobs, study, values

TUNE = {"field": "learning_rate", "values": [1e-4, 1e-3], "seeds": [9], "split": "tune"}


def test_paths_are_relative_to_the_file_and_defaults_are_filled_in():
    found = read_study(values(), Path("/studies/tiny.yaml"))
    assert found.output_dir == Path("/studies/outputs/studies/tiny")
    assert found.runs["opd"].recipe == Path("/studies/opd.yaml")
    assert found.evaluate == {
        **{"dataset_split": "test", "num_samples": 8, "seed": 0},
        **{"dataset_name": "problems", "max_new_tokens": 8},
    }
    assert (found.pairs, found.tuning, found.keep_models, found.measure_models) == ((None,), None, False, True)
    assert study("/elsewhere").output_dir == Path("/elsewhere")


def test_null_in_evaluate_is_the_default_and_never_the_word():
    given = {"limit": None, "num_samples": None, "instruction": None, "temperature": 0.5}
    found = study("/out", evaluate={"dataset_name": "problems", "max_new_tokens": 8, **given})
    plain = study("/out", evaluate={"dataset_name": "problems", "max_new_tokens": 8, "temperature": 0.5})
    assert found.evaluate == plain.evaluate
    assert "None" not in jobs(found)[0].commands[-1]


def test_a_sweep_is_one_run_per_point_of_its_grid():
    sweep = {
        "grid": {"lambda_base": [1.0, 1.5], "stability_tau": [None, 5.0]},
        "recipe": "e.yaml",
        "settings": {"a": 1},
    }
    found = study("/out", sweep={"uniform": sweep})
    names = [name for name in found.runs if found.runs[name].sweep == "uniform"]
    assert names == [
        *("uniform-lambda_base=1.0,stability_tau=None", "uniform-lambda_base=1.0,stability_tau=5.0"),
        *("uniform-lambda_base=1.5,stability_tau=None", "uniform-lambda_base=1.5,stability_tau=5.0"),
    ]
    assert found.runs[names[2]].settings == {"a": 1, "lambda_base": 1.5, "stability_tau": None}
    assert found.runs[names[2]].point == {"lambda_base": 1.5, "stability_tau": None}


def test_every_evaluate_key_is_a_flag_of_evaluate_and_none_takes_foreign_code():
    flags = set(_parser().names)
    assert set(EVALUATE_KEYS) <= flags
    assert flags - set(EVALUATE_KEYS) == {"model", "output", "samples_path", "revision", "trust_remote_code"}


REFUSED = {
    "unknown key": ({"seed": [1]}, "Unknown key `seed` in the study .*Did you mean `seeds`"),
    "unknown key of a run": ({"runs": {"opd": {"recipee": "x"}}}, "`recipee` in the run `opd`.*`recipe`"),
    "unknown key of evaluate": (
        {"evaluate": {"dataset_name": "p", "max_new_tokens": 1, "num_sample": 1}},
        "`num_sample`.*`num_samples`",
    ),
    "no data": ({"evaluate": {"max_new_tokens": 1}}, "`dataset_name` must be set"),
    "no length": ({"evaluate": {"dataset_name": "p"}}, "`max_new_tokens` must be set"),
    "no runs": ({"runs": {}}, "must name at least one run"),
    "run without a recipe": ({"runs": {"opd": {}}}, "`recipe` must be set in the run `opd`"),
    "run that is a word": ({"runs": {"opd": "x.yaml"}}, "run `opd`.*must be a mapping"),
    "name with a slash": ({"runs": {"o/pd": {"recipe": "x"}}}, "letters, digits"),
    "unknown baseline": ({"baseline": "odp"}, "`baseline`.*must name a run.*Did you mean `opd`"),
    "seeds twice": ({"seeds": [1, 1]}, "`seeds`.*different whole numbers"),
    "seeds as a number": ({"seeds": 3}, "`seeds`.*different whole numbers"),
    "seeds as booleans": ({"seeds": [True]}, "`seeds`.*different whole numbers"),
    "seed as a setting": ({"settings": {"seed": 1}}, r"must not hold \['seed'\]"),
    "flag as a word": ({"keep_models": "yes"}, "`keep_models`.*true or false"),
    "contrast of no run": ({"contrasts": {"c": {"opd": 1, "gate": -1}}}, "`gate`.*contrast `c`.*`gated`"),
    "contrast that is none": ({"contrasts": {"c": {"opd": 1, "gated": 1}}}, "sum to 0"),
    "tune on the table's problems": ({"tune": {**TUNE, "split": "test"}}, "another split"),
    "tune and choices": ({"tune": TUNE, "choices": "c.json"}, "not be set together"),
    "tuned setting": ({"tune": {**TUNE, "field": "lambda_high"}}, "`lambda_high` must not be set in run `gated`"),
    "tuned shared setting": ({"tune": TUNE, "settings": {"learning_rate": 1}}, "not set `learning_rate`"),
    "tuned seed": ({"tune": {**TUNE, "field": "seed"}}, "`field`.*setting of the recipes"),
    "choice of nobody": (
        {"tune": TUNE, "runs": {"opd": {"recipe": "x"}, "b": {"recipe": "x", "tune": "odp"}}},
        "`tune` of run `b`.*`opd`",
    ),
    "choice without a choice": ({"runs": {"opd": {"recipe": "x"}, "b": {"recipe": "x", "tune": "opd"}}}, "needs the"),
    "pairs of one name": ({"pairs": [{"name": "p", "student": "s", "teacher": "t"}] * 2}, "different names"),
    "pair without a teacher": ({"pairs": [{"student": "s"}]}, "`teacher` must be set in the pair 1"),
    "two runs of one name": (
        {"runs": {"opd": {"recipe": "x"}}, "sweep": {"s": {"recipe": "x", "grid": {"a": [1, 1]}}}},
        "name of its own",
    ),
    "empty grid": ({"sweep": {"s": {"recipe": "x", "grid": {"a": []}}}}, "list of values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_told_with_the_way_out(case):
    changes, said = REFUSED[case]
    with pytest.raises(SGOPDConfigError, match=f"(?s){said}"):
        study("/out", **changes)


def test_a_study_that_is_no_mapping_is_refused():
    with pytest.raises(SGOPDConfigError, match="must be a mapping"):
        read_study(["a"], Path("x.yaml"))


def test_nothing_of_the_study_package_imports_the_command_line_or_torch():
    import sg_opd_trl.study as package

    for path in Path(inspect.getfile(package)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any("cli" in name.split(".") or name.startswith("torch") for name in names), path


def test_the_example_of_the_guide_is_valid_and_all_keys_are_explained():
    text = (Path(__file__).resolve().parents[2] / "docs" / "study_guide.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    found = read_study(yaml.safe_load(example), Path("/studies/x.yaml"))
    assert list(found.runs) == ["opd", "sg_opd", "uniform-lambda_base=1.25", "uniform-lambda_base=1.8"]
    for key in STUDY_KEYS:
        assert f"`{key}`" in text, key


@pytest.mark.parametrize("doubled", [[1e-3, 0.001], ["a b", "a_b"]])
def test_tuned_values_have_folders_of_their_own(doubled):
    with pytest.raises(SGOPDConfigError, match=r"`values` in the block `tune` .* must be different, got .* Each has"):
        study("/out", tune={**TUNE, "values": doubled})
