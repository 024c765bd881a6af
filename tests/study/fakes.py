"""A small study, results that no model made, and a child that trains nothing."""

import json
import os
import sys
import time
from pathlib import Path

import yaml

from sg_opd_trl.study import plan, results
from sg_opd_trl.study.spec import read_study

RECIPE = {"model_name_or_path": "student", "teacher_model_name_or_path": "teacher", "dataset_name": "problems"}
SCORES = {"opd": {0: 0.50, 1: 0.60, 2: 0.40}, "gated": {0: 0.60, 1: 0.64, 2: 0.53}}


def values(**changes):
    """What a study file holds."""
    return {
        "name": "tiny",
        "baseline": "opd",
        "seeds": [0, 1, 2],
        "runs": {"opd": {"recipe": "opd.yaml"}, "gated": {"recipe": "gated.yaml", "settings": {"lambda_high": 1.8}}},
        "evaluate": {"dataset_name": "problems", "max_new_tokens": 8},
        **changes,
    }


def study(folder, **changes):
    return read_study(values(**changes), Path("/studies/tiny.yaml"), Path(folder))


def recipes(study, **changes):
    return {run.recipe: {**RECIPE, **changes} for run in study.runs.values()}


def jobs(study, **changes):
    return plan.run_jobs_of(study, recipes(study, **changes), {}, None)


def evaluation(score):
    return {"num_samples": 8, "avg_at_k": score, "pass_at_k": score + 0.2, "avg_interval": [score - 0.1, score + 0.1]}


def write(job, score, **changes):
    """A finished job."""
    curve = [[1, score / 2], [2, score]] if job.kind == "run" else []
    result = {
        **{"key": job.key, "evaluation": evaluation(score), "wall_seconds": 10.0, "seconds": 8.0, "curve": curve},
        **{"teacher_tokens_generated": 1000, "teacher_tokens_scored": 2_000_000},
        **changes,
    }
    results.write_json(job.folder / results.RESULT, result)


def finish_all(found, scores=SCORES):
    for job in found:
        write(job, scores[job.name][job.seed])


def child(commands):
    """In place of `sg_opd_trl.cli.study_child`: does what the recipe's `fake` says and answers with the seed."""
    for command in commands:
        if command[0] == "check":
            if "fake_unknown" in Path(command[1]).read_text():
                sys.stderr.write(f"Unknown key `fake_unknown` in recipe {command[1]}.")
                return 2
            continue
        options = dict(zip(command[1::2], command[2::2], strict=True))
        if command[0] == "check_evaluation":
            if options["--dataset_split"] == "fake_absent":
                sys.stderr.write("`dataset_split` must be one of the others.")
                return 2
            continue
        if command[0] == "train":
            folder = Path(options["--config"]).parent
            recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
            sys.stderr.write(f"Beside the recipe: {sorted(json.loads(os.environ['SG_OPD_STUDY_SECRETS']))}\n")
            time.sleep(recipe.get("fake_seconds", 0))
            if recipe.get("fake_failure") == recipe["seed"]:
                sys.stderr.write("Traceback\nError: it broke\nsome warning at the end\n")
                return 3
            student = Path(recipe["output_dir"])
            student.mkdir()
            (student / "model.safetensors").write_bytes(b"0" * 1000)
            (student / "run.json").write_text(json.dumps({"seconds": 4.5, "teacher_tokens_scored": 7}))
            log = [{"step": 1, "reward": 0.25}, {"step": 1, "eval_loss": 1.0}, {"step": 2, "reward": float("nan")}]
            (student / "log_history.json").write_text(json.dumps(log))
        else:
            Path(options["--output"]).write_text(json.dumps(evaluation(0.5)))
    return 0


if __name__ == "__main__":
    raise SystemExit(child(json.loads(sys.argv[-1])))
