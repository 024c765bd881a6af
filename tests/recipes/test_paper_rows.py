"""Recipes against the rows of the paper's Tables 1 to 3; `paper_rows.csv` has their settings as printed."""

import csv
import re
from pathlib import Path

from recipe_files import FOLDER, ROOT, header, index_table, load, name, named, of_scale, parse
from repository import check_none

from sg_opd_trl import SGOPDConfig
from sg_opd_trl.config import settings_of

with (Path(__file__).parent / "paper_rows.csv").open(encoding="utf-8", newline="") as file:
    ROWS = list(csv.DictReader(file))
INDEX = index_table("Rows of the paper")
BOTH = list(zip(ROWS, INDEX, strict=True))
METHODS = index_table("Baselines, controls and other methods")
NO_RECIPE = {("T1", "Delta vs OPD"), ("T3a", "ExOPD, alpha=0.2")}

GROUPS = ("Gate", "Token weights", "Objective", "Phased teacher sampling")
METHOD_FIELDS = {name for name, setting in settings_of(SGOPDConfig).items() if setting.group in GROUPS}
OF_THE_SCALE = {"teacher_max_completion_length", "special_token_mask", "drift_gate_block"}


def label(row):
    return ", ".join(part for part in (row["run"], row["notes"]) if part)


def expected(row):
    """The settings a row prints; what it leaves open is not in here."""
    if row["run"] in ("SFT", "SeqKD", "GKD"):
        return {"method": row["run"].lower()}
    gated = bool(row["fallback"]) and row["run"] != "ExOPD"
    want = {
        "method": "sg_opd",
        "distillation_mode": "sampled_token",
        "sign_gated_extrapolation": gated,
        "gate_signal": "verifier",
        "wrong_rollout_advantage": None,
        "stability_tau": 5.0 if gated or row["run"] == "SG-OPD" else None,
        "teacher_sampling_enable": bool(row["P1"]),
        "teacher_sampling_time_separated": row["run"] == "TimeSep",
        "num_iterations": 1,
        "iw_opd_gamma": 0.0,
    }
    if not gated:
        # "beta=0.7 on all tok." is read as lambda 0.7; then its 1.25 has no place.
        want["lambda_base"] = float(row["beta"] or row["lambda_high"] or 1)
    elif "sign cells" in row["notes"]:
        high = float(row["lambda_high"])
        want |= {"disagree_mode": "cells", "disagree_cell_lambdas": [high, 1.0, 1.0, high]}
    else:
        want |= {"lambda_high": float(row["lambda_high"]), "lambda_base": 1.0, "disagree_mode": row["fallback"]}
        want |= {"disagree_interp_beta": float(row["beta"])} if row["beta"] else {}
    if row["P1"]:
        want["teacher_sampling_phase1_end_frac"] = float(row["P1"]) / 100
        want["teacher_sampling_phase2_end_frac"] = float(row["P2"]) / 100
        want["teacher_sampling_ratio"] = float(row["rho"] or 0.125)
        want["teacher_sampling_filter_correct"] = True
    return want


def test_the_index_has_every_row_in_the_papers_order():
    assert len(ROWS) == 34
    assert [(f"T{cells[0]}", cells[1], cells[2]) for cells in INDEX] == [
        (row["group"], label(row), row["AVG"]) for row in ROWS
    ]


def test_rows_without_a_recipe_are_named_with_a_reason():
    for row, (_, _, _, small, large, remark) in BOTH:
        without = (row["group"], label(row).removesuffix(", difference row")) in NO_RECIPE
        assert (small == "none", large == "none") == (without, without), label(row)
        assert not without or len(remark) > 10


def test_recipes_have_the_settings_of_their_rows():
    offences = []
    for row, cells in BOTH:
        for path in filter(None, map(named, cells[3:5])):
            run = parse(path)
            found = {key: getattr(run.training, key, None) for key in expected(row)} | {"method": run.script.method}
            offences += [
                f"{name(path)}: {key} is {found[key]!r}, row {row['group']} {label(row)} has {value!r}"
                for key, value in expected(row).items()
                if found[key] != value
            ]
    check_none(offences)


def test_headers_name_the_rows():
    offences = []
    for row, cells in BOTH:
        for path in filter(None, map(named, cells[3:5])):
            # A header's lines as one; "Tables 1, 2 and 3a, row OPD (...)".
            text = re.sub(r"\s*\n#\s*", " ", header(path))
            tables = re.search(r"Paper: Tables? (.*?), rows? ", text)
            if tables is None or row["group"][1:] not in re.split(r", | and ", tables[1]):
                offences.append(f"{name(path)}: not of table {row['group']}")
            # Only the paper's own scale can be compared with the paper's numbers.
            if (f"AVG {row['AVG']}, one seed" in text) != (path == named(cells[4])):
                offences.append(f"{name(path)}: AVG {row['AVG']}")
    check_none(offences)


def test_rows_share_a_file_exactly_where_their_settings_are_the_same():
    by_file, by_settings = {}, {}
    for i, (row, cells) in enumerate(BOTH):
        if named(cells[4]) is None:
            continue
        by_file.setdefault(cells[4], []).append(i)
        by_settings.setdefault(str(expected(row)), []).append(i)
    assert sorted(by_file.values()) == sorted(by_settings.values())
    assert len(by_file) == len({cells[3] for cells in INDEX} - {"none"})


def test_every_recipe_with_a_row_is_in_the_index():
    listed = {cell.strip("`") for cells in INDEX for cell in cells[3:5]}
    for scale in ("arithmetic", "Qwen3-1.7B"):
        for path in of_scale(scale):
            assert ("\n# Paper: Table" in header(path)) == (name(path) in listed), name(path)


def twins():
    pairs = [(named(cells[3]), named(cells[4])) for cells in INDEX]
    pairs += [(named(cells[1]), named(cells[2])) for cells in METHODS]
    pairs += [(FOLDER / "arithmetic" / path.name, path) for path in of_scale("chains")]
    pairs += [(FOLDER / "arithmetic" / "pts_no_filter.yaml", FOLDER / "Qwen3-1.7B/pts_only/config_no_filter.yaml")]
    return sorted({pair for pair in pairs if None not in pair})


def test_a_method_is_the_same_at_every_scale():
    offences = []
    pairs = twins()
    assert len(pairs) > 40
    for pair in pairs:
        one, other = (parse(path) for path in pair)
        same = {"method": one.script.method == other.script.method}
        ignored = OF_THE_SCALE if "Qwen3-1.7B" in str(pair[1]) else set()
        for field in (*METHOD_FIELDS - ignored, "num_iterations", "top_p", "lmbda", "beta"):
            same[field] = getattr(one.training, field, None) == getattr(other.training, field, None)
        offences += [f"{name(pair[0])}, {name(pair[1])}: {field}" for field in same if not same[field]]
    check_none(offences)


def test_every_other_method_has_a_recipe_for_both_scales():
    assert len(METHODS) == 10
    assert [cells[0] for cells in METHODS if named(cells[1]) is None] == ["several teachers"]
    assert all(named(cells[2]).is_file() for cells in METHODS)


def test_the_multi_teacher_recipe_maps_names_to_teachers():
    path = FOLDER / "Qwen3-1.7B" / "multi_teacher" / "config_math_code.yaml"
    teachers = parse(path).training.teacher_model_name_or_path
    assert sorted(teachers) == ["code", "math"]
    assert "teacher_id" in header(path)
    assert load(path)["reference_model_name_or_path"] == "Qwen/Qwen3-4B"


def test_the_step_90_row_is_a_checkpoint_that_the_best_run_keeps():
    training = parse(ROOT / "recipes/Qwen3-1.7B/sg_opd/config_deepmath.yaml").training
    assert 90 % training.save_steps == 0
    assert training.save_total_limit is None
    assert training.max_steps > 90
